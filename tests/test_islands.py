"""Islands of several ranks: gradients averaged inside an island, meetings of its leader with the others.

Hazards: ranks of an island that differ in a bit; a mean over the wrong ranks; a rank that waits for an island that
is not its own; residuals, buffers or counts of ranks that do not lead; a resume that gives a rank another island.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.local_training import local, oracle, resumed, save, step, train, wide_model
from helpers.on_ranks import launch, on_ranks
from helpers.small_training import batches, digest, same_everywhere, share, small_model
from helpers.training_runs import ROOT

from hvd_adam import Adam, distribute
from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.context import PROCESS_SETS
from hvd_adam.distributed.local.islands import count_islands
from hvd_adam.errors import JobError, UserError
from hvd_adam.recovery.collective_timeout import LIMIT
from hvd_adam.training.builders import scale_for_ranks

SETS = {PROCESS_SETS: "1"}
COMPRESSIONS = pytest.mark.parametrize("compression", ["none", "int8", "int4"])


def same_in_island(cluster, value):
    """Whether the ranks of each of two islands have equal values."""
    values, half = cluster.gather(int(value, 16) % 2**60), cluster.size // 2
    return len({*values[:half]}) == len({*values[half:]}) == 1


def rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum):
    model = small_model()
    optimizer = local(model, local_steps, islands=2, outer_lr=lr, outer_momentum=momentum)
    train(model, optimizer, cluster, 6)
    expected = oracle(2, 6, local_steps, lr, momentum)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    assert same_everywhere(digest(model.state_dict()))


EACH_FORM = pytest.mark.parametrize(("local_steps", "lr", "momentum"), [(1, 1.0, 0.0), (3, 0.7, 0.9)])


@on_ranks(4, **SETS)
@EACH_FORM
def test_an_island_trains_as_one_rank_with_its_whole_batch(cluster, local_steps, lr, momentum):
    rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum)


@on_ranks(4, controller="mpi", **SETS)
@EACH_FORM
def test_an_island_trains_as_one_rank_under_mpi(cluster, local_steps, lr, momentum):
    rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum)


def one_island_has_the_bits_of_averaged_gradients(cluster, options):
    """Of two ranks: sums of two numbers do not depend on their order. Then a meeting changes roundings only."""
    averaged, island = wide_model(), wide_model()
    other = distribute(Adam(averaged.parameters(), lr=0.01), averaged, **options)
    optimizer = local(island, 100, islands=1, outer_lr=1.0, outer_momentum=0.0, **options)
    for number, batch in enumerate(batches(6, 16, torch.float32)):
        for inputs, targets in share(batch, cluster, options["accumulate"]):
            for model, each in ((averaged, other), (island, optimizer)):
                step(model, each, inputs * (torch.nan if number == 3 and cluster.rank else 1), targets)
        assert digest(averaged.state_dict()) == digest(island.state_dict())
        assert digest(other.state_dict()["state"]) == digest(optimizer.state_dict()["state"])
    before = [p.detach().clone() for p in island.parameters()]
    outer = torch.split(optimizer._outer.values.clone(), [p.numel() for p in before])
    optimizer.meet()
    assert optimizer.skipped_updates == 1
    for p, q, o in zip(island.parameters(), before, outer, strict=True):
        # θ − (θ − w): each of the two subtractions rounds to half a unit in the last place of its result.
        bound = 2.0**-24 * ((o.view_as(q) - q).abs() + 2 * q.abs()) + torch.finfo(q.dtype).tiny
        assert ((p - q).abs() <= 1.01 * bound).all()
    assert same_everywhere(digest(island.state_dict()))


@on_ranks(2, **SETS)
@pytest.mark.parametrize("options", [{"accumulate": 1}, {"accumulate": 2}])
def test_one_island_of_all_ranks_has_the_bits_of_averaged_gradients(cluster, options):
    one_island_has_the_bits_of_averaged_gradients(cluster, options)


@on_ranks(2, controller="mpi", **SETS)
def test_one_island_of_all_ranks_has_the_bits_of_averaged_gradients_under_mpi(cluster):
    one_island_has_the_bits_of_averaged_gradients(cluster, {"accumulate": 1})


@on_ranks(2, **SETS)
def test_as_many_islands_as_ranks_are_the_default(cluster):
    ends = []
    for islands in (None, 2):
        model = wide_model()
        optimizer = local(model, 2, compression="int4", islands=islands)
        train(model, optimizer, cluster, 4)
        ends.append(digest(model.state_dict(), optimizer._mean.state()))
    assert ends[0] == ends[1]


@on_ranks(4, **SETS)
@COMPRESSIONS
def test_weights_are_equal_in_an_island_at_every_update_and_everywhere_at_meetings(cluster, compression):
    model = wide_model()
    optimizer = local(model, compression=compression, islands=2)
    for steps in range(1, 8):
        train(model, optimizer, cluster, steps, skip=steps - 1)
        with optimizer.outer_weights():
            assert same_everywhere(digest(model.state_dict()))
        assert same_in_island(cluster, digest([*model.parameters()], optimizer.state_dict()))
        assert same_everywhere(digest([*model.parameters()])) == (steps % 3 == 0)


@on_ranks(4, controller="mpi", **SETS)
def test_buffers_at_a_meeting_are_the_mean_of_those_of_the_leaders(cluster):
    model, own = wide_model(), []
    optimizer = local(model, 2, outer_lr=1.0, islands=2)
    model[1].register_forward_hook(lambda layer, *_: own.append(layer.running_mean.clone()))
    train(model, optimizer, cluster, 2)
    leaders = cluster.gather(own[-1])[::2]
    torch.testing.assert_close(model[1].running_mean.double(), torch.stack(leaders).double().mean(dim=0))


# Updates that are not finite, clipping, loss scale, gradients that are missing.


@on_ranks(4, controller="mpi", **SETS)
def test_a_gradient_that_is_not_finite_makes_its_island_skip_and_no_other(cluster):
    model = small_model()
    optimizer = local(model, 2, islands=2)
    for number, batch in enumerate(batches(4, 16)):
        inputs, targets = share(batch, cluster)[0]
        step(model, optimizer, inputs * (torch.nan if number == 0 and cluster.rank == 3 else 1), targets)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0 if cluster.rank >= 2 else 4.0}
    assert optimizer.skipped_updates == 1 and optimizer.skipped_in_a_row == 0
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(4, controller="mpi", **SETS)
@COMPRESSIONS
def test_weights_that_are_not_finite_drop_the_round_of_all_islands(cluster, compression):
    model = wide_model()
    optimizer = local(model, 2, compression=compression, islands=2)
    train(model, optimizer, cluster, 2)
    before = digest(model.state_dict(), optimizer._mean.state(), optimizer._outer.momentum)
    train(model, optimizer, cluster, 3, skip=2)
    if cluster.rank >= 2:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.inf
    optimizer.meet()
    assert digest(model.state_dict(), optimizer._mean.state(), optimizer._outer.momentum) == before
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0 if cluster.rank >= 2 else 3.0}


@on_ranks(4, controller="mpi", **SETS)
def test_clipping_accumulation_and_loss_scale_are_those_of_the_islands_whole_batch(cluster):
    model, alone = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = local(model, 10, accumulate=2, max_grad_norm=0.1, loss_scaler=scaler, islands=2)
    adam = torch.optim.Adam(alone.parameters(), lr=0.01, foreach=False)
    for batch in batches(3, 16):
        for inputs, targets in share(batch, cluster, 2):
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(inputs), targets)).backward()
            optimizer.step()
        adam.zero_grad()
        inputs, targets = (tensor.chunk(2)[cluster.rank // 2] for tensor in batch)
        F.mse_loss(alone(inputs), targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        assert optimizer.finite_grad_norm() == pytest.approx(float(norm), rel=1e-9)
        adam.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@on_ranks(4, controller="mpi", **SETS)
def test_a_gradient_that_one_rank_lacks_counts_as_zero_and_one_that_all_lack_stays_none(cluster):
    model = small_model()
    optimizer = local(model, 10, islands=2)
    if cluster.rank % 2:
        model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    optimizer.step()
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 1.5))
    assert model[2].bias.grad is None and model[2].bias not in {
        p for p, state in optimizer.state.items() if float(state["step"])
    }
    assert same_in_island(cluster, digest([*model.parameters()]))


@on_ranks(4, **SETS)
def test_sparse_gradients_are_refused_with_the_remedy(cluster):
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = local(model, 10, islands=2)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients: use Embedding\(…, sparse=False\)"):
        optimizer.step()


# Resuming.


@on_ranks(4, **SETS)
@pytest.mark.parametrize("compression", ["none", "int4"])
def test_a_resume_within_a_round_is_exact(cluster, compression):
    model = wide_model()
    optimizer = local(model, 3, compression=compression, islands=2)
    train(model, optimizer, cluster, 5)
    saved, weights = save(model, optimizer)
    assert saved is None or len(saved["islands"]) == 2
    again, other = resumed(cluster, saved, weights, compression=compression, islands=2)
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, cluster, 10, skip=5)
    state = [digest(o.held_state_dict()["state"], o._mean.state(), o._outer.momentum) for o in (optimizer, other)]
    assert [*map(digest, model.parameters())] == [*map(digest, again.parameters())] and state[0] == state[1]
    for o, m in ((optimizer, model), (other, again)):
        o.meet()
        state.append(digest(m.state_dict()))
    assert state[2] == state[3]


@on_ranks(4, controller="mpi", **SETS)
def test_another_number_of_islands_begins_a_round_at_the_outer_weights(cluster):
    model = wide_model()
    optimizer = local(model, 3, compression="int4")
    train(model, optimizer, cluster, 5)
    saved, weights = save(model, optimizer)
    expected = copy.deepcopy(saved)
    again, other = resumed(cluster, saved, weights, compression="int4", islands=2)
    assert digest(again.state_dict()) == digest(weights)
    if cluster.is_root:
        total = optimizer._mean.unsent([island["residuals"] for island in expected["islands"]])
        torch.testing.assert_close(other._mean.state()["worker"][: len(total)], total / 2)
    assert same_in_island(cluster, digest(other.held_state_dict()["state"]))
    train(again, other, cluster, 3)
    assert same_everywhere(digest(again.state_dict()))


# The learning rate.


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
@pytest.mark.parametrize(("islands", "root"), [("1", 1), ("4", 2)])
def test_the_rate_for_all_ranks_is_multiplied_by_the_root_of_the_number_of_islands(rule, islands, root):
    options = ["--lr-scaling", rule]
    config = parse(TrainConfig, "hvd_adam.train", options)
    own = parse(TrainConfig, "hvd_adam.train", [*options, "--strategy", "local", "--islands", islands])
    cluster = SimpleNamespace(size=4)
    averaged, scaled = scale_for_ranks(config, cluster), scale_for_ranks(own, cluster)
    assert scaled.betas == averaged.betas
    assert (scaled.lr, scaled.eps) == pytest.approx((root * averaged.lr, root * averaged.eps))


# How ranks are grouped, and what is refused.


def places(*hosts):
    """Clusters of all ranks whose hosts are named in the order of the ranks."""
    names = [*dict.fromkeys(hosts)]
    return [
        SimpleNamespace(
            rank=rank,
            size=len(hosts),
            local_rank=hosts[:rank].count(host),
            local_size=hosts.count(host),
            cross_rank=[n for n in names if hosts.count(n) > hosts[:rank].count(host)].index(host),
        )
        for rank, host in enumerate(hosts)
    ]


@pytest.mark.parametrize(("hosts", "count"), [("a", 1), ("aabb", 2), ("abc", 3), ("aaabbb", 2)])
def test_the_ranks_of_each_host_are_an_island(hosts, count):
    assert {count_islands("host", cluster) for cluster in places(*hosts)} == {count}


@pytest.mark.parametrize("hosts", ["aab", "abb", "abab", "aabbbb", "aaaabb", "abba", "aaabbc"])
def test_uneven_hosts_and_ranks_that_are_not_consecutive_are_refused(hosts):
    refusals = []
    for cluster in places(*hosts):
        try:
            count_islands("host", cluster)
        except UserError as error:
            refusals.append(str(error))
    assert refusals and all("with consecutive numbers" in refusal for refusal in refusals)


@on_ranks(2, **SETS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"islands": 3}, "3 islands do not divide 2 ranks"),
        ({"islands": 0}, "islands is 0"),
        ({"islands": 1.5}, "islands is 1.5"),
        ({"islands": True}, "islands is True"),
        ({"islands": "hosts"}, "islands is 'hosts'"),
        ({"islands": 1, "strategy": "allreduce"}, "islands=1 has no effect with strategy='allreduce'"),
    ],
)
def test_islands_that_cannot_be_made_are_refused_on_every_rank(cluster, options, message):
    model = small_model()
    with pytest.raises(UserError) as refusal:
        distribute(Adam(model.parameters()), model, **{"strategy": "local", **options})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@on_ranks(2, **SETS)
def test_calls_that_concern_gradients_of_one_rank_are_refused(cluster):
    model = small_model()
    optimizer = local(model, islands=1)
    with pytest.raises(UserError, match="max_grad_norm"):
        optimizer.clip_grad_norm_(1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 6, dtype=torch.float64)).sum()).backward()
    with pytest.raises(RuntimeError, match="give the GradScaler"):
        scaler.step(optimizer)


@on_ranks(4, controller="mpi", **SETS)
def test_ranks_of_an_island_that_differ_end_it_in_the_first_such_update(cluster):
    model = small_model()
    optimizer = local(model, 10, islands=2)
    optimizer.param_groups[0]["lr"] = 0.02 if cluster.rank == 3 else 0.01
    if cluster.rank < 2:
        train(model, optimizer, cluster, 1)
    else:
        with pytest.raises(JobError, match=r"lr of parameter group 0: 0\.01 on rank 2, 0\.02 on rank 3"):
            train(model, optimizer, cluster, 1)
    cluster.barrier()


STALL = """
import time, torch
from hvd_adam import Adam, distribute, init
cluster = init(process_sets=True)
model = torch.nn.Linear(2, 2)
optimizer = distribute(Adam(model.parameters()), model, strategy="local", islands=1)
optimizer.step()
time.sleep(100 * cluster.rank)
optimizer.step()
"""


def test_a_rank_that_does_not_come_ends_the_job_in_bounded_time_under_mpi():
    """There Horovod itself looks for missing ranks, but only in collectives of all ranks."""
    environ = {"PYTHONPATH": str(ROOT), LIMIT: "3"}
    done = launch(["-c", STALL], 2, "mpi", env=environ, timeout=90)
    assert done.returncode != 0
    assert "a collective has not ended for 3 s: rank 1 on" in done.stderr


def test_the_command_groups_the_ranks_of_each_host_and_refuses_other_numbers(tmp_path):
    argv = "--max-steps 4 --model mlp --strategy local --local-steps 2 --compression int4 --output-dir".split()
    for islands, ranks, hosts in (("3", 2, ""), ("host", 4, "localhost:2,127.0.0.1:2")):
        command = ["-m", "hvd_adam.train", *argv, str(tmp_path / islands), "--islands", islands]
        done = launch(command, ranks, "gloo", hosts=hosts, env={"PYTHONPATH": str(ROOT)})
        assert (done.returncode == 0) == (islands == "host"), done.stderr
        if islands == "3":
            assert "hvd_adam.train: error: 3 islands do not divide 2 ranks" in done.stderr
    assert "4 rank(s) in 2 island(s) of 2 on cpu" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["host"]
