"""A loop that is right in one process is right on several ranks, or is refused in one sentence.

The loops themselves are in test_idioms.py. Hazards here: hooks that outlive their optimizer; hyper-parameters,
states and numbers of calls that part between ranks in silence; gradients that are cleared at the wrong time;
float16 norms; a loss scaler with two optimizers; passes that an exception ends.
"""

import copy
import gc
import io
import warnings

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import everything, largest_difference, same_everywhere, small_model, train
from helpers.strategies import each_strategy
from horovod.common.exceptions import HorovodInternalError

from hvd_adam import Adam, distribute
from hvd_adam.errors import JobError, UserError


def ones(rank=0):
    return torch.ones(2, 6, dtype=torch.float64) * (1 + rank)


def one_update(model, optimizer, cluster):
    optimizer.zero_grad()
    model(ones(cluster.rank)).square().sum().backward()
    optimizer.step()


# A second optimizer.


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("deleted", [False, True])
def test_a_second_distribute_of_the_same_parameters_retires_the_first(cluster, strategy, deleted):
    model, oracle = small_model(), small_model()
    for trainer, wrap in (
        (oracle, lambda adam: adam),
        (model, lambda adam: distribute(adam, model, strategy=strategy)),
    ):
        torch.manual_seed(0)
        trainer[0].bias.requires_grad_(False)
        first = wrap(Adam(trainer.parameters(), eps=1e-2))
        for _ in range(3):
            first.zero_grad()
            trainer(ones()).square().sum().backward()
            first.step()
        trainer[0].bias.requires_grad_(True)
        if deleted:
            del first
        second = wrap(Adam(trainer.parameters(), eps=1e-2))
        for _ in range(3):
            second.zero_grad()
            trainer(ones()).square().sum().backward()
            second.step()
    assert largest_difference(model, oracle) < 1e-12
    if not deleted:
        with pytest.raises(RuntimeError, match=r"must not step: distribute\(\) has been called again"):
            first.step()


@on_ranks(2)
def test_a_retired_optimizer_frees_its_state_and_leaves_one_hook_with_each_parameter(cluster):
    model = small_model()
    for _ in range(4):
        optimizer = distribute(Adam(model.parameters()), model)
        one_update(model, optimizer, cluster)
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o).__name__ == "GradientBuffer" and o.params[0] is model[0].weight]
    assert len(kept) == 1


@on_ranks(1, 2)
@pytest.mark.parametrize(
    "options", [{}, {"defer_averaging": True}, {"release_gradients": True, "skip_nonfinite": False}]
)
def test_the_optimizer_given_to_distribute_must_not_step_and_its_scheduler_continues(cluster, options):
    model = small_model()
    adam = Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1, gamma=0.5)
    optimizer = distribute(adam, model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_update(model, optimizer, cluster)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    with pytest.raises(RuntimeError, match=r"must not step: distribute\(\) has returned another optimizer"):
        adam.step()


# What parts between ranks.


@on_ranks(2, 3)
@each_strategy
def test_a_learning_rate_from_each_ranks_own_metric_ends_the_job(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), lr=0.1), model, strategy=strategy)
    one_update(model, optimizer, cluster)
    optimizer.param_groups[0]["lr"] = 0.1 if cluster.rank == 0 else 1e-4
    others = "rank 1" if cluster.size == 2 else "ranks 1, 2"
    expected = f"lr of parameter group 0: 0.1 on rank 0, 0.0001 on {others}; set hyper-parameters from values"
    with pytest.raises(JobError, match=expected):
        one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize(
    ("option", "value"),
    [("betas", (0.5, 0.9)), ("eps", 1e-3), ("weight_decay", 0.5), ("maximize", True), ("lr", torch.tensor(0.5))],
)
def test_every_hyper_parameter_is_compared(cluster, strategy, option, value):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), weight_decay=0.1), model, strategy=strategy)
    if cluster.rank == 1:
        optimizer.param_groups[0][option] = value
    with pytest.raises(JobError, match=rf"the ranks have parted: {option} of parameter group 0: .* on rank 0"):
        one_update(model, optimizer, cluster)


@on_ranks(2, "mpi")
def test_hyper_parameters_are_compared_with_adasum_too(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), lr=0.1), model, op="adasum")
    one_update(model, optimizer, cluster)
    optimizer.param_groups[0]["lr"] = 0.1 + cluster.rank
    with pytest.raises(JobError, match=r"lr of parameter group 0: 0\.1 on rank 0, 1\.1 on rank 1"):
        one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
