"""Clipping, accumulation, compression and loss scaling with the sharded strategy.

Hazards: a norm of one rank's shard only; an overflow that only one rank sees; gradients that `synchronize` leaves
on one rank; parameters that some ranks or no rank use.
"""

import math

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.sharded_training import (
    ADAM_OPTIONS,
    assert_close,
    assert_same_state,
    each_exchange,
    gradients_of,
    parameter_list,
    sharded_adam,
    step_in_one_process,
    step_on_ranks,
    torch_adam,
)
from helpers.small_training import digest, everything, same_everywhere, small_model

from hvd_adam.errors import UserError


def assert_clipped_by_the_norm_of_all_shards(cluster):
    for way in each_exchange():
        for micro_batches in (1, 3):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded_adam(model, max_grad_norm=0.5, accumulate=micro_batches)
            step_on_ranks(model, optimizer, cluster, 0, 4, micro_batches)
            norm = step_in_one_process(oracle, torch_adam(oracle), cluster.size * micro_batches, 0, 4, clip=0.5)
            assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), (way, micro_batches)
            assert optimizer.grad_norm.dim() == 0
            assert_close(model, oracle)


@on_ranks(3, 4, controller="mpi")
def test_gradients_are_clipped_by_the_norm_of_all_shards(cluster):
    assert_clipped_by_the_norm_of_all_shards(cluster)


@on_ranks(3, "mpi")
def test_the_norm_over_several_dtypes_includes_all_of_them(cluster):
    model, oracle = (parameter_list(dtype=(torch.float32, torch.float64)) for _ in range(2))
    optimizer = sharded_adam(model, max_grad_norm=0.5)
    step_on_ranks(model, optimizer, cluster, 0, 1)
    norm = step_in_one_process(oracle.double(), torch_adam(oracle), cluster.size, 0, 1)
    # 120 exact squares; the root is rounded to float32.
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=2**-22)


@on_ranks(0)
def test_one_rank_clips_flat_and_unflattened_parameters(cluster):
    for implementation in ("foreach", "fused"):
        model, oracle = parameter_list(), parameter_list()
        optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, "implementation": implementation}, max_grad_norm=0.5)
        step_on_ranks(model, optimizer, cluster, 0, 4)
        norm = step_in_one_process(oracle, torch_adam(oracle), 1, 0, 4, clip=0.5)
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), implementation
        assert_close(model, oracle)
        assert_same_state(optimizer.state_dict()["state"], torch_state(oracle, 1, 4, clip=0.5))


def torch_state(model, parts, steps, clip=None):
    """Returns the state of PyTorch's Adam after this many steps of a new model."""
    fresh = parameter_list([p.shape for p in model.parameters()])
    optimizer = torch_adam(fresh)
    step_in_one_process(fresh, optimizer, parts, 0, steps, clip)
    return optimizer.state_dict()["state"]


@on_ranks(3, "mpi")
def test_synchronize_computes_the_whole_mean_on_every_rank(cluster):
    for way in each_exchange():
        for options in ({}, {"max_grad_norm": 0.5}, {"compression": "fp16"}, {"compression": "bf16"}):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded_adam(model, **options)
            sum(
                (p * g).sum()
                for p, g in zip(model.parameters(), gradients_of(model, 0, cluster.rank), strict=True)
            ).backward()
            optimizer.synchronize()
            optimizer.synchronize()  # the second call changes nothing
            means = [
                sum(g) / cluster.size
                for g in zip(*(gradients_of(model, 0, i) for i in range(cluster.size)), strict=True)
            ]
            tolerance = {"fp16": 2.0**-9, "bf16": 2.0**-7}.get(options.get("compression"), 1e-15)
            for p, mean in zip(model.parameters(), means, strict=True):
                torch.testing.assert_close(p.grad, mean, rtol=tolerance, atol=tolerance)
            assert same_everywhere(digest([p.grad for p in model.parameters()])), (way, options)
            if "compression" not in options:
                optimizer.step()
                step_in_one_process(
                    oracle, torch_adam(oracle), cluster.size, 0, 1, clip=options.get("max_grad_norm")
                )
                assert_close(model, oracle)


