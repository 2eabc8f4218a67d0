"""Gradients that are sent as codes of 8 and 4 bits: the exchange, and what happens to what the codes have missed.

Hazards: a gradient that is not finite, and stays in the residuals for ever; residuals in units of a loss scale
that has changed; a norm of gradients before the codes; errors in rows of an embedding that no batch has used; runs
that do not repeat; residuals that are lost when buckets change, or are used twice; an update that is not made.
"""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.coded_gradients import (
    SHAPES,
    Account,
    Weights,
    account,
    backward,
    each_code,
    mean_of_ranks,
    random_gradients,
    residuals,
    unsent,
)
from helpers.codes_oracle import Oracle
from helpers.on_ranks import on_ranks
from helpers.small_training import digest, same_everywhere
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.data import load
from hvd_adam.distributed.collectives import pieces
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire import coded_allreduce
from hvd_adam.distributed.wire.coded_bucket import WorkerResidual
from hvd_adam.distributed.wire.saved_residuals import SavedResiduals, as_saved
from hvd_adam.errors import UserError

# The exchange.

ELEMENTS = 672 + 32  # a bucket of a weight of 672 elements and a bias, aligned


def exchange_agrees_with_the_oracle(cluster, compression):
    """Three updates of a weight of 672 elements, whose bias is sent exactly."""
    model = torch.nn.Linear(28, 24)
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    shape, updates = (cluster.size, 24, 28), 3
    for seed in range(100):
        draws = torch.randn(updates, *shape, generator=torch.Generator().manual_seed(seed))
        draws[:, :, :, 7] *= 100  # outliers
        draws[0, 0].view(-1)[200:600] = 0  # some whole blocks
        oracle = Oracle(compression, cluster.size, ELEMENTS)
        places = torch.zeros(updates, cluster.size, ELEMENTS, dtype=torch.float64)
        places[:, :, :672] = draws.double().view(updates, cluster.size, -1)
        expected = [oracle.mean(place) for place in places.numpy()]
        if oracle.margin > 4e-5:
            break
    else:
        pytest.fail("no gradients without numbers between two codes")
    for update in range(updates):
        optimizer.zero_grad()
        backward(model, {"weight": draws[update, cluster.rank], "bias": torch.full((24,), 1.0 + cluster.rank)})
        got = model.weight.grad.double().view(-1).numpy()
        tolerance = 1e-5 * np.abs(expected[update]).max()
        assert np.abs(got - expected[update][:672]).max() < tolerance, update
        assert torch.equal(model.bias.grad, torch.full((24,), (cluster.size + 1) / 2))
        assert same_everywhere(digest(model.weight.grad))
        optimizer.step()
    assert np.abs(unsent(optimizer)["weight"].view(-1).numpy() - oracle.unsent()[:672]).max() < tolerance


@on_ranks(2, 3)
@each_code
def test_two_phases_agree_with_float64(cluster, compression):
    exchange_agrees_with_the_oracle(cluster, compression)


@on_ranks(3, controller="mpi")
@each_code
def test_two_phases_agree_with_float64_under_mpi(cluster, compression):
    exchange_agrees_with_the_oracle(cluster, compression)


@on_ranks(2)
@each_code
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_averaged_beyond_the_range_of_float16(cluster, compression, dtype):
    model = torch.nn.Linear(320, 2).to(dtype)  # whole groups of 32, whose transform has one value
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    backward(
        model, {"weight": torch.full((2, 320), 60000.0).to(dtype), "bias": torch.full((2,), 50000.0).to(dtype)}
    )
    # Two roundings, each by at most half a step, a 255th or a 15th of the largest, and scales in bfloat16.
    error = 2 / {"int8": 255, "int4": 15}[compression] + 2**-7
    for p in model.parameters():
        assert p.grad.dtype == dtype
        torch.testing.assert_close(
            p.grad.float(), torch.full(p.shape, 60000.0 if p.dim() == 2 else 50000.0), rtol=error, atol=0
        )
    optimizer.step()