def test_a_state_loaded_on_one_rank_alone_ends_the_job_unless_it_is_broadcast(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    train(model, optimizer, cluster)
    saved = optimizer.state_dict()
    train(model, optimizer, cluster)
    if cluster.rank == 0:
        optimizer.load_state_dict(saved)
    optimizer.broadcast()
    one_update(model, optimizer, cluster)
    assert same_everywhere(everything(model, optimizer))
    optimizer.zero_grad()
    if cluster.rank == 0:
        optimizer.load_state_dict(saved)
    with pytest.raises(
        (JobError, RuntimeError), match=r"load_state_dict .*call .*broadcast\(\)|loaded on rank 0 only"
    ):
        one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
def test_a_parameter_that_is_unfrozen_on_one_rank_only_ends_the_job(cluster, strategy):
    model = small_model()
    model[0].bias.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    one_update(model, optimizer, cluster)
    model[0].bias.requires_grad_(cluster.rank == 1)
    told = r"freeze and unfreeze on every rank|this rank is in a change of parameters or options \(freezing"
    with pytest.raises(HorovodInternalError, match=told):
        one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
def test_ranks_with_unequal_numbers_of_backward_passes_end_the_job(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    loss = model(ones()).square().sum()
    loss.backward(retain_graph=True)
    parted = r"updates since distribute\(\): 0 on rank 0, 1 on rank 1; .*join|some ranks wait for gradients"
    parted += r"|this rank is in step\(\)"
    with pytest.raises((JobError, HorovodInternalError), match=parted):
        if cluster.rank == 0:
            loss.backward()
        else:
            optimizer.step()
            one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
def test_a_pass_that_ends_with_an_exception_on_one_rank_is_named_by_all(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    one_update(model, optimizer, cluster)

    def fail(gradient):
        raise MemoryError("as an out-of-memory error in the pass")

    optimizer.zero_grad()
    outputs = model[1](model[0](ones()))
    if cluster.rank == 1:
        outputs.register_hook(fail)
    with pytest.raises(
        JobError, match=r"backward passes that ended with an exception: 0\S* on rank 0, 1\S* on rank 1"
    ):
        try:
            model[2](outputs).sum().backward()
        except MemoryError:
            one_update(model, optimizer, cluster)


@on_ranks(2)
@each_strategy
def test_a_pass_that_ends_with_an_exception_on_all_ranks_leaves_nothing_behind(cluster, strategy):
    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy)
    reference = Adam(oracle.parameters(), eps=1e-2)

    def fail(gradient):
        raise MemoryError("as an out-of-memory error in the pass")

    for trained, its in ((model, optimizer), (oracle, reference)):
        its.zero_grad()
        outputs = trained[1](trained[0](ones()))
        outputs.register_hook(fail)
        with pytest.raises(MemoryError):
            trained[2](outputs).sum().backward()
        for _ in range(2):
            its.zero_grad()
            trained(ones()).square().sum().backward()
            its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("failed", ["all ranks", "rank 0"])
def test_a_micro_batch_that_fails_makes_the_update_start_again_if_it_fails_on_all_ranks(cluster, strategy, failed):
    def fail(gradient):
        raise MemoryError("as an out-of-memory error in the pass")

    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy, accumulate=3)

    def update(failing):
        micro_batch = 0
        while micro_batch < 3:
            optimizer.zero_grad()
            outputs = model[1](model[0](ones(micro_batch)))
            if micro_batch == 1 and failing:
                outputs.register_hook(fail)
            try:
                model[2](outputs).square().sum().backward()
            except MemoryError:
                optimizer.zero_grad()
                assert model[2].weight.grad is None
                micro_batch, failing = 0, False
                continue
            optimizer.step()
            micro_batch += 1

    if failed == "rank 0" and cluster.size > 1:
        with pytest.raises(JobError, match=r"backward passes that ended with an exception: 1\S* on rank 0, 0"):
            update(failing=cluster.rank == 0)
        return
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    for _ in range(2):
        update(failing=True)
        reference.zero_grad()
        (sum(oracle(ones(number)).square().sum() for number in range(3)) / 3).backward()
        reference.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_parameters_that_the_model_does_not_have_are_refused(cluster, strategy):
    model, other = small_model(), small_model()
    with pytest.raises(UserError, match=r"parameter 0 of group 0, of shape \(8, 6\), is not one of the model's"):
        distribute(Adam(other.parameters()), model, strategy=strategy)


@on_ranks(2)
def test_another_optimizer_is_refused_by_its_full_name_with_the_remedy(cluster):
    model = small_model()
    with pytest.raises(TypeError, match=r"not a torch\.optim\.adam\.Adam: `from hvd_adam import Adam`"):
        distribute(torch.optim.Adam(model.parameters()), model)


# Gradients.


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clearing_gradients_between_micro_batches_is_refused(cluster, strategy, set_to_none):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, accumulate=4, strategy=strategy)
    for micro_batch in range(2):
        model.zero_grad(set_to_none=set_to_none)
        if micro_batch == 0:
            model(ones()).sum().backward()
            optimizer.step()
            continue
        with pytest.raises(
            RuntimeError, match=r"0\.weight was cleared after 1 of 4 micro-batches: call optimizer"
        ):
            model(ones()).sum().backward()