@on_ranks(3, "mpi")
def test_gradients_changed_after_synchronize_are_clipped_and_used(cluster):
    def double_in_place(p):
        p.grad.mul_(2)

    def double(p):
        p.grad = 2 * p.grad

    for way in each_exchange():
        for change in (double_in_place, double):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded_adam(model, max_grad_norm=0.5), torch_adam(oracle)
            sum(
                (p * g).sum()
                for p, g in zip(model.parameters(), gradients_of(model, 0, cluster.rank), strict=True)
            ).backward()
            optimizer.synchronize()
            means = zip(*(gradients_of(model, 0, i) for i in range(cluster.size)), strict=True)
            for p, q, parts in zip(model.parameters(), oracle.parameters(), means, strict=True):
                change(p)
                q.grad = 2 * sum(parts) / cluster.size
            optimizer.step()
            norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5).item()
            reference.step()
            assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), (way, change)
            assert_close(model, oracle)


@on_ranks(3, "mpi")
def test_compressed_gradients_of_micro_batches_train_within_their_rounding(cluster):
    for way in each_exchange():
        for compression, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded_adam(model, adam={"lr": 1e-2, "eps": 1.0}, compression=compression, accumulate=2)
            step_on_ranks(model, optimizer, cluster, 0, 4, micro_batches=2)
            step_in_one_process(oracle, torch_adam(oracle, lr=1e-2, eps=1.0), 2 * cluster.size, 0, 4)
            # Numbers up to 2 are rounded once each and their mean once more: 4 · unit. With ε = 1 an
            # update has at most twice the error of the gradients so far, times lr; there are 4.
            assert_close(model, oracle, 4 * 1e-2 * 2 * 4 * unit)
            assert same_everywhere(everything(model, optimizer)), (way, compression)


@on_ranks(3, "mpi")
def test_an_overflow_on_one_rank_skips_the_update_on_all(cluster):
    for way in each_exchange():
        for clip in (None, 0.5):
            model, oracle = parameter_list(), parameter_list()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10 * (1 + cluster.rank))
            optimizer = sharded_adam(model, max_grad_norm=clip, accumulate=2, loss_scaler=scaler)
            reference = torch_adam(oracle)
            step_on_ranks(model, optimizer, cluster, 0, 2, micro_batches=2, scaler=scaler)
            before = everything(model, optimizer)
            for _ in range(2):
                optimizer.zero_grad()
                factor = float("inf") if cluster.rank == 1 else 1.0
                scaler.scale(sum(p.sum() for p in model.parameters()) * factor).backward()
                optimizer.step()
            assert everything(model, optimizer) == before
            assert optimizer.skipped_updates == 1
            assert scaler.get_scale() == 2.0**9
            step_on_ranks(model, optimizer, cluster, 2, 4, micro_batches=2, scaler=scaler)
            step_in_one_process(oracle, reference, 2 * cluster.size, 0, 4, clip=clip)
            assert_close(model, oracle)
            assert same_everywhere(everything(model, optimizer)), (way, clip)


@on_ranks(3, "mpi")
def test_a_parameter_used_on_one_rank_is_averaged_and_one_used_on_no_rank_is_not_updated(cluster):
    for way in each_exchange():
        for options in ({}, {"max_grad_norm": 0.5}, {"compression": "fp16"}):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded_adam(model, **options), torch_adam(oracle)
            untouched = model[4].detach().clone()
            for step in range(3):
                # Rank 0 has gradients of the first two parameters, rank 1 of all but the fifth, rank 2 none.
                absent = {0: (2, 3, 4, 5, 6), 1: (4,), 2: range(7)}[cluster.rank]
                step_on_ranks(model, optimizer, cluster, step, step + 1, absent=absent)
                first, second = gradients_of(model, step, 0), gradients_of(model, step, 1)
                for i, q in enumerate(oracle.parameters()):
                    total = first[i] + second[i] if i < 2 else second[i]
                    q.grad = None if i == 4 else total / 3
                torch.nn.utils.clip_grad_norm_(oracle.parameters(), options.get("max_grad_norm", math.inf))
                reference.step()
            if "compression" not in options:
                assert_close(model, oracle)
            assert torch.equal(model[4], untouched)
            assert optimizer.state[model[4]]["step"].item() == 0
            assert same_everywhere(everything(model, optimizer)), (way, options)
            before = everything(model, optimizer)
            optimizer.zero_grad()
            optimizer.step()  # no rank has a gradient
            assert everything(model, optimizer) == before


@on_ranks(3, "mpi")
def test_adasum_is_refused_with_the_alternative(cluster):
    with pytest.raises(UserError, match=r"adasum .*: use strategy=allreduce, or op=average"):
        sharded_adam(small_model(), op="adasum")