@on_ranks(2)
@each_code
def test_channels_last_weights_and_several_buckets_follow_their_gradients(cluster, compression):
    model = Weights(large=(1100, 1000), images=(8, 4, 3, 3), larger=(1100, 2000))  # 4.4 + 8.8 MB
    model.images.data = model.images.data.contiguous(memory_format=torch.channels_last)
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    backward(model, random_gradients(model, 1, cluster.rank))
    expected = mean_of_ranks(model, 1, cluster.size)
    assert len(optimizer.error_feedback._buckets) == 2
    for name, p in model.named_parameters():
        error = (p.grad - expected[name]).norm() / expected[name].norm()
        assert error < {"int8": 0.02, "int4": 0.16}[compression], name
    assert not model.images.grad.is_contiguous()
    optimizer.step()
    for name, residual in unsent(optimizer).items():
        p = model.get_parameter(name)
        torch.testing.assert_close(
            p.grad + residual, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max()
        )


# Error feedback.


@on_ranks(2)
@each_code
def test_the_sum_of_means_of_a_constant_gradient_is_exact_up_to_one_step(cluster, compression):
    model = Weights(weight=(30, 40))
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    expected, total = mean_of_ranks(model, 1, cluster.size)["weight"], 0.0
    for updates in range(1, 21):
        optimizer.zero_grad()
        backward(model, random_gradients(model, 1, cluster.rank))
        total = total + model.weight.grad.double()
        optimizer.step()
        # One step of a code is the largest magnitude / levels; of both phases, with both residuals; int4 adds the
        # errors of a group of 32.
        step = 3 * expected.abs().max() / {"int8": 127, "int4": 7}[compression]
        assert (total - updates * expected).abs().max() < 2.5 * step, updates


@on_ranks(2)
@each_code
@each_strategy
def test_runs_repeat_bit_for_bit(cluster, compression, strategy):
    results = []
    for _ in range(2):
        model = Weights(weight=(30, 40))
        optimizer = distribute(Adam(model.parameters()), model, compression=compression, strategy=strategy)
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, random_gradients(model, seed, cluster.rank))
            optimizer.step()
        results.append(digest(model.weight, residuals(optimizer)))
    assert results[0] == results[1]


