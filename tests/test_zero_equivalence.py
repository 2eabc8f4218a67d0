"""The sharded strategy makes the updates of one process with the whole batch.

Hazards: tensors smaller than the number of ranks, empty or 0-dimensional; groups and dtypes that share a buffer;
sums that depend on the order of gradients; both exchanges of shards. Gradients and oracles: see
`helpers.sharded_training`.
"""

import torch
import torch.nn.functional as F
from helpers.exchanges import scattering
from helpers.on_ranks import on_ranks
from helpers.sharded_training import (
    ADAM_OPTIONS,
    ODD_SHAPES,
    assert_close,
    assert_same_state,
    each_exchange,
    parameter_list,
    sharded_adam,
    step_in_one_process,
    step_on_ranks,
    torch_adam,
)
from helpers.small_training import (
    batches,
    digest,
    everything,
    largest_difference,
    same_everywhere,
    share,
    small_model,
    train,
    train_alone,
    whole_state,
)

from hvd_adam import Adam, distribute


def assert_same_losses_as_allreduce(cluster):
    def losses(strategy):
        model = small_model(torch.float32)
        optimizer = distribute(Adam(model.parameters(), lr=1e-2), model, strategy=strategy)
        curve = []
        for batch in batches(50, 24, torch.float32):
            ((inputs, targets),) = share(batch, cluster)
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve, dtype=torch.float64)

    expected = losses("allreduce")
    for way in each_exchange():
        assert torch.all((losses("sharded") - expected).abs() <= 1e-5 * expected), way


@on_ranks(2, 3)
def test_losses_are_those_of_the_default_strategy(cluster):
    assert_same_losses_as_allreduce(cluster)


@on_ranks(4, "mpi")
def test_losses_are_those_of_the_default_strategy_under_mpi(cluster):
    assert_same_losses_as_allreduce(cluster)


def assert_odd_shapes_train_like_one_process(cluster):
    for way in each_exchange():
        for shapes in (ODD_SHAPES, ((),), ((1,),), ((cluster.size * 16,), (3,)), ((5, 1), (0,))):
            for options in ({}, {"amsgrad": True})[: 2 if shapes is ODD_SHAPES else 1]:
                model, oracle = parameter_list(shapes), parameter_list(shapes)
                optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, **options})
                reference = torch_adam(oracle, **ADAM_OPTIONS, **options)
                step_on_ranks(model, optimizer, cluster, 0, 5)
                step_in_one_process(oracle, reference, cluster.size, 0, 5)
                assert_close(model, oracle)
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
                assert same_everywhere(everything(model, optimizer)), (way, shapes, options)


@on_ranks(3)
def test_odd_tiny_and_empty_parameters_train_like_one_process(cluster):
    assert_odd_shapes_train_like_one_process(cluster)


@on_ranks(3, 4, controller="mpi")
def test_odd_tiny_and_empty_parameters_train_like_one_process_under_mpi(cluster):
    assert_odd_shapes_train_like_one_process(cluster)


@on_ranks(3, "mpi")
def test_many_buckets_train_like_one_process(cluster):
    shapes = ((500, 1201), (11,), (1, 600_001), (3,))  # the large ones have 4.8 MB of float64; buckets have 8 MiB
    for way in each_exchange():
        model, oracle = parameter_list(shapes), parameter_list(shapes)
        optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, "implementation": "foreach"}, max_grad_norm=1.0)
        step_on_ranks(model, optimizer, cluster, 0, 2)
        step_in_one_process(oracle, torch_adam(oracle), cluster.size, 0, 2, clip=1.0)
        # The norm of a million numbers, summed in another order: at most 1e6 ulps, √1e6 in practice.
        assert_close(model, oracle, 1e-11)
        assert same_everywhere(digest(model.state_dict())), way