@on_ranks(1, 2)
@each_strategy
def test_float16_gradients_with_a_norm_above_65504_are_clipped_and_not_skipped(cluster, strategy):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(10**6, dtype=torch.float16))
    adam = Adam(model.parameters(), lr=1e-2, eps=1e-3, master_weights=True, implementation="foreach")
    optimizer = distribute(adam, model, max_grad_norm=1.0, strategy=strategy)
    for _ in range(3):
        optimizer.zero_grad()
        (model.w.float() * 100).sum().backward()
        optimizer.step()
    assert optimizer.skipped_updates == 0
    # A vector lane adds at most 2**15 squares in float32, each sum with an error of 2**-24; the root halves that.
    assert optimizer.grad_norm.item() == pytest.approx(1e5, rel=2**-10)
    optimizer.zero_grad()
    (model.w.float() * 100).sum().backward()
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(1e5, rel=2**-10)


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("order", ["both backward first", "one after the other"])
def test_a_loss_scaler_of_two_optimizers_unscales_each_by_the_scale_of_its_loss(cluster, strategy, order):
    def weights():
        return [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]

    models, oracles = weights(), weights()
    for scaler, pair in ((torch.amp.GradScaler("cpu"), models), (torch.amp.GradScaler("cpu"), oracles)):
        ours = pair is models
        optimizers = [
            distribute(Adam(m.parameters()), m, loss_scaler=scaler, strategy=strategy)
            if ours
            else torch.optim.Adam(m.parameters())
            for m in pair
        ]
        losses = [(m.weight * factor).sum() for m, factor in zip(pair, (float("inf"), 1.0), strict=True)]
        if order == "both backward first" or not ours:
            for loss in losses:
                scaler.scale(loss).backward()
            for optimizer in optimizers:
                optimizer.step() if ours else scaler.step(optimizer)
        else:
            for loss, optimizer in zip(losses, optimizers, strict=True):
                scaler.scale(loss).backward()
                optimizer.step()
        if not ours:
            scaler.update()
        moments = [
            optimizer.state_dict()["state"][0]["exp_avg"].flatten().tolist() for optimizer in optimizers[1:]
        ]
        assert moments == [pytest.approx([0.1, 0.1])]
        assert scaler.get_scale() == 2.0**15


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
@pytest.mark.parametrize("options", [{}, {"master_weights": True, "amsgrad": True}, {"stochastic_rounding": True}])
def test_the_default_device_of_the_process_does_not_matter(cluster, strategy, implementation, options):
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(6, 5).bfloat16(), torch.ones(3, 6).bfloat16()
    torch.set_default_device("meta")  # on which no value exists
    try:
        adam = Adam(model.parameters(), implementation=implementation, maximize=True, **options)
        optimizer = distribute(adam, model, strategy=strategy, max_grad_norm=0.1, accumulate=2)
        with optimizer.join():
            for _ in range(4):
                optimizer.zero_grad()
                model(inputs).sum().backward()
                optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.broadcast()
        optimizer.synchronize()
    finally:
        torch.set_default_device("cpu")
    assert optimizer.skipped_updates == 0
    assert not torch.equal(model.weight, torch.zeros(()))
    assert same_everywhere(everything(model, optimizer))