@on_ranks(2, 3)
@each_code
@each_strategy
def test_pieces_and_gradients_that_are_not_copied_give_the_bits_of_whole_buckets(cluster, compression, strategy):
    results = []
    for piece, copies in ((1 << 20, True), (1 << 20, False), (512, False), (1024, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", piece)
            patch.setattr(pieces, "LEAST_OF_PART", 256)
            if copies:
                patch.setattr(GradientBuffer, "take_elsewhere", lambda *_: {})
            for deferred in (False, True):
                model = Weights(weight=(60, 128), bias=(40,), other=(33, 40), last=(16, 64))
                options = {"compression": compression, "strategy": strategy, "defer_averaging": deferred}
                optimizer = distribute(Adam(model.parameters()), model, **options)
                for seed in range(3):
                    optimizer.zero_grad()
                    backward(model, random_gradients(model, seed, cluster.rank))
                    optimizer.step()
                results.append(digest(*model.parameters(), residuals(optimizer)))
    assert len(set(results)) == 1


@on_ranks(2, 3)
@each_code
@each_strategy
def test_gradients_that_a_loop_holds_and_clears_while_they_are_reduced_count_whole(cluster, compression, strategy):
    """Those of buckets that were sent in backward, with averaging deferred: of what a rank adds itself, too."""
    results = []
    for clears in (False, True):
        model = Weights(weight=(60, 128), other=(33, 40), last=(16, 64))
        options = {"compression": compression, "strategy": strategy, "defer_averaging": True}
        optimizer = distribute(Adam(model.parameters()), model, bucket_mib=0.001, **options)
        held = []
        for p in (model.other, model.last):
            p.register_post_accumulate_grad_hook(lambda p, held=held: held.append(p.grad))
        backward(model, random_gradients(model, 1, cluster.rank))
        assert len(held) == 2
        for gradient in held if clears else ():
            gradient.zero_()
        optimizer.step()
        results.append(digest(*model.parameters(), residuals(optimizer)))
    assert results[0] == results[1]


@on_ranks(2)
@each_code
@each_strategy
@pytest.mark.parametrize("element", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_deferred_updates_wait_for_gradients_that_are_large_or_not_finite(
    cluster, compression, strategy, element, name
):
    results = []
    for deferred in (False, True):
        model = Weights(weight=(30, 40), bias=(40,), other=(20, 64))
        options = {"compression": compression, "strategy": strategy, "defer_averaging": deferred}
        optimizer = distribute(Adam(model.parameters()), model, bucket_mib=0.001, **options)
        skipped = []
        for seed in range(3):
            gradients = random_gradients(model, seed, cluster.rank)
            if seed == 1 and cluster.rank == 1:
                gradients[name].view(-1)[5] = element
            optimizer.zero_grad()
            backward(model, gradients)
            optimizer.step()
            skipped.append(optimizer.skipped)
        assert skipped == [False, element != 1e30, False]
        results.append(digest(*model.parameters(), residuals(optimizer)))
    assert results[0] == results[1]


def clear_by_model(model, optimizer):
    model.zero_grad()


def clear_to_zero_by_model(model, optimizer):
    model.zero_grad(set_to_none=False)


def clear_by_optimizer(model, optimizer):
    optimizer.zero_grad()


def step(model, optimizer):
    optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize(
    ("compression", "element", "dropped"),
    [
        ("int8", float("nan"), step),
        ("int8", float("inf"), clear_by_optimizer),
        ("int8", 1.0, clear_to_zero_by_model),
        ("int8", 1.0, clear_by_optimizer),
        ("int4", float("-inf"), step),
        ("int4", 2e38, step),  # the codes are finite, but not what they decode to
        ("int4", float("nan"), clear_by_model),
        ("int4", 1.0, clear_by_model),
    ],
)
def test_gradients_that_are_not_finite_or_are_cleared_change_no_residual(cluster, compression, element, dropped):
    model = Weights(weight=(30, 40), bias=(40,), other=(20, 64))
    plain = copy.deepcopy(model)
    optimizers = [distribute(Adam(m.parameters()), m, compression=compression) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        backward(m, random_gradients(m, 1, cluster.rank))
        optimizer.step()
        optimizer.zero_grad()
    before = residuals(optimizers[0])
    gradients = random_gradients(model, 2, cluster.rank)
    if cluster.rank == 1:
        gradients["other"][3, 3] = element
    backward(model, gradients)
    assert model.other.grad.isfinite().all() == (element == 1.0)
    dropped(model, optimizers[0])
    assert residuals(optimizers[0]) == before
    if dropped is step:
        assert optimizers[0].skipped
        optimizers[0].zero_grad()
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        backward(m, random_gradients(m, 3, cluster.rank))
        optimizer.step()
    assert torch.equal(model.other.grad, plain.other.grad)
    assert residuals(optimizers[0]) == residuals(optimizers[1])


@on_ranks(2)
@each_code
def test_codes_tell_that_sums_are_finite_without_a_pass_over_them(cluster, compression):
    model = Weights(weight=(30, 40), bias=(40,), other=(20, 64))
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    with mock.patch.object(coded_allreduce, "element_sum", wraps=coded_allreduce.element_sum) as passes:
        backward(model, random_gradients(model, 1, cluster.rank))
        optimizer.step()
    added = sum(len(call.args[0]) for call in passes.call_args_list)
    assert len(model.bias) <= added < model.weight.numel()


@on_ranks(2)
def test_a_gradient_that_overflows_in_the_transform_alone_stays_in_no_residual(cluster):
    model = Weights(weight=(32, 32))
    optimizer = distribute(Adam(model.parameters()), model, compression="int4")
    skipped = []
    for element in (3e37, 1e-3, 1e-3):  # the sum is 0
        gradient = torch.full((32, 32), 1e-3)
        gradient[0, 0] = element * (1 - 2 * cluster.rank)
        backward(model, {"weight": gradient})
        optimizer.step()
        skipped.append(optimizer.skipped)
        optimizer.zero_grad()
    assert skipped == [True, False, False]


@on_ranks(2)
def test_without_skipping_residuals_stay_finite_too(cluster):
    model = Weights(weight=(30, 40), other=(20, 64))
    optimizer = distribute(Adam(model.parameters()), model, compression="int8", skip_nonfinite=False)
    backward(model, random_gradients(model, 1, cluster.rank))
    optimizer.step()
    before = residuals(optimizer)
    optimizer.zero_grad()
    backward(model, {"weight": torch.full((30, 40), float("nan") if cluster.rank else 1.0)})
    optimizer.step()
    assert model.weight.isnan().any()
    assert residuals(optimizer) == before


@on_ranks(2)
@each_code
@each_strategy
def test_a_loss_scale_that_changes_changes_nothing_else(cluster, compression, strategy):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)):
        model = Weights(weight=(30, 40), bias=(40,))
        optimizer = distribute(
            Adam(model.parameters()), model, compression=compression, strategy=strategy, loss_scaler=scaler
        )
        scales = []
        for seed in range(7):
            optimizer.zero_grad()
            scale = 1.0 if scaler is None else scaler.get_scale()
            if scaler is not None and seed == 3:  # too large: skipped, and half the scale from then on
                backward(model, {"weight": torch.full((30, 40), 3e38)}, scale)
                optimizer.step()
                optimizer.zero_grad()
                assert scaler.get_scale() == scale / 2
                scale = scaler.get_scale()
            scales.append(scale)
            backward(model, random_gradients(model, seed, cluster.rank), scale)
            optimizer.step()
        results.append((model.weight, residuals(optimizer)))
        if scaler is not None:
            assert scaler.get_scale() == 2.0**12, scales
    assert torch.equal(results[0][0], results[1][0])  # scales are powers of two
    assert results[0][1] == results[1][1]


@on_ranks(2)
@each_code
def test_the_decoded_mean_is_clipped(cluster, compression):
    model = Weights(weight=(30, 40), bias=(40,))
    optimizer = distribute(Adam(model.parameters()), model, compression=compression, max_grad_norm=0.5)
    backward(model, random_gradients(model, 1, cluster.rank))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), norm)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    assert same_everywhere(digest(optimizer.grad_norm, model.weight))


