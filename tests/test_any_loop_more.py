"""More loops of the kind of test_any_loop.py: what hooks, passes and several optimizers meet in long scripts."""

import contextlib
import gc
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.exchanges import scattering
from helpers.on_ranks import on_ranks
from helpers.small_training import batches, digest, largest_difference, same_everywhere, share, small_model
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute

each_exchange = pytest.mark.parametrize("exchange", ["allreduce", "sharded", "scattered"])


@contextlib.contextmanager
def distributed(parameters, model, exchange="allreduce", adam=None, **options):
    strategy = "allreduce" if exchange == "allreduce" else "sharded"
    with scattering() if exchange == "scattered" else contextlib.nullcontext():
        yield distribute(Adam(parameters, eps=1e-2, **adam or {}), model, strategy=strategy, **options)


def backward(model, batch):
    loss = F.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    return loss


# Hooks.


@on_ranks(1, 2)
@each_strategy
def test_gradients_of_layers_trained_in_turn_are_the_mean_after_backward(cluster, strategy):
    model, oracle = small_model(), small_model()
    model[2].requires_grad_(False)
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    with distributed(model.parameters(), model, strategy) as optimizer:
        for number, batch in enumerate(batches(4, 12)):
            for trained, its, part in (
                (model, optimizer, share(batch, cluster)[0]),
                (oracle, reference, batch),
            ):
                trained[0].requires_grad_(number % 2 == 1)
                trained[2].requires_grad_(number % 2 == 0)
                its.zero_grad()
                backward(trained, part)
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.05)
                its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_gradients_are_the_mean_after_the_model_has_changed_its_dtype(cluster, strategy):
    model = small_model(torch.float32)
    with distributed(model.parameters(), model, strategy) as optimizer:
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.full((2, 6), 1.0 + cluster.rank, dtype=dtype)).square().sum().backward()
                assert same_everywhere(digest([p.grad for p in model.parameters()]))
                optimizer.step()


@on_ranks(1, 2)
@each_strategy
def test_an_optimizer_that_is_not_needed_any_more_frees_its_memory(cluster, strategy):
    model = small_model()
    with distributed(model.parameters(), model, strategy) as optimizer:
        backward(model, next(batches(1, 12)))
        optimizer.step()
        kept = [weakref.ref(optimizer), *map(weakref.ref, optimizer._layout.buffers)]
    del optimizer
    gc.collect()
    assert [reference() for reference in kept if reference() is not None] == []


@on_ranks(2)
@each_strategy
def test_more_buckets_than_horovod_remembers_by_default_are_averaged(cluster, strategy):
    parameters = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(1100))  # more than 1024
    with distributed(parameters, parameters, strategy, bucket_mib=8 / 2**20) as optimizer:
        for _ in range(3):
            optimizer.zero_grad()
            (torch.cat(list(parameters)) * (1 + cluster.rank)).sum().backward()
            assert all(p.grad.tolist() == [1.5, 1.5] for p in parameters)
            optimizer.step()


