"""Local steps between rare meetings: what islands agree on, and what each of them keeps for itself.

Hazards: outer weights that differ in a bit between ranks; a round that is lost or counted twice by a resume; an
infinite weight of one island in the weights of all; residuals of codes that stay in a dropped round; local weights
in an evaluation or a checkpoint; a parameter that no meeting averages; options that are accepted without effect.
"""

import copy
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.local_training import local, oracle, resumed, save, step, train, wide_model
from helpers.on_ranks import on_ranks
from helpers.small_training import batches, digest, same_everywhere, share, small_model

from hvd_adam import Adam, CheckpointManager, distribute
from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.context import horovod
from hvd_adam.errors import JobError, UserError
from hvd_adam.recovery.preemption import Preemption
from hvd_adam.training.builders import scale_for_ranks


def rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum):
    model = small_model()
    optimizer = local(model, local_steps, outer_lr=lr, outer_momentum=momentum)
    train(model, optimizer, cluster, 6)
    expected = oracle(cluster.size, 6, local_steps, lr, momentum)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    assert same_everywhere(digest(model.state_dict()))


EACH_FORM = pytest.mark.parametrize(
    ("local_steps", "lr", "momentum"), [(1, 1.0, 0.0), (3, 0.7, 0.9), (2, 1.0, 0.5)]
)


@on_ranks(2, 3)
@EACH_FORM
def test_rounds_are_adam_on_each_island_and_nesterov_sgd_on_their_mean(cluster, local_steps, lr, momentum):
    rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum)


@on_ranks(2, controller="mpi")
@EACH_FORM
def test_rounds_agree_with_the_oracle_under_mpi(cluster, local_steps, lr, momentum):
    rounds_agree_with_the_oracle(cluster, local_steps, lr, momentum)


@on_ranks(0)
def test_one_rank_is_one_island(cluster):
    rounds_agree_with_the_oracle(cluster, 3, 0.7, 0.9)


EACH_COMPRESSION = pytest.mark.parametrize("compression", ["none", "int8", "int4"])


@on_ranks(2, 3)
@EACH_COMPRESSION
def test_outer_weights_have_the_same_bits_on_all_ranks_and_local_ones_do_not(cluster, compression):
    model = wide_model()
    optimizer = local(model, compression=compression)
    for steps in range(1, 8):
        train(model, optimizer, cluster, steps, skip=steps - 1)
        with optimizer.outer_weights():
            assert same_everywhere(digest(model.state_dict()))
        assert same_everywhere(digest([*model.parameters()])) == (steps % 3 == 0)
    optimizer.meet()
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
def test_what_codes_miss_of_a_round_is_sent_in_the_next(cluster):
    """The sum of what was applied and of the residuals is the sum of the differences, up to float32."""
    model, seen = wide_model(), []
    optimizer = local(model, 2, compression="int4", outer_lr=1.0, outer_momentum=0.0)
    coded = [0, 3]  # the matrices
    start = [model[i].weight.detach().clone() for i in coded]
    average = optimizer._mean.average
    optimizer._mean.average = lambda vector: (seen.append(vector.clone()), average(vector))
    train(model, optimizer, cluster, 8)
    total = cluster.sum(sum(seen)[: optimizer._mean._coded]) / cluster.size
    moved = torch.cat([(a - model[i].weight).detach().reshape(-1) for a, i in zip(start, coded, strict=True)])
    unsent = optimizer._mean.unsent(cluster.gather(optimizer._mean.state()))
    assert unsent.abs().max() > 0
    torch.testing.assert_close(moved + unsent, total.float(), rtol=0, atol=1e-5)


@on_ranks(2)
def test_buffers_are_averaged_and_constant_ones_keep_their_bits(cluster):
    model = wide_model()
    model.register_buffer("mask", torch.tensor([-torch.inf, 0.1, 3.0]))
    mask = model.mask.clone()
    optimizer = local(model, 2, outer_lr=1.0)
    own = []
    model[1].register_forward_hook(lambda layer, *_: own.append(layer.running_mean.clone()))
    train(model, optimizer, cluster, 2)
    torch.testing.assert_close(model[1].running_mean.double(), cluster.mean(own[-1]))
    assert torch.equal(model.mask, mask) and model[1].num_batches_tracked == 2