@on_ranks(2)
@each_code
@each_strategy
def test_embeddings_norms_and_biases_are_exact_and_shared_embeddings_are_coded(cluster, compression, strategy):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.tied = torch.nn.Embedding(50, 12), torch.nn.Embedding(50, 12)
            self.norm, self.head = torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 50)
            self.head.weight = self.tied.weight

        def forward(self, words):
            return self.head(self.norm(self.own(words) + self.tied(words)))

    gradients = []
    for code in ("none", compression):
        torch.manual_seed(0)
        model = Model()
        optimizer = distribute(Adam(model.parameters()), model, compression=code, strategy=strategy)
        words = torch.arange(6) + 3 * cluster.rank
        model(words).square().sum().backward()
        optimizer.synchronize()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    exact, coded = gradients
    for name in ("own.weight", "norm.weight", "norm.bias", "head.bias"):
        assert torch.equal(exact[name], coded[name]), name
    assert not coded["own.weight"][9:].any()
    assert not torch.equal(exact["tied.weight"], coded["tied.weight"])
    assert unsent(optimizer).keys() == {"tied.weight"}


# Whatever a loop does: an update gets the mean of the gradients and what earlier ones have missed, once.


@on_ranks(2)
@each_code
@each_strategy
def test_parameters_that_no_rank_uses_keep_what_is_unsent(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    for seed in (2, 3):
        books.backward(seed, ["first", "third"])
        assert books.model.second.grad is None
        books.step()
    books.check()
    books.update(4)
    books.check()


@on_ranks(2)
@each_code
@each_strategy
def test_frozen_parameters_and_added_groups_keep_what_is_unsent(cluster, compression, strategy):
    model = Weights(**SHAPES)
    optimizer = distribute(
        Adam([model.first, model.bias, model.second]), model, compression=compression, strategy=strategy
    )
    books = Account(cluster, model, optimizer)
    model.third.requires_grad_(False)
    books.update(1)
    books.model.second.requires_grad_(False)
    books.update(2)
    books.check()
    books.model.second.requires_grad_(True)
    model.third.requires_grad_(True)
    optimizer.add_param_group({"params": [model.third]})
    books.update(3)
    books.check()


@on_ranks(2)
@each_code
@each_strategy
def test_residuals_of_a_parameter_with_one_element_load_with_another_number_of_ranks(
    cluster, compression, strategy
):
    model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Linear(1, 1))
    optimizer = distribute(Adam(model.parameters()), model, compression=compression, strategy=strategy)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    before = optimizer.error_feedback.total_state_dict()
    optimizer.error_feedback.load_state_dict(before)
    after = optimizer.error_feedback.total_state_dict()["parked"]
    for name, total in before["parked"].items():
        torch.testing.assert_close(after[name], total)