def calls_of(function):
    """Returns how many functions, Python's and others, a call makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@on_ranks(2)
def test_backward_of_many_small_parameters_makes_calls_in_proportion_to_their_number(cluster):
    calls = []
    for count in (200, 1600):
        parameters = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(count))
        with distributed(parameters, parameters):
            for _ in range(2):
                loss = torch.cat(list(parameters)).square().sum()
                made = calls_of(loss.backward)
            calls.append(made)
    assert calls[0] > 200
    assert calls[1] < 10 * calls[0]


@on_ranks(2)
@each_strategy
def test_a_step_inside_backward_is_refused(cluster, strategy):
    model = small_model()
    with distributed(model.parameters(), model, strategy) as optimizer:
        model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
        with pytest.raises(RuntimeError, match=r"step\(\) inside backward\(\).*: call it after backward"):
            backward(model, next(batches(1, 12)))


# Passes and steps.


@on_ranks(2, "mpi")
@each_exchange
def test_a_pass_that_an_exception_ends_leaves_nothing_behind_if_the_model_clears_gradients(cluster, exchange):
    def fail(gradient):
        raise MemoryError("as an out-of-memory error in the pass")

    model, oracle = small_model(), small_model()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    with distributed(model.parameters(), model, exchange, bucket_mib=200 / 2**20) as optimizer:
        for batch in batches(3, 12):
            model.zero_grad()
            outputs = model[1](model[0](torch.ones(2, 6, dtype=torch.float64)))
            outputs.register_hook(fail)
            with pytest.raises(MemoryError):
                model[2](outputs).sum().backward()
            for trained, its, part in (
                (model, optimizer, share(batch, cluster)[0]),
                (oracle, reference, batch),
            ):
                trained.zero_grad()
                backward(trained, part)
                its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
@each_exchange
def test_two_steps_after_one_backward_use_the_same_gradient(cluster, exchange):
    model, oracle = small_model(), small_model()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    with distributed(model.parameters(), model, exchange) as optimizer:
        for batch in batches(3, 12):
            for trained, its, part in (
                (model, optimizer, share(batch, cluster)[0]),
                (oracle, reference, batch),
            ):
                its.zero_grad()
                backward(trained, part)
                its.step()
                its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
@each_exchange
def test_a_step_in_inference_mode_is_a_step(cluster, exchange):
    model, oracle = small_model(), small_model()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    with distributed(model.parameters(), model, exchange) as optimizer:
        for batch in batches(3, 12):
            for trained, its, part in (
                (model, optimizer, share(batch, cluster)[0]),
                (oracle, reference, batch),
            ):
                its.zero_grad()
                backward(trained, part)
                with torch.inference_mode():
                    its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
@each_exchange
def test_gradients_of_one_rank_alone_are_not_added_between_backward_and_step(cluster, exchange):
    model = small_model()
    with distributed(model[0].parameters(), model, exchange) as optimizer:
        batch = share(next(batches(1, 12)), cluster)[0]
        backward(model, batch)
        with pytest.raises(RuntimeError, match=r"have gradients of this rank alone; call it before backward"):
            optimizer.add_param_group({"params": model[2].parameters()})
        optimizer.step()
        optimizer.add_param_group({"params": model[2].parameters()})
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(1, 2)
@each_strategy
def test_a_gradscaler_that_would_unscale_each_micro_batch_is_refused(cluster, strategy):
    model, scaler = small_model(), torch.amp.GradScaler("cpu")
    with distributed(model.parameters(), model, strategy, accumulate=2) as optimizer:
        scaler.scale(model(torch.ones(1, 6, dtype=torch.float64)).sum()).backward()
        with pytest.raises(RuntimeError, match="give the GradScaler to distribute"):
            scaler.step(optimizer)


# Several optimizers, and ranks that leave early.


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("case", ["other order", "unused on one rank"])
def test_two_optimizers_in_one_pass_do_not_wait_for_each_other(cluster, strategy, case):
    if strategy == "sharded" and case == "unused on one rank":
        pytest.skip("still hangs: step() of the one exchanges shards, while others wait for the other's gradients")
    models, oracles = [small_model(seed=i) for i in range(2)], [small_model(seed=i) for i in range(2)]
    references = [torch.optim.Adam(oracle.parameters(), eps=1e-2) for oracle in oracles]
    weights = [1.0, 0.5 if case == "unused on one rank" else 1.0]  # of the means over the ranks
    with contextlib.ExitStack() as stack:
        optimizers = [stack.enter_context(distributed(m.parameters(), m, strategy)) for m in models]
        for inputs, targets in batches(3, 6):
            for number, (trained, its) in enumerate(((models, optimizers), (oracles, references))):
                for optimizer in its:
                    optimizer.zero_grad()
                used = trained[:: -1 if cluster.rank and not number else 1]
                if case == "unused on one rank" and cluster.rank and not number:
                    used = trained[:1]
                losses = [
                    F.mse_loss(m(inputs), targets) * (weights[trained.index(m)] if number else 1) for m in used
                ]
                sum(losses).backward()
                for optimizer in its:
                    optimizer.step()
    for model, oracle in zip(models, oracles, strict=True):
        assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
@pytest.mark.parametrize("deferred", [False, True])
def test_a_second_distribute_does_not_lose_gradients_of_the_first(cluster, deferred):
    model = small_model()
    with distributed(model.parameters(), model, "scattered", defer_averaging=deferred) as first:
        backward(model, share(next(batches(1, 12)), cluster)[0])
        with pytest.raises(RuntimeError, match=r"distribute\(\) between backward\(\) and step\(\)"):
            distribute(Adam(model.parameters()), model)
        first.step()
        first.zero_grad()
        second = distribute(Adam(model.parameters()), model)
        backward(model, share(next(batches(1, 12)), cluster)[0])
        second.step()
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2, "mpi")
@each_exchange
def test_after_a_join_gradients_are_divided_by_all_ranks_again(cluster, exchange):
    model, oracle = small_model(), small_model()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    alone, *others = batches(3, 12)
    with distributed(model.parameters(), model, exchange) as optimizer:
        with optimizer.join(divide_by_initial_world_size=False):
            if cluster.rank == 0:
                backward(model, alone)
                optimizer.step()
        backward(oracle, alone)
        reference.step()
        for batch in others:
            for trained, its, part in (
                (model, optimizer, share(batch, cluster)[0]),
                (oracle, reference, batch),
            ):
                its.zero_grad()
                loss = F.mse_loss(trained(part[0]), part[1])
                for p, gradient in zip(
                    trained.parameters(), torch.autograd.grad(loss, [*trained.parameters()]), strict=True
                ):
                    p.grad = gradient
                its.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
@each_exchange
def test_a_rank_without_a_batch_has_the_loss_scale_of_the_others(cluster, exchange):
    model, scaler = small_model(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    with distributed(model.parameters(), model, exchange, loss_scaler=scaler) as optimizer, optimizer.join():
        for batch in batches(3, 12) if cluster.rank else ():
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(batch[0]), batch[1])).backward()
            optimizer.step()
    assert scaler.get_scale() == 8.0
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
def test_other_optimizers_in_the_block_of_a_join_are_refused(cluster):
    model, other = small_model(), small_model()
    with distributed(model.parameters(), model) as optimizer, distributed(other.parameters(), other) as second:
        refusal = r"train with no other optimizer"
        for join in (optimizer.join, second.join):
            with pytest.raises(RuntimeError, match=refusal), optimizer.join(), join():
                pass
        with pytest.raises(RuntimeError, match=refusal), optimizer.join():
            backward(other, next(batches(1, 12)))
        second.zero_grad()
        backward(other, next(batches(1, 12)))


@on_ranks(2)
@each_strategy
def test_gradients_that_no_optimizer_averages_are_reported_once(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model[2].parameters()), model, strategy=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
            optimizer.step()
    messages = [str(warning.message) for warning in caught if "no distributed optimizer" in str(warning.message)]
    assert len(messages) == (cluster.rank == 0)
    assert all(message.startswith("hvd_adam: 0.weight and 1 more of the model") for message in messages)
