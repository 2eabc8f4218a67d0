"""Ranks with different numbers of batches: `optimizer.join()`, and what happens without it.

Hazards: ranks that have left while others wait; old states that are broadcast; hyper-parameters that a rank which
has left no longer sets; a mean over the wrong number of ranks; a rank that leaves in silence.
"""

from contextlib import nullcontext

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from helpers.exchanges import scattering
from helpers.on_ranks import launch, on_ranks
from helpers.small_training import batches, everything, largest_difference, same_everywhere, small_model
from helpers.strategies import each_strategy
from helpers.training_runs import ROOT

from hvd_adam import Adam, distribute
from hvd_adam.errors import JobError


def uneven(cluster, most=6):
    """Returns this rank's batches: rank 0 has the fewest."""
    count = most - (cluster.size - 1 - cluster.rank) * 2
    return [
        (x.chunk(cluster.size)[cluster.rank], y.chunk(cluster.size)[cluster.rank]) for x, y in batches(count, 12)
    ]


@on_ranks(1, 2, 3)
@each_strategy
@pytest.mark.parametrize("by_all", [True, False])
def test_ranks_that_have_left_take_part_until_all_have(cluster, strategy, by_all):
    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), lr=0.1, eps=1e-2), model, strategy=strategy)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with optimizer.join(divide_by_initial_world_size=by_all):
        for inputs, targets in uneven(cluster):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
    assert same_everywhere(everything(model, optimizer))

    reference = torch.optim.Adam(oracle.parameters(), lr=0.1, eps=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(reference, 0.9)
    for step, (x, y) in enumerate(batches(6, 12)):
        parts = list(zip(x.chunk(cluster.size), y.chunk(cluster.size), strict=True))
        active = [r for r in range(cluster.size) if step < 6 - (cluster.size - 1 - r) * 2]
        reference.zero_grad()
        for rank in active:
            divisor = cluster.size if by_all else len(active)
            (F.mse_loss(oracle(parts[rank][0]), parts[rank][1]) / divisor).backward()
        reference.step()
        scheduler.step()
    assert largest_difference(model, oracle) < 1e-12
    assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])

    for inputs, targets in batches(2, 12):  # after the block as before it
        optimizer.zero_grad()
        part = [tensor.chunk(cluster.size)[cluster.rank] for tensor in (inputs, targets)]
        F.mse_loss(model(part[0]), part[1]).backward()
        optimizer.step()
        reference.zero_grad()
        F.mse_loss(oracle(inputs), targets).backward()
        reference.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_clipping_accumulation_and_several_passes_work_in_the_block(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    with optimizer.join():
        for inputs, targets in uneven(cluster):
            optimizer.zero_grad()
            with optimizer.no_sync():
                F.mse_loss(model(inputs[:3]), targets[:3]).backward()
            F.mse_loss(model(inputs[3:]), targets[3:]).backward()
            model(inputs).abs().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.clip_grad_norm_(0.05)
            optimizer.step()
    assert same_everywhere(everything(model, optimizer))
    optimizer.zero_grad()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()  # after the block as before it
    optimizer.step()
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2, 3)
@each_strategy
@pytest.mark.parametrize("deferred", [False, True])
def test_a_second_round_of_reductions_has_the_mean_of_the_ranks_that_are_left(cluster, strategy, deferred):
    model = small_model()
    options = {"strategy": strategy, "defer_averaging": deferred, "bucket_mib": 1e-6}
    optimizer = distribute(Adam(model.parameters(), lr=0.0), model, **options)
    inputs = torch.full((2, 6), 1.0 + cluster.rank, dtype=torch.float64)
    with optimizer.join(divide_by_initial_world_size=False):
        for update in range(1 + cluster.rank):
            optimizer.zero_grad()
            model(inputs).sum().backward()
            model(inputs).sum().backward()  # after the buckets were sent
            optimizer.step()
            left = range(update, cluster.size)
            oracle = small_model()
            for rank in left:
                (2 / len(left) * oracle(torch.full((2, 6), 1.0 + rank, dtype=torch.float64)).sum()).backward()
            if strategy == "allreduce":
                for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