@on_ranks(2)
@each_code
@each_strategy
def test_a_second_distribute_takes_over_what_is_unsent(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    books.optimizer = distribute(
        Adam(books.model.parameters()), books.model, compression=compression, strategy=strategy, accumulate=1
    )
    books.check()
    books.update(2)
    books.check()


@on_ranks(2)
@each_code
@each_strategy
def test_a_rank_without_a_batch_drops_cleared_gradients_as_the_others_do(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    missing = {name: tensor.clone() for name, tensor in books.missing.items()}
    books.backward(2)
    books.optimizer.zero_grad()
    books.missing = missing
    if cluster.rank == 0:
        backward(books.model, random_gradients(books.model, 3))
    for name, gradient in random_gradients(books.model, 3).items():
        books.missing[name] = books.missing[name] + gradient.double() / 2
    books.step()
    books.check()


@on_ranks(2, HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="30")
@pytest.mark.parametrize("compression", ["bf16", "int8", "int4"])
@each_strategy
@pytest.mark.parametrize("has_loss", [[True, True], [False, True]])
def test_ranks_may_send_any_number_of_buckets_in_different_orders(cluster, compression, strategy, has_loss):
    halves = [torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(9))) for _ in range(2)]
    model = torch.nn.ModuleList(halves)
    options = {"compression": compression, "strategy": strategy, "bucket_mib": 0.01}  # a bucket for each weight
    optimizer = distribute(Adam(model.parameters()), model, **options)
    for _ in range(3):
        optimizer.zero_grad()
        if has_loss[cluster.rank]:
            halves[cluster.rank](torch.ones(8, 64)).square().mean().backward()
        optimizer.step()
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@each_code
@each_strategy
@pytest.mark.parametrize("defers", [False, True])
def test_errors_of_codes_between_parameters_do_not_grow_after_a_change_to_none(
    cluster, compression, strategy, defers
):
    model = torch.nn.Sequential(torch.nn.Linear(27, 27, bias=False), torch.nn.Linear(27, 27, bias=False))
    options = {"compression": "auto:any", "strategy": strategy, "defer_averaging": defers}
    optimizer = distribute(Adam(model.parameters()), model, **options)
    optimizer.use_compression(compression)
    for update in range(150):  # 2¹²⁸ is infinite
        if update == 3:
            optimizer.use_compression("none")
        optimizer.zero_grad()
        model(torch.ones(8, 27) * (update + cluster.rank)).square().mean().backward()
        optimizer.step()
    assert optimizer.skipped_updates == 0