@on_ranks(2)
def test_buffers_that_the_model_replaces_are_averaged_and_saved(cluster):
    model = wide_model()
    optimizer = local(model, 2, outer_lr=1.0)
    model.register_buffer("added", torch.zeros(1))
    model[1].double()  # makes other buffers
    model[1].running_mean = torch.full_like(model[1].running_mean, float(cluster.rank))
    model.added = torch.full((1,), 2.0 * cluster.rank)
    train(model.double(), optimizer, cluster, 0)
    optimizer._buffers.average()
    assert model.added.item() == 1.0 and model[1].running_mean.eq(0.5).all()
    with optimizer.outer_weights():
        assert model.added.item() == 1.0
    saved = optimizer.islands_on_root()
    assert not cluster.is_root or saved["islands"][0]["buffers"]["added"].item() == 1.0


@on_ranks(2)
def test_micro_batches_that_failed_or_were_cleared_are_refused(cluster):
    model, inputs = small_model(), torch.ones(2, 6, dtype=torch.float64)
    optimizer = local(model, 2, accumulate=2)
    for after_clearing in (False, True):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()  # nothing: between two micro-batches
        model(inputs).sum().backward()
        if after_clearing:
            model.zero_grad()
            with pytest.raises(RuntimeError, match="was cleared after 1 of 2 micro-batches"):
                optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=r"changed after 1 of 2 .* by a backward pass without step\(\)"):
                optimizer.zero_grad()
            optimizer.step()


@on_ranks(0)
def test_micro_batches_whose_gradients_are_zero_are_not_taken_for_cleared(cluster):
    model, inputs = small_model(), torch.zeros(2, 6, dtype=torch.float64)  # the first weight's gradient is zero
    optimizer = local(model, 2, accumulate=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()
    assert not model[0].weight.grad.any()


# Updates that are not finite.


@on_ranks(2)
def test_an_island_skips_its_own_update_alone(cluster):
    model = small_model()
    optimizer = local(model, 2)
    for number, batch in enumerate(batches(4, 16)):
        inputs, targets = share(batch, cluster)[0]
        step(model, optimizer, inputs * (torch.nan if number == 0 and cluster.rank == 1 else 1), targets)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {3.0 if cluster.rank == 1 else 4.0}
    assert optimizer.skipped_updates == 1 and optimizer.skipped_in_a_row == 0
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@EACH_COMPRESSION
def test_a_difference_that_is_not_finite_drops_the_round_on_all_islands(cluster, compression):
    model = wide_model()
    optimizer = local(model, 2, compression=compression)
    train(model, optimizer, cluster, 2)
    before = digest(model.state_dict(), optimizer._mean.state(), optimizer._outer.momentum)
    train(model, optimizer, cluster, 3, skip=2)
    if cluster.rank == 1:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.inf
    optimizer.meet()
    assert optimizer.dropped_rounds == 1
    assert digest(model.state_dict(), optimizer._mean.state(), optimizer._outer.momentum) == before
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0 if cluster.rank == 1 else 3.0}
    train(model, optimizer, cluster, 6)
    assert all(p.isfinite().all() for p in model.parameters())