def test_micro_batches_work_in_the_block(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, accumulate=2, max_grad_norm=0.1)
    with optimizer.join(divide_by_initial_world_size=False):
        for inputs, targets in uneven(cluster):
            for part in (slice(3), slice(3, 6)):
                optimizer.zero_grad()
                F.mse_loss(model(inputs[part]), targets[part]).backward()
                optimizer.step()
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
def test_buffers_become_those_of_a_rank_that_went_farthest(cluster):
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3)).double()
    optimizer = distribute(Adam(model.parameters()), model)
    with optimizer.join():
        for inputs, _ in uneven(cluster):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    assert model[1].num_batches_tracked.item() == 6
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
def test_different_calls_in_the_block_end_the_job(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    expected = r"backward\(\) on rank 0, step\(\) on rank 1; call backward\(\) equally"
    with pytest.raises(JobError, match=expected), optimizer.join():
        for _ in range(2 - cluster.rank):
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()


@on_ranks(2)
def test_a_rank_that_calls_horovods_join_ends_the_job_of_the_others(cluster):
    model = small_model()
    _kept = distribute(Adam(model.parameters()), model)  # its hooks live as long as it does
    if cluster.rank == 0:
        hvd.join()
        return
    with pytest.raises(JobError, match=r"hvd\.join\(\) and is behind the others: use `with optimizer\.join\(\):`"):
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    hvd.join()


def test_the_remedy_is_named_where_horovods_join_crashes_its_rank():
    code = """
import horovod.torch as hvd, torch
from hvd_adam import Adam, distribute, init
cluster, model = init(), torch.nn.Linear(2, 2)
optimizer = distribute(Adam(model.parameters()), model, compression="bf16")
if cluster.rank == 0:
    model(torch.ones(1, 2)).sum().backward()
hvd.join()
"""
    done = launch(["-c", code], 2, "gloo", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert "use `with optimizer.join():` around the loop" in done.stderr


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("call", ["broadcast", "state_dict"])
def test_a_rank_that_leaves_early_for_another_call_of_the_optimizer_ends_the_job(cluster, strategy, call):
    if (strategy, call) == ("allreduce", "state_dict"):
        pytest.skip("concerns one rank only")
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    message = rf"this rank is in {call}\(\)" if cluster.rank == 0 else "something else that every rank must call"
    with pytest.raises(Exception, match=message):
        if cluster.rank == 0:
            getattr(optimizer, call)()
        else:
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()


@on_ranks(2)
@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize(
    "calls", ["broadcast state_dict", "step state_dict", "synchronize step", "clip_grad_norm_ step"]
)
def test_ranks_in_different_calls_that_reduce_no_gradients_fail_at_once(cluster, scatters, calls):
    first, second = calls.split()
    if first in ("synchronize", "clip_grad_norm_") and not scatters:
        pytest.skip("no collective where every rank has the whole gradients")
    model = small_model()
    with scattering() if scatters else nullcontext():
        optimizer = distribute(Adam(model.parameters()), model, strategy="sharded")
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        call = second if cluster.rank else first
        with pytest.raises(Exception, match=rf"this rank is in {call}\(\), .* is in another call"):
            getattr(optimizer, call)(*[1.0] * (call == "clip_grad_norm_"))


@pytest.mark.multirank
@pytest.mark.parametrize("controller", ["gloo", "mpi"])
@pytest.mark.parametrize("exchange", ["bf16", "scattered", "int8"])
def test_a_rank_that_leaves_early_ends_the_job_where_no_bucket_is_all_reduced(exchange, controller, tmp_path):
    """Horovod compares the collectives of one kind and name only: the others wait in an all-to-all here."""
    # mpirun ends the other rank as soon as one has failed. So each waits for the error of the other. Rank 0 ends
    # Horovod before: with int8 the other waits in a collective that rank 0 has not joined, until then.
    code = f"""
import pathlib, sys, time, torch
import horovod.torch as hvd
sys.path.insert(0, {str(ROOT / "tests")!r})
from contextlib import nullcontext
from helpers.exchanges import scattering
from horovod.common.exceptions import HorovodInternalError
from hvd_adam import Adam, distribute, init
cluster, exchange = init(), {exchange!r}
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 3))
compression = "none" if exchange == "scattered" else exchange
with scattering() if exchange == "scattered" else nullcontext():
    optimizer = distribute(Adam(model.parameters()), model, strategy="sharded", compression=compression)
    try:
        if cluster.rank == 0:
            optimizer.state_dict()
        else:
            model(torch.ones(2, 64)).sum().backward()
    except HorovodInternalError as error:
        folder = pathlib.Path({str(tmp_path)!r})
        (folder / str(cluster.rank)).write_text(str(error))
        hvd.shutdown()
        while sum(p.stat().st_size > 0 for p in folder.iterdir()) < 2:
            time.sleep(0.1)
        raise
"""
    done = launch(["-c", code], 2, controller, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert "this rank is in state_dict()" in (tmp_path / "0").read_text(), done.stderr
    assert "some ranks wait for gradients" in (tmp_path / "1").read_text(), done.stderr
