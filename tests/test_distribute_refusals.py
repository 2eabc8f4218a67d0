"""`distribute` and its optimizer refuse, on all ranks, whatever would diverge silently, and name the remedy.

Hazards: models and options that differ between ranks; closures, late parameters and foreign gradient scalers, with
which ranks of stock Horovod diverge; invalid options; sparse gradients; copies of a distributed optimizer.
"""

import copy
import pickle

import horovod.torch as hvd
import pytest
import torch
from helpers.branching_model import Branches
from helpers.on_ranks import on_ranks
from helpers.small_training import digest, same_everywhere, small_model
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.errors import UserError


@on_ranks(2)
@each_strategy
def test_a_model_that_differs_on_one_rank_is_refused_on_all(cluster, strategy):
    model = torch.nn.Linear(3, 2 + cluster.rank)
    before = digest(model.state_dict())
    with pytest.raises(
        UserError, match=r"rank 1 on .*: the model differs from rank 0's: weight is .*3, 3.* here and .*2, 3"
    ):
        distribute(Adam(model.parameters()), model, strategy=strategy)
    assert digest(model.state_dict()) == before


@on_ranks(2)
@each_strategy
def test_a_model_built_or_frozen_differently_on_one_rank_is_refused_on_all(cluster, strategy):
    def extra_layer_on(rank):
        model = small_model()
        if cluster.rank == rank:
            model.append(torch.nn.Linear(3, 3).double())
        return model

    def frozen_on(rank):
        model = small_model()
        model[0].weight.requires_grad_(cluster.rank != rank)
        return model

    for build, difference in (
        (extra_layer_on, r"3\.weight is .*absent"),
        (frozen_on, r"0\.weight is .* to train"),
    ):
        for rank in range(2):
            model = build(rank)
            with pytest.raises(UserError, match=rf"rank 1 on \S+: the model differs from rank 0's: {difference}"):
                distribute(Adam(model.parameters()), model, strategy=strategy)
    model = small_model()
    groups = [{"params": list(model[layer].parameters())} for layer in (0, 2)]
    with pytest.raises(UserError, match="parameter groups differ"):
        distribute(Adam(groups if cluster.rank else groups[::-1]), model, strategy=strategy)


@on_ranks(2)
@each_strategy
def test_options_that_differ_on_one_rank_are_refused_on_all(cluster, strategy):
    model = small_model()
    for options, message in (
        (
            {"strategy": list(STRATEGIES)[cluster.rank]},
            "strategy is 'allreduce' on rank 0 and 'sharded' on rank 1",
        ),
        ({"max_grad_norm": 1.0 + cluster.rank}, "max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1"),
        ({"accumulate": 1 + cluster.rank}, "accumulate is 1 on rank 0 and 2 on rank 1"),
        ({"compression": ("none", "bf16")[cluster.rank]}, "compression is 'none' on rank 0 and 'bf16' on rank 1"),
    ):
        with pytest.raises(UserError, match=message):
            distribute(Adam(model.parameters()), model, **{"strategy": strategy, **options})


@on_ranks(2)
def test_invalid_options_are_refused_with_the_remedy(cluster):
    model = small_model()
    adam = Adam(model.parameters())
    for options, message in (
        ({"strategy": "ring"}, "strategy is 'ring'; use one of"),
        ({"compression": "int2"}, "compression is 'int2'; use one of none, fp16, bf16, int8, int4"),
        (
            {"compression": "int4"},
            r"compression int4 does not support torch\.float64 \(0\.weight\): use compression none",
        ),
        ({"compression": "int4", "op": "adasum"}, "adasum has no int4 compression"),
        ({"op": "sum"}, "op is 'sum'; use one of average, adasum"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": "2"}, "accumulate is '2'; it must be a whole number"),
        ({"accumulate": float("nan")}, "accumulate is nan"),
        ({"accumulate": True}, "accumulate is True; it must be a whole number"),
        ({"bucket_mib": 0}, "bucket_mib is 0; it must be a number > 0"),
        ({"bucket_mib": 4, "op": "adasum"}, "bucket_mib=4 has no effect with op='adasum'"),
        ({"max_grad_norm": True}, "max_grad_norm is True; it must be a number > 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; it must be a number > 0"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'; it must be a number"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be a number > 0"),
        ({"loss_scaler": True}, r"loss_scaler is True; it must be a torch\.amp\.GradScaler, or None"),
        ({"op": "adasum", "max_grad_norm": 1.0}, "adasum .* cannot clip"),
        ({"op": "adasum"}, "adasum needs MPI; start the ranks with mpirun"),
        ({"op": "adasum", "strategy": "sharded"}, "adasum .* use strategy=allreduce, or op=average"),
    ):
        with pytest.raises(UserError, match=message):
            distribute(adam, model, **options)
    with pytest.raises(TypeError, match=r"hvd_adam\.Adam, not a torch\.optim\.sgd\.SGD"):
        distribute(torch.optim.SGD(model.parameters(), lr=1.0), model)
    optimizer = distribute(adam, model)
    with pytest.raises(UserError, match="distributed already"):
        distribute(optimizer, model)


@on_ranks(2)
@each_strategy
def test_sparse_gradients_are_refused_with_the_remedy(cluster, strategy):
    model = torch.nn.Embedding(4, 2, sparse=True)
    distribute(Adam(model.parameters()), model, strategy=strategy)
    with pytest.raises(RuntimeError, match="sparse=False"):
        model(torch.tensor([1])).sum().backward()


@on_ranks(2)
@each_strategy
def test_a_gradscaler_that_calls_step_is_refused(cluster, strategy):
    model = small_model()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, loss_scaler=scaler)
    scaler.scale(model(torch.ones(1, 6, dtype=torch.float64)).sum()).backward()
    with pytest.raises(RuntimeError, match="give the GradScaler to distribute"):
        scaler.step(optimizer)


@on_ranks(2)
def test_ranks_of_stock_horovod_diverge_with_a_closure(cluster):
    model = Branches()  # it runs the closure after it has reduced the gradients
    stock = hvd.DistributedOptimizer(Adam(model.parameters()), model.named_parameters())

    def closure():
        loss = model(torch.ones(2, 6, dtype=torch.float64), ("left", "right")[cluster.rank]).sum()
        loss.backward()
        return loss

    stock.step(closure)
    assert not same_everywhere(digest(model.state_dict()))
    stock.synchronize()


@on_ranks(2)
@each_strategy
def test_copying_and_pickling_are_refused_with_the_reason(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