@on_ranks(2)
def test_clipping_accumulation_and_loss_scale_are_those_of_the_island(cluster):
    model, alone = small_model(torch.float32), small_model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = local(model, 10, accumulate=2, max_grad_norm=0.1, loss_scaler=scaler)
    adam = torch.optim.Adam(alone.parameters(), lr=0.01)
    for batch in batches(3, 16, torch.float32):
        parts = share(batch, cluster, 2)
        for inputs, targets in parts:
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(inputs), targets)).backward()
            optimizer.step()
        adam.zero_grad()
        (sum(F.mse_loss(alone(inputs), targets) for inputs, targets in parts) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        assert optimizer.finite_grad_norm() == pytest.approx(float(norm), rel=1e-5)
        adam.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# Resuming.


@on_ranks(2, 3)
@pytest.mark.parametrize("compression", ["none", "int4"])
def test_a_resume_within_a_round_is_exact(cluster, compression):
    model = wide_model()
    optimizer = local(model, 3, compression=compression)
    train(model, optimizer, cluster, 5)
    again, resumed_optimizer = resumed(cluster, *save(model, optimizer), compression=compression)
    for m, o in ((model, optimizer), (again, resumed_optimizer)):
        train(m, o, cluster, 10, skip=5)
    state = [
        digest(o.held_state_dict()["state"], o._mean.state(), o._outer.momentum)
        for o in (optimizer, resumed_optimizer)
    ]
    assert digest(model.state_dict()) == digest(again.state_dict()) and state[0] == state[1]


@on_ranks(2)
def test_another_number_of_islands_begins_a_round_at_the_outer_weights(cluster):
    """The checkpoint is of three islands: rank 0 makes it of the two that there are."""
    model = wide_model()
    optimizer = local(model, 3, compression="int4")
    train(model, optimizer, cluster, 5)
    saved, weights = save(model, optimizer)
    if cluster.is_root:
        third = copy.deepcopy(saved["islands"][0])
        parts = torch.stack([island["residuals"]["worker"] for island in saved["islands"]])
        saved["islands"].append(third)
        for island in saved["islands"]:
            island["residuals"] = {"worker": parts[0, :576].clone(), "server": torch.zeros(192)}
        expected = 3 * parts[0, :576] / cluster.size
    again, resumed_optimizer = resumed(cluster, saved, weights, compression="int4")
    assert digest(again.state_dict()) == digest(weights)
    assert same_everywhere(digest(resumed_optimizer._outer.momentum))
    if cluster.is_root:
        torch.testing.assert_close(resumed_optimizer._mean.state()["worker"][:576], expected)
    for number, own in enumerate(resumed_optimizer.held_state_dict()["state"].values()):
        if cluster.is_root:
            island = saved["islands"][0]["optimizer"]["state"][number]
            assert torch.equal(own["exp_avg"], island["exp_avg"])
    train(again, resumed_optimizer, cluster, 3)
    assert same_everywhere(digest(again.state_dict()))


# The learning rate.


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_islands_move_by_as_much_more_as_the_noise_of_one_rank_makes_adam_move_them_less(rule):
    """Where gradients are noise, √v of one rank is √N times that of the mean: lr·m/(√v + ε) stays what it was."""
    config = parse(TrainConfig, "hvd_adam.train", ["--lr-scaling", rule, "--accumulate", "2"])
    islands = parse(
        TrainConfig, "hvd_adam.train", ["--strategy", "local", "--lr-scaling", rule, "--accumulate", "2"]
    )
    cluster = SimpleNamespace(size=4)
    averaged, own = scale_for_ranks(config, cluster), scale_for_ranks(islands, cluster)
    root_v = 1e-8
    assert own.betas == averaged.betas
    assert own.lr / (2 * root_v + own.eps) == pytest.approx(averaged.lr / (root_v + averaged.eps))


@pytest.mark.parametrize("rule", ["none", "halflife"])
def test_a_learning_rate_that_no_rule_scales_is_that_of_the_islands(rule):
    config = parse(TrainConfig, "hvd_adam.train", ["--strategy", "local", "--lr-scaling", rule, "--lr", "0.003"])
    assert scale_for_ranks(config, SimpleNamespace(size=4)).lr == 0.003


# What is refused.

REFUSED = [
    ({"local_steps": 0}, "local_steps is 0"),
    ({"local_steps": 2.5}, "local_steps is 2.5"),
    ({"local_steps": True}, "local_steps is True"),
    ({"outer_lr": 0.0}, "outer_lr is 0.0"),
    ({"outer_momentum": 1.0}, "outer_momentum is 1.0"),
    ({"outer_momentum": False}, "outer_momentum is False"),
    ({"compression": "bf16"}, "has no bf16 compression"),
    ({"compression": "auto"}, "has no auto compression"),
    ({"op": "adasum"}, "adasum combines updates"),
    ({"defer_averaging": True}, "defer_averaging has no effect"),
    ({"noise_scale": 5, "accumulate": 2}, "noise_scale compares gradients with their mean"),
    ({"strategy": "allreduce", "local_steps": 7}, "local_steps=7 has no effect with strategy='allreduce'"),
    ({"strategy": "sharded", "outer_lr": 0.5}, "outer_lr=0.5 has no effect with strategy='sharded'"),
]


@on_ranks(0)
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_islands_cannot_honour_are_refused(cluster, options, message):
    model = small_model()
    with pytest.raises(UserError) as refusal:
        distribute(Adam(model.parameters()), model, **{"strategy": "local", **options})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--local-steps 0", "local-steps"),
        ("--outer-lr 0", "outer-lr"),
        ("--outer-momentum 1", "outer-momentum"),
        ("--compression auto", "--strategy local has no auto compression"),
        ("--op adasum", "--op adasum combines"),
        ("--elastic --islands 2", "--islands cannot be used with --elastic"),
        ("--ema 0.9", "--ema cannot be used with --strategy local"),
        ("--model resnet18 --sync-batchnorm", "--sync-batchnorm cannot be used with --strategy local"),
        ("--noise-scale 5", "--noise-scale cannot be used with --strategy local"),
        ("--check-consistency-every 5", "--check-consistency-every cannot be used with --strategy local"),
    ],
)
def test_the_command_refuses_what_islands_cannot_honour(argv, message):
    with pytest.raises(UserError) as refusal:
        parse(TrainConfig, "hvd_adam.train", ["--strategy", "local", *argv.split()])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@on_ranks(0)
