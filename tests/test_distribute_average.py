"""N ranks make the update that one rank makes with the whole batch.

Hazards: sums in place of means; parameters that some ranks or no rank use; a rank without a batch; sums that
depend on timing. Where stock Horovod is wrong, a test shows that too.
"""

import time
import warnings

import horovod.torch as hvd
import torch
from helpers.branching_model import Branches
from helpers.on_ranks import on_ranks
from helpers.small_training import (
    batches,
    digest,
    everything,
    largest_difference,
    same_everywhere,
    small_model,
    train,
    train_alone,
)
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute


def assert_same_update_as_one_rank(cluster, strategy, implementation, clip=None, micro_batches=1):
    """Compares training on all ranks with training in one process on whole batches."""
    model, oracle = small_model(), small_model()
    adam = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # "no fused update here": the test would compare nothing
        optimizer = distribute(
            Adam(model.parameters(), **adam, implementation=implementation),
            model,
            strategy=strategy,
            max_grad_norm=clip,
            accumulate=micro_batches,
        )
        train(model, optimizer, cluster, micro_batches=micro_batches)
    train_alone(oracle, clip=clip, **adam)
    # Sums in another order: some ulps of float64 per step, times lr / √v.
    difference = largest_difference(model, oracle)
    assert difference < 1e-12, (implementation, clip, micro_batches, difference)
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
def test_two_ranks_make_the_update_of_one_rank_with_the_whole_batch(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        for options in ({}, {"micro_batches": 2}, {"clip": 0.1}, {"clip": 0.1, "micro_batches": 4}):
            assert_same_update_as_one_rank(cluster, strategy, implementation, **options)


@on_ranks(4)
@each_strategy
def test_four_ranks_make_the_update_of_one_rank_with_the_whole_batch(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        assert_same_update_as_one_rank(cluster, strategy, implementation, clip=0.1, micro_batches=2)


@on_ranks(2, "mpi")
@each_strategy
def test_mpi_and_gloo_make_the_same_update(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        assert_same_update_as_one_rank(cluster, strategy, implementation, clip=0.1, micro_batches=2)


@on_ranks(2)
@each_strategy
def test_a_parameter_used_on_one_rank_is_averaged_and_one_used_on_no_rank_is_not_updated(cluster, strategy):
    for options in ({}, {"compression": "bf16"}, {"accumulate": 2}):
        model, oracle = Branches(), Branches()
        optimizer = distribute(Adam(model.parameters(), weight_decay=0.1), model, strategy=strategy, **options)
        reference = torch.optim.Adam(oracle.parameters(), weight_decay=0.1)
        tolerance = 1e-2 if options.get("compression") else 1e-12
        for inputs, _ in batches(3, 8):
            reference.zero_grad()
            for branch, part in zip(("left", "right"), inputs.chunk(2), strict=True):
                (oracle(part, branch).square().mean() / 2).backward()
            reference.step()
            for _ in range(options.get("accumulate", 1)):
                optimizer.zero_grad()
                branch = ("left", "right")[cluster.rank]
                model(inputs.chunk(2)[cluster.rank], branch).square().mean().backward()
                optimizer.step()
        assert largest_difference(model, oracle) < tolerance, options
        assert optimizer.state[model.never.weight]["step"].item() == 0
        assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
def test_stock_horovod_updates_parameters_that_no_rank_has_used(cluster):
    model = Branches()
    before = model.never.weight.detach().clone()
    stock = hvd.DistributedOptimizer(Adam(model.parameters(), weight_decay=0.1), model.named_parameters())
    model(torch.ones(2, 6, dtype=torch.float64), "left").sum().backward()
    stock.step()
    assert not torch.equal(model.never.weight, before)


@on_ranks(2)
@each_strategy
def test_a_rank_without_a_batch_takes_part_in_the_update(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    if cluster.rank == 0:
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
def test_tied_weights_train_as_in_one_process(cluster, strategy):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4).double()
            self.decoder.weight = self.encoder.weight

        def forward(self, inputs):
            return self.decoder(self.encoder(inputs))

    model, oracle = Tied(), Tied()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    reference = torch.optim.Adam(oracle.parameters())
    for inputs, _ in batches(3, 8):
        inputs = inputs[:, :4]
        oracle(inputs).square().mean().backward()
        reference.step()
        reference.zero_grad()
        model(inputs.chunk(2)[cluster.rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_two_distributed_optimizers_in_one_process_do_not_interfere(cluster, strategy):
    generator, critic = small_model(), small_model(seed=1)
    generators = distribute(Adam(generator.parameters()), generator, strategy=strategy)
    critics = distribute(Adam(critic.parameters()), critic, strategy=strategy)
    for model in (generator, critic):
        model(torch.ones(2, 6, dtype=torch.float64) * (1 + cluster.rank)).square().sum().backward()
    generators.step()
    critics.step()
    assert same_everywhere(everything(generator, generators) + everything(critic, critics))


@on_ranks(4)
@each_strategy
def test_sums_over_four_ranks_do_not_depend_on_timing(cluster, strategy):
    def sums(repeat):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(12)))
        optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
        torch.manual_seed(cluster.rank)
        gradients = [torch.randn_like(p) * 10 ** torch.randn_like(p) for p in model.parameters()]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(repeat)).tolist()
        for layer in order:  # in each repeat gradients have another order and other times
            time.sleep(0.002 * ((repeat + layer + cluster.rank) % 3))
            pairs = zip(model[layer].parameters(), gradients[2 * layer : 2 * layer + 2], strict=True)
            sum((parameter * gradient).sum() for parameter, gradient in pairs).backward()
        optimizer.synchronize()
        return digest([p.grad for p in model.parameters()])

    assert len({sums(repeat) for repeat in range(4)}) == 1
