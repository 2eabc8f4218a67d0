"""`defer_averaging`, and the scattered gradients of the sharded strategy: gradients that are not the mean yet.

Hazards: a gradient that is clipped or changed while its reduction is in flight, which stock Horovod uses or not,
by chance; a norm of one shard that is taken for that of all.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers.exchanges import scattering
from helpers.on_ranks import on_ranks
from helpers.small_training import (
    batches,
    everything,
    largest_difference,
    same_everywhere,
    share,
    small_model,
    train,
    train_alone,
)
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute

clip = torch.nn.utils.clip_grad_norm_


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_deferred_loop_makes_the_update_of_one_process(cluster, strategy, accumulate):
    model, oracle = small_model(), small_model()
    optimizer = distribute(
        Adam(model.parameters(), lr=1e-2),
        model,
        strategy=strategy,
        accumulate=accumulate,
        max_grad_norm=0.1,
        defer_averaging=True,
    )
    train(model, optimizer, cluster, micro_batches=accumulate)
    train_alone(oracle, clip=0.1, lr=1e-2)
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_two_losses_of_a_deferred_loop_make_the_update_of_one_process(cluster, strategy):
    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy, defer_averaging=True)
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    for batch in batches(3, 12):
        for trained, its, inputs in (
            (model, optimizer, share(batch, cluster)[0][0]),
            (oracle, reference, batch[0]),
        ):
            its.zero_grad()
            trained(inputs).square().mean().backward()
            trained(inputs).abs().mean().backward()
            its.step()
    assert largest_difference(model, oracle) < 1e-12


def changes():
    return {
        "clip": lambda model: clip(model.parameters(), 0.1),
        "clip_value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.1),
        "scale": lambda model: model[0].weight.grad.mul_(2),
        "replace": lambda model: setattr(model[0].weight, "grad", torch.zeros_like(model[0].weight)),
        "clear": lambda model: model.zero_grad(),
        "move": lambda model: setattr(model[0].weight.grad, "data", model[0].weight.grad.clone()),  # as Module.to
    }


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("change", list(changes()))
@pytest.mark.parametrize("mode", ["deferred", "scattered"])
def test_a_change_of_a_gradient_that_is_not_the_mean_is_refused_by_name(cluster, strategy, change, mode):
    if (strategy, mode) == ("allreduce", "scattered"):
        pytest.skip("only the sharded strategy scatters gradients")
    with scattering() if mode == "scattered" else nullcontext():
        model = small_model()
        optimizer = distribute(
            Adam(model.parameters()), model, strategy=strategy, defer_averaging=mode == "deferred"
        )
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        changes()[change](model)
        with pytest.raises(
            RuntimeError, match=r"gradient of \d\.\w+ was changed between backward.*clip_grad_norm_\(\)"
        ):
            optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("update", ["before the change", "after the change"])
def test_scattered_gradients_do_not_follow_a_change_of_buckets(cluster, cleared, update):
    """Each rank has the mean of its shard of the buckets before: others hold what is left there."""
    with scattering():
        model = small_model()
        optimizer = distribute(Adam(model[0].parameters()), model, strategy="sharded")
        model[2].requires_grad_(False)
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        if update == "before the change":
            optimizer.step()
        if cleared:
            optimizer.zero_grad()
        model[2].requires_grad_(True)
        refused = pytest.raises(RuntimeError, match="the mean of this rank's shard only, and these cannot follow")
        with nullcontext() if cleared else refused:
            optimizer.add_param_group({"params": list(model[2].parameters())})
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
            optimizer.step()


@on_ranks(2, "mpi")
@pytest.mark.parametrize("deferred", [False, True])
def test_clip_grad_norm_of_scattered_gradients_is_exact(cluster, deferred):
    with scattering():
        model, oracle = small_model(), small_model()
        optimizer = distribute(
            Adam(model.parameters(), eps=1e-2), model, strategy="sharded", defer_averaging=deferred
        )
        reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
        for batch in batches(3, 12):
            norms = []
            for trained, its, inputs in (
                (model, optimizer, share(batch, cluster)[0][0]),
                (oracle, reference, batch[0]),
            ):
                its.zero_grad()
                trained(inputs).square().mean().backward()
                trained(inputs).abs().mean().backward()
                norms.append(clip(oracle.parameters(), 0.1) if its is reference else its.clip_grad_norm_(0.1))
                its.step()
            assert abs(norms[0].item() - norms[1].item()) < 1e-12
        assert largest_difference(model, oracle) < 1e-12
        assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
def test_after_synchronize_a_deferred_gradient_may_be_changed(cluster, strategy):
    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy, defer_averaging=True)
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    for batch in batches(3, 12):
        optimizer.zero_grad()
        model(share(batch, cluster)[0][0]).square().mean().backward()
        optimizer.synchronize()
        clip(model.parameters(), 0.1)
        optimizer.step()
        reference.zero_grad()
        oracle(batch[0]).square().mean().backward()
        clip(oracle.parameters(), 0.1)
        reference.step()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_zero_grad_between_backward_and_step_names_the_remedy(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, defer_averaging=True)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) between .* without defer_averaging"):
        optimizer.zero_grad()
    optimizer.step()