def test_calls_that_average_gradients_are_refused(cluster):
    model = small_model()
    optimizer = local(model)
    for call in (optimizer.no_sync, optimizer.join, optimizer.synchronize):
        with pytest.raises(UserError, match="strategy='local'"):
            call()
    with pytest.raises(UserError, match="add_param_group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with tempfile.TemporaryDirectory() as folder, pytest.raises(UserError, match="islands_on_root"):
        CheckpointManager(cluster, folder).save(1, optimizer=optimizer)


@on_ranks(0)
def test_half_precision_parameters_and_unfrozen_ones_are_refused(cluster):
    with pytest.raises(UserError, match=r"not torch\.bfloat16"):
        local(small_model(torch.bfloat16))
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = local(model)
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="was frozen"):
        train(model, optimizer, cluster, 1)


@on_ranks(2)
def test_hyper_parameters_that_differ_end_the_job_on_all_ranks(cluster):
    model = small_model()
    optimizer = local(model, 2)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + cluster.rank)
    with pytest.raises(JobError, match="different hyper-parameters: rank 1"):
        train(model, optimizer, cluster, 2)


@on_ranks(2)
@pytest.mark.parametrize(
    ("most", "late_from", "questions"),
    [
        (1, 31, [*range(31)]),
        (8, 31, [0, 1, 2, 4, 8, 16, 24, 32]),
        (8, 0, [*range(31)]),
        (8, 9, [0, 1, 2, 4, 8, 16, 24, 28, 30]),
    ],
)
def test_all_ranks_are_notified_after_the_same_update_also_where_they_ask_rarely(
    cluster, most, late_from, questions
):
    updates, asked = 0, []
    events = lambda: cluster.rank == 1 and updates >= 30  # noqa: E731
    preemption = Preemption(cluster, hosts_changed=events, most_updates=most)
    while not preemption.regroup:
        if preemption._request is None:
            asked.append(updates)
        preemption.ask()
        updates += 1
        is_late = cluster.rank == 1 and updates > late_from
        with pytest.MonkeyPatch.context() as patch:  # rank 0 waits for each answer, whatever the machine's speed
            patch.setattr(horovod(), "poll", lambda request: cluster.rank == 1)
            patch.setattr("hvd_adam.recovery.preemption.SECONDS_PER_ANSWER", 0.0 if is_late else math.inf)
            preemption.should_stop()
    assert cluster.gather((updates, asked)) == [(updates, asked)] * 2
    assert asked == questions


@on_ranks(2)
def test_islands_without_process_sets_are_refused_with_the_remedy(cluster):
    with pytest.raises(UserError, match=r"init\(process_sets=True\)"):
        local(small_model(), islands=1)


@on_ranks(0)
def test_a_step_of_the_users_class_and_its_hooks_run_once(cluster):
    class Counting(Adam):
        calls = 0

        def step(self, closure=None):
            type(self).calls += 1
            return super().step(closure)

    model, hooks = small_model(), []
    adam = Counting(model.parameters())
    adam.register_step_post_hook(lambda *_: hooks.append(1))
    optimizer = distribute(adam, model, strategy="local", local_steps=2)
    train(model, optimizer, cluster, 3)
    assert Counting.calls == 3 and len(hooks) == 3
    with pytest.raises(RuntimeError, match="must not step"):
        adam.step()