@on_ranks(2)
@each_code
@each_strategy
def test_several_backward_passes_and_deferred_averaging_count_once(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    books.backward(2)
    books.backward(3)  # onto the mean
    books.step()
    books.check()
    with books.optimizer.no_sync():
        books.backward(4)
    books.backward(5)
    books.step()
    books.check()
    deferred = account(cluster, compression, strategy=strategy, defer_averaging=True)
    for seed in range(3):
        deferred.update(seed)
    deferred.backward(5)
    deferred.backward(6)  # the second one after buckets were sent
    deferred.step()
    deferred.check()


@on_ranks(2)
@each_code
@each_strategy
def test_micro_batches_are_encoded_once_with_their_sum(cluster, compression, strategy):
    model = Weights(**SHAPES)
    optimizer = distribute(
        Adam(model.parameters()), model, compression=compression, strategy=strategy, accumulate=2
    )
    got = {name: 0.0 for name in SHAPES}
    for seed in range(4):
        optimizer.zero_grad()
        backward(model, random_gradients(model, seed, cluster.rank))
        if seed % 2:
            optimizer.synchronize()
        optimizer.step()
        if seed % 2:
            got = {name: got[name] + p.grad.double() for name, p in model.named_parameters()}
    means = [mean_of_ranks(model, seed, cluster.size) for seed in range(4)]
    for name, residual in unsent(optimizer).items():
        expected = sum(mean[name] for mean in means) / 2
        torch.testing.assert_close(got[name] + residual, expected, rtol=0, atol=1e-5 * expected.abs().max())


@on_ranks(2)
@each_code
@each_strategy
def test_a_change_of_parameters_between_backward_and_step_keeps_the_reduction(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    books.backward(2)
    books.optimizer.param_groups[0]["amsgrad"] = True  # another layout
    books.step()
    books.check()


@on_ranks(2)
@each_code
def test_a_rank_that_has_left_a_join_keeps_its_residual(cluster, compression):
    model = Weights(**SHAPES)
    optimizer = distribute(Adam(model.parameters()), model, compression=compression)
    backward(model, random_gradients(model, 1, cluster.rank))
    optimizer.step()
    optimizer.zero_grad()
    own = {n: optimizer.error_feedback._buckets[0].worker.committed.clone() for n in ("worker",)}
    books = Account(cluster, model, optimizer)
    books.missing = unsent(optimizer)
    books.missing["bias"] = torch.zeros(40).double()
    with optimizer.join():
        for seed in range(2, 5 if cluster.rank else 2):
            backward(model, random_gradients(model, seed, 1))
            optimizer.step()
            got = {name: p.grad.double().clone() for name, p in model.named_parameters()}
            optimizer.zero_grad()
            for name, gradient in random_gradients(model, seed, 1).items():
                books.missing[name] += gradient.double() / 2 - got[name]
    if cluster.rank == 0:
        assert torch.equal(optimizer.error_feedback._buckets[0].worker.committed, own["worker"])
    books.missing = cluster.gather(books.missing)[1]
    books.check()


@on_ranks(2)
def test_a_gradscaler_of_ones_own_is_refused(cluster):
    model = Weights(weight=(30, 40))
    optimizer = distribute(Adam(model.parameters()), model, compression="int8")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.weight.sum()).backward()
    with pytest.raises(RuntimeError, match="give the GradScaler to distribute"):
        scaler.step(optimizer)


# Saving.


@on_ranks(2)
@each_code
@each_strategy
def test_other_numbers_of_ranks_and_other_codes_get_the_same_sum(cluster, compression, strategy):
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    books.model.second.requires_grad_(False)  # in no bucket
    books.update(2)
    feedback, expected = books.optimizer.error_feedback, unsent(books.optimizer)
    assert expected.keys() == {"first", "second", "third"}
    saved = feedback.state_dict_on_root()
    of_four = None
    if cluster.is_root:
        rows = SavedResiduals(saved).by_name(4)
        assert all(torch.equal(row, residual[0]) for residual in rows.values() for row in residual)
        of_four = as_saved("int4", 4, [], {name: residual.contiguous() for name, residual in rows.items()})
    feedback.load_state_dict(None)
    assert not any(residual.any() for residual in unsent(books.optimizer).values())
    for state in (of_four, saved):
        feedback.load_state_dict(state)
        for name, residual in unsent(books.optimizer).items():
            torch.testing.assert_close(residual, expected[name], rtol=0, atol=1e-6 * expected[name].abs().max())
    other = "int4" if compression == "int8" else "int8"
    books.optimizer = distribute(Adam(books.model.parameters()), books.model, compression=other, strategy=strategy)
    books.optimizer.error_feedback.load_state_dict(saved)
    for name, residual in unsent(books.optimizer).items():
        torch.testing.assert_close(residual, expected[name], rtol=0, atol=1e-6 * expected[name].abs().max())
    books.check()


@on_ranks(2)
@each_code
@each_strategy
def test_loaded_residuals_of_what_a_rank_adds_itself_are_added_once(cluster, compression, strategy):
    """Older checkpoints have some: ranks encoded those gradients, too."""
    books = account(cluster, compression, strategy=strategy)
    books.update(1)
    saved = books.optimizer.error_feedback.state_dict_on_root()
    if cluster.is_root:
        for bucket in saved["buckets"]:
            assert not any(part[rank].any() for rank, part in own_parts(bucket, cluster.size))
            bucket["worker"] += 0.5
    books.optimizer.error_feedback.load_state_dict(saved)
    books.missing |= unsent(books.optimizer)
    for seed in range(2, 5):
        books.update(seed)
        books.check()


def test_what_is_owed_is_taken_once_and_returns_if_its_update_is_not_made():
    residual = WorkerResidual(6, torch.device("cpu"), slice(2, 4))
    residual.committed[2:] = 1.0
    residual.changed()
    for made in (False, True):
        assert torch.equal(residual.advance_owing()[2], torch.ones(2))
        assert residual.advance_owing()[2] is None  # a second reduction of the same update
        residual.commit() if made else residual.roll_back()
    for _ in range(3):
        _, after, owed = residual.advance_owing()
        assert owed is None and not after[2:4].any()
        residual.commit()


def own_parts(bucket, ranks):
    """Returns (rank, [ranks, n]) of the part of a saved bucket that each rank adds itself."""
    return enumerate(torch.chunk(bucket["worker"], ranks, dim=1))


def odd_buckets(saved):
    """Returns what was saved with a bucket that is too short, of three ranks, and of another dtype."""
    for change in (lambda t: t[:, :-40], lambda t: torch.cat([t, t[:1]]), torch.Tensor.double):
        if saved is None:  # on ranks other than 0
            yield None
        else:
            first, *others = saved["buckets"]
            yield {**saved, "buckets": [{**first, "worker": change(first["worker"])}, *others]}


@on_ranks(2)
def test_residuals_that_do_not_fit_are_refused_on_every_rank(cluster):
    feedback = account(cluster, "int8").optimizer.error_feedback
    before = digest(feedback.state_dict_on_root())
    for saved, message in (
        ({"compression": "int2", "ranks": 2}, "no residuals of gradients that this version has saved"),
        (
            as_saved("int8", 1, [], {"first": torch.ones(1, 5, 5)}),
            r"first has the shape \(5, 5\), the parameter \(17",
        ),
        (as_saved("int8", 2, [], {"first": torch.ones(3, 5, 5)}), "these are no residuals"),
        (as_saved("int8", 2, [], {}, {"first": 1.0}), "a master is no tensor"),
        *((odd, "these are no residuals") for odd in odd_buckets(feedback.state_dict_on_root())),
    ):
        with pytest.raises(UserError, match=message):
            feedback.load_state_dict(saved if cluster.is_root else None)
    assert digest(feedback.state_dict_on_root()) == before


@on_ranks(2)
@each_strategy
def test_digits_are_learned_as_well_as_without_codes(cluster, strategy):
    data = load("digits")
    images = (torch.from_numpy(data.train_images).float() / 255 - 0.3) / 0.3
    labels = torch.from_numpy(data.train_labels)
    test_images = (torch.from_numpy(data.test_images).float() / 255 - 0.3) / 0.3
    accuracy = {}
    for compression in ("none", "int8", "int4"):
        torch.manual_seed(0)
        layers = torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        model = torch.nn.Sequential(*layers)
        optimizer = distribute(
            Adam(model.parameters(), lr=3e-3), model, compression=compression, strategy=strategy
        )
        for _ in range(150):
            batch = torch.randint(len(images), (cluster.size, 64))[cluster.rank]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        found = model(test_images).argmax(dim=1).numpy() == data.test_labels
        accuracy[compression] = found.mean()
        assert same_everywhere(digest(model.state_dict()))
    standard_error = (accuracy["none"] * (1 - accuracy["none"]) / len(found)) ** 0.5
    assert accuracy["none"] > 0.9
    for compression in ("int8", "int4"):
        assert accuracy[compression] > accuracy["none"] - standard_error, accuracy