@on_ranks(3)
def test_parameter_groups_keep_their_options(cluster):
    def groups(model):
        first, second, third, *rest = model.parameters()
        return [
            {"params": [first], "lr": 0.1, "amsgrad": True},
            {"params": [second, third], "betas": (0.5, 0.6), "weight_decay": 0.0},
            {"params": rest, "maximize": True, "eps": 1e-3},
        ]

    for way in each_exchange():
        model, oracle = parameter_list(), parameter_list()
        adam = Adam(groups(model), **ADAM_OPTIONS)
        adam.param_groups[1]["implementation"] = "reference"
        optimizer = distribute(adam, model, strategy="sharded", max_grad_norm=0.5)
        reference = torch.optim.Adam(groups(oracle), foreach=False, **ADAM_OPTIONS)
        step_on_ranks(model, optimizer, cluster, 0, 5)
        step_in_one_process(oracle, reference, cluster.size, 0, 5, clip=0.5)
        assert_close(model, oracle)
        assert same_everywhere(everything(model, optimizer)), way
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])


@on_ranks(3, "mpi")
def test_several_dtypes_train_together_with_and_without_master_weights(cluster):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for options in ({}, {"master_weights": True}, {"amsgrad": True, "master_weights": True}):
        for way in each_exchange():
            model, default = parameter_list(dtype=dtypes), parameter_list(dtype=dtypes)
            optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, **options})
            other = distribute(Adam(default.parameters(), **ADAM_OPTIONS, **options), default)
            for either, its in ((model, optimizer), (default, other)):
                step_on_ranks(either, its, cluster, 0, 5)
            for i, (p, q) in enumerate(zip(model.parameters(), default.parameters(), strict=True)):
                # The same operations on the same numbers, vectorized at other positions: one or two ulps per step.
                torch.testing.assert_close(p, q, rtol=10 * torch.finfo(p.dtype).eps, atol=1e-6)
                assert ("master_param" in whole_state(optimizer, p)) == (
                    p.dtype == torch.bfloat16 and "master_weights" in options
                ), (i, options)
            assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
            mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
            for i in mine:
                kinds = [{key: (t.shape, t.dtype) for key, t in whole[i].items()} for whole in (mine, theirs)]
                assert kinds[0] == kinds[1], i
            assert same_everywhere(everything(model, optimizer)), (way, options)


@on_ranks(3)
def test_stochastically_rounded_parameters_are_identical_on_all_ranks(cluster):
    for way in each_exchange():
        model = parameter_list(dtype=torch.bfloat16)
        optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, "stochastic_rounding": True})
        step_on_ranks(model, optimizer, cluster, 0, 5)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3, "mpi")
def test_channels_last_weights_keep_their_memory_format(cluster):
    def convolution():
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 5, 3).double().to(memory_format=torch.channels_last)

    for way in each_exchange():
        model, oracle = convolution(), convolution()
        optimizer, reference = sharded_adam(model), torch_adam(oracle)
        step_on_ranks(model, optimizer, cluster, 0, 3)
        step_in_one_process(oracle, reference, cluster.size, 0, 3)
        assert_close(model, oracle)
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert model.weight.is_contiguous(memory_format=torch.channels_last), way


@on_ranks(4, "mpi")
def test_sums_over_scattered_shards_do_not_depend_on_the_order_of_gradients(cluster):
    def sums(repeat):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(6)))
        optimizer = sharded_adam(model, defer_averaging=True)  # one round for all backward passes
        torch.manual_seed(cluster.rank)
        mine = [torch.randn_like(p) * 10 ** torch.randn_like(p) for p in model.parameters()]
        order = torch.randperm(6, generator=torch.Generator().manual_seed(repeat + cluster.rank)).tolist()
        for layer in order:
            pairs = zip(model[layer].parameters(), mine[2 * layer : 2 * layer + 2], strict=True)
            sum((p * g).sum() for p, g in pairs).backward()
        optimizer.synchronize()
        return digest([p.grad for p in model.parameters()])

    with scattering():
        assert len({sums(repeat) for repeat in range(3)}) == 1


@on_ranks(4, "mpi")
def test_scattering_under_mpi_makes_the_update_of_one_process(cluster):
    with scattering():
        model, oracle = small_model(), small_model()
        optimizer = sharded_adam(model, adam={"lr": 1e-2}, accumulate=2, max_grad_norm=0.1)
        train(model, optimizer, cluster, micro_batches=2)
        train_alone(oracle, lr=1e-2, clip=0.1)
        assert largest_difference(model, oracle) < 1e-12