@on_ranks(1, 2)
@each_strategy
def test_a_part_of_the_model_is_saved_and_copied_at_its_own_size(cluster, strategy):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12)))
    optimizer = distribute(Adam(model.parameters(), implementation="fused"), model, strategy=strategy)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()

    def size(saved):
        file = io.BytesIO()
        torch.save(saved, file)
        return file.tell()

    part = torch.nn.Linear(64, 64)
    slack = 64 * 3  # the storages' names in the archive are longer, and records are padded to 64 bytes
    assert size(model[10].state_dict()) <= size(part.state_dict()) + slack
    assert size(model[10].weight) <= size(part.weight) + slack
    assert size(model[10].weight.grad) <= size(part.weight.detach()) + slack
    assert size(copy.deepcopy(model[10]).state_dict()) <= size(part.state_dict()) + slack
    assert size(optimizer.state_dict()["state"][20]) <= 3 * size(part.weight.detach())
    model[10].state_dict()["weight"].fill_(3.0)  # still the parameter's memory
    assert torch.all(model[10].weight == 3.0)
    optimizer.zero_grad()
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert not torch.any(model[10].weight == 3.0)


@on_ranks(2)
def test_an_adam_whose_state_is_sharded_is_refused_by_another_distribute(cluster):
    model = small_model()
    adam = Adam(model.parameters())
    first = distribute(adam, model, strategy="sharded")
    one_update(model, first, cluster)
    saved = first.state_dict()
    with pytest.raises(UserError, match=r"sharded by an earlier distribute\(\): save state_dict"):
        distribute(adam, model)
    again = Adam(model.parameters())
    again.load_state_dict(saved)
    second = distribute(again, model)
    one_update(model, second, cluster)
    assert second.state[model[0].weight]["step"].item() == 2
    assert same_everywhere(everything(model, second))


@on_ranks(2)
def test_an_adam_may_be_distributed_again_with_its_state(cluster):
    model = small_model()
    adam = Adam(model.parameters())
    one_update(model, distribute(adam, model), cluster)
    second = distribute(adam, model)
    one_update(model, second, cluster)
    assert second.state[model[0].weight]["step"].item() == 2
    assert same_everywhere(everything(model, second))


@on_ranks(2, 3)
@each_strategy
def test_optimizers_that_share_a_pass_may_meet_it_in_another_order_on_each_rank(cluster, strategy):
    models, oracles = ([small_model(seed=seed) for seed in range(2)] for _ in range(2))
    optimizers = [distribute(Adam(m.parameters(), eps=1e-2), m, strategy=strategy) for m in models]
    references = [torch.optim.Adam(m.parameters(), eps=1e-2) for m in oracles]
    for step in range(3):
        for trained, its in ((models, optimizers), (oracles, references)):
            for optimizer in its:
                optimizer.zero_grad()
            # Backward visits the part that was computed last first.
            order = (0, 1) if (cluster.rank + step) % 2 else (1, 0)
            sum(trained[i](ones()).square().sum() for i in order).backward()
            for optimizer in its:
                optimizer.step()
    for model, oracle in zip(models, oracles, strict=True):
        assert largest_difference(model, oracle) < 1e-12


@on_ranks(1, 2)
@each_strategy
def test_gradients_that_carry_the_loss_scale_must_not_be_changed_before_they_are_unscaled(cluster, strategy):
    def started():
        model, scaler = small_model(), torch.amp.GradScaler("cpu")
        optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, loss_scaler=scaler, strategy=strategy)
        scaler.scale(model(ones()).square().sum()).backward()
        return model, scaler, optimizer

    model, _, optimizer = started()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"was changed .* by the loss scale: call optimizer.synchronize"):
        optimizer.step()

    oracle = small_model()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    oracle(ones()).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.1)
    reference.step()
    ways = {
        "GradScaler.unscale_": lambda scaler, optimizer: scaler.unscale_(optimizer),
        "synchronize": lambda scaler, optimizer: optimizer.synchronize(),
    }
    for way, unscale in ways.items():
        model, scaler, optimizer = started()
        unscale(scaler, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert largest_difference(model, oracle) < 1e-12, way
        assert optimizer.skipped_updates == 0


@on_ranks(1, 2)
@each_strategy
def test_a_gradscaler_that_steps_after_each_micro_batch_is_refused(cluster, strategy):
    model, scaler = small_model(), torch.amp.GradScaler("cpu")
    optimizer = distribute(Adam(model.parameters()), model, accumulate=2, strategy=strategy)
    scaler.scale(model(ones()).sum()).backward()
    with pytest.raises(RuntimeError, match=r"give the GradScaler to distribute\(loss_scaler=…\)"):
        scaler.step(optimizer)


@on_ranks(2)
def test_a_state_that_is_not_sharded_may_be_saved_on_one_rank(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model)
    one_update(model, optimizer, cluster)
    if cluster.rank == 0:
        assert len(optimizer.state_dict()["state"]) == 4
    one_update(model, optimizer, cluster)
    assert same_everywhere(everything(model, optimizer))
