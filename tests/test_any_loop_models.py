"""Models, optimizers and modes of PyTorch that are unusual, but right in one process.

Hazards: tensors that cannot be written element by element; a model without trained parameters, and so without
buckets; tensors created in inference mode, which Horovod's thread cannot write; forward passes that change
parameters on each rank; an optimizer class with a constructor of its own; a gradient buffer that is used again
while user code holds gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.on_ranks import on_ranks
from helpers.small_training import (
    batches,
    digest,
    everything,
    largest_difference,
    same_everywhere,
    share,
    small_model,
)
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.distributed.consistency import require_consistent
from hvd_adam.errors import JobError, UserError


def compare_with_one_process(model, optimizer, oracle, reference, cluster, steps=4):
    """Trains both; the model on this rank's share of each batch."""
    for batch in batches(steps, 12):
        for trained, its, (inputs, targets) in (
            (model, optimizer, share(batch, cluster)[0]),
            (oracle, reference, batch),
        ):
            its.zero_grad()
            F.mse_loss(trained(inputs), targets).backward()
            its.step()
    assert largest_difference(model, oracle) < 1e-12


def ones(more=0):
    return torch.ones(2, 6, dtype=torch.float64) * (1 + more)


def one_update(model, optimizer):
    model(ones()).square().sum().backward()
    optimizer.step()


# Modes.


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_in_which_distribute_is_called_does_not_matter(cluster, strategy, mode):
    model, oracle = small_model(), small_model()
    with mode():
        optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy)
        assert not torch.is_grad_enabled()
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    compare_with_one_process(model, optimizer, oracle, reference, cluster)
    with mode():
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.broadcast()
    compare_with_one_process(model, optimizer, oracle, reference, cluster)
    added = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("added", added)
    with mode():
        optimizer.add_param_group({"params": [added]})
    optimizer.zero_grad()
    added.square().sum().backward()
    optimizer.step()
    assert added.tolist() != [1.0] * 3


@on_ranks(2)
@each_strategy
def test_parameters_created_in_inference_mode_are_refused_and_buffers_are_broadcast(cluster, strategy):
    with torch.inference_mode():
        frozen = small_model()
    with pytest.raises(UserError, match=r"0\.weight was created in torch\.inference_mode\(\)"):
        distribute(Adam(frozen.parameters()), frozen, strategy=strategy)
    model = small_model()
    with torch.inference_mode():
        model.register_buffer("seen", torch.full((3,), float(cluster.rank)))
    distribute(Adam(model.parameters()), model, strategy=strategy)
    assert model.seen.tolist() == [0.0] * 3


# Tensors.


@on_ranks(1, 2)
@each_strategy
def test_expanded_buffers_and_frozen_parameters_are_broadcast_and_stay_expanded(cluster, strategy):
    model = small_model()
    values = torch.tensor([[1.0, 2.0, 3.0]]) + cluster.rank
    model.register_buffer("positions", values.expand(4, 3))
    model.register_buffer("conjugated", torch.complex(values, values).conj())
    frozen = torch.nn.Parameter(values[:, :1].double().expand(2, 5), requires_grad=False)
    model[0].register_parameter("frozen", frozen)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    one_update(model, optimizer)
    optimizer.broadcast()
    assert model.positions.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert model.positions.stride() == (0, 1)
    assert model.conjugated.tolist() == [[1 - 1j, 2 - 2j, 3 - 3j]]
    assert frozen.tolist() == [[1.0] * 5] * 2


@on_ranks(2)
@each_strategy
def test_tensors_that_cannot_be_broadcast_are_refused_on_all_ranks(cluster, strategy):
    for tensor, message in (
        (
            torch.arange(6.0).as_strided((3, 3), (1, 1)),
            r"odd has elements that share memory.* use a copy, odd\.clone",
        ),
        (torch.eye(3).to_sparse(), r"odd is torch\.sparse_coo.*: use a dense tensor"),
    ):
        model = small_model()
        model.register_buffer("odd", tensor if cluster.rank == 1 else torch.zeros(3, 3))
        with pytest.raises(UserError, match=rf"^rank 1 on \S+: {message}"):
            distribute(Adam(model.parameters()), model, strategy=strategy)
    model = small_model()
    model.expanded = torch.nn.Parameter(torch.ones(1, 3).expand(4, 3))
    with pytest.raises(UserError, match=r"expanded is no ordinary tensor.*: give it memory of its own"):
        distribute(Adam(model.parameters()), model, strategy=strategy)


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"accumulate": 2}, {"defer_averaging": True}])
def test_a_frozen_model_takes_every_call_and_trains_once_it_is_unfrozen(cluster, strategy, options):
    model, oracle = small_model(), small_model()
    optimizer = distribute(
        Adam(model.requires_grad_(False).parameters(), eps=1e-2), model, strategy=strategy, **options
    )
    before = everything(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step()
    optimizer.zero_grad()
    optimizer.synchronize()
    assert optimizer.clip_grad_norm_(1.0).item() == 0.0
    optimizer.broadcast()
    optimizer.load_state_dict(optimizer.state_dict())
    assert everything(model, optimizer) == before
    model.requires_grad_(True)
    if not options or "defer_averaging" in options:
        reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
        compare_with_one_process(model, optimizer, oracle, reference, cluster)


@on_ranks(2)
@each_strategy
def test_ranks_that_part_while_all_is_frozen_are_named(cluster, strategy):
    model = small_model().requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    optimizer.param_groups[0]["lr"] = 0.1 + cluster.rank
    with pytest.raises(JobError, match=r"lr of parameter group 0: 0\.1 on rank 0, 1\.1 on rank 1"):
        optimizer.step()


# Forward passes that change parameters.


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_an_embedding_with_max_norm_is_refused_on_several_ranks_with_the_remedy(cluster, strategy, kind):
    model = torch.nn.Sequential(kind(9, 4, max_norm=0.5))
    if cluster.size == 1:
        optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
        return
    message = r"0\.weight has max_norm=0\.5: .* module\.weight\.renorm_\(2, 0, 0\.5\)"
    with pytest.raises(UserError, match=message):
        distribute(Adam(model.parameters()), model, strategy=strategy)
    model.append(torch.nn.Linear(4, 2))
    optimizer = distribute(Adam(model[1].parameters()), model, strategy=strategy)
    with pytest.raises(UserError, match=message):
        optimizer.add_param_group({"params": [model[0].weight]})


@on_ranks(2)
@each_strategy
def test_rows_that_are_shortened_after_each_step_are_identical_on_all_ranks(cluster, strategy):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    optimizer = distribute(Adam(model.parameters(), lr=0.1), model, strategy=strategy)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.tensor([step + cluster.rank])).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model[0].weight.renorm_(2, 0, 0.5)
    require_consistent(cluster, model, optimizer, sharded=strategy == "sharded")
    assert model[0].weight.norm(dim=1).max() < 0.5001


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("norm", ["parametrization", "hook"])
def test_spectral_norm_is_the_same_on_all_ranks_as_in_one_process(cluster, strategy, norm):
    wrap = torch.nn.utils.spectral_norm if norm == "hook" else torch.nn.utils.parametrizations.spectral_norm

    def build():
        model = small_model()
        wrap(model[2])
        return model

    torch.manual_seed(0)
    model, oracle = build(), build()
    oracle.load_state_dict(model.state_dict())
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy)
    reference = torch.optim.Adam(oracle.parameters(), eps=1e-2)
    compare_with_one_process(model, optimizer, oracle, reference, cluster)
    assert same_everywhere(everything(model, optimizer))


# Classes derived from Adam.


class Counting(Adam):
    """Has a required argument, which its `step` uses, and an attribute that hides a default of the class."""

    decay = 1.0
    _own = None

    def __init__(self, params, factor, **options):
        self.factor, self._own = factor, [factor]
        super().__init__(params, **options)
        self.decay = 0.5

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(self.factor * self.decay * self._own[0])
        return super().step(closure)

    def add_param_group(self, param_group):
        param_group.setdefault("factor", self.factor)
        super().add_param_group(param_group)


@on_ranks(1, 2)
@each_strategy
def test_a_class_derived_from_adam_may_have_a_constructor_of_its_own(cluster, strategy):
    model, oracle = small_model(), small_model()
    adam = Counting(model.parameters(), 1.25, eps=1e-2)
    torch.optim.lr_scheduler.StepLR(adam, 1)  # replaces its step()
    optimizer = distribute(adam, model, strategy=strategy)
    reference = Counting(oracle.parameters(), 1.25, eps=1e-2)
    compare_with_one_process(model, optimizer, oracle, reference, cluster)
    optimizer.load_state_dict(optimizer.state_dict())
    compare_with_one_process(model, optimizer, oracle, reference, cluster)


@on_ranks(2, "mpi")
def test_a_class_derived_from_adam_works_with_adasum(cluster):
    model = small_model()
    optimizer = distribute(Counting(model.parameters(), 1.25, eps=1e-2), model, op="adasum")
    one_update(model, optimizer)
    assert same_everywhere(digest(list(model.parameters())))


# Gradients that a loop keeps.


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("cleared_by", ["optimizer", "model"])
def test_gradients_that_a_loop_keeps_do_not_change(cluster, strategy, deferred, cleared_by):
    model = small_model()
    model.unused = torch.nn.Parameter(torch.ones(0, dtype=torch.float64))
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, defer_averaging=deferred)
    keep = {
        "object": lambda p: p.grad,
        "view": lambda p: p.grad[:1],
        "detached": lambda p: p.grad.detach(),
        "array": lambda p: p.grad.numpy(),
        "graph": lambda p: (p.grad * torch.ones_like(p, requires_grad=True)).grad_fn,
    }
    kept, expected = [], []
    for number, (name, of) in enumerate([*keep.items(), *keep.items()]):
        (optimizer if cleared_by == "optimizer" else model).zero_grad()
        if number < 9 or cluster.rank or cluster.size == 1:  # then a rank without a loss
            model(ones(number + cluster.rank)).sum().backward()
        optimizer.step()
        p = model[0].weight
        expected.append(p.grad.flatten()[0].item())
        kept.append((name, of(p)))
        del p
    for (name, held), value in zip(kept, expected, strict=True):
        held = held._saved_self if name == "graph" else held
        assert torch.as_tensor(held).flatten()[0].item() == value
    assert len(set(expected)) > 5


@on_ranks(2)
def test_a_loop_that_keeps_the_last_gradients_uses_two_memories_and_another_loop_one(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model)

    def places(keeps):
        kept, found = None, set()
        for _ in range(6):
            optimizer.zero_grad()
            with optimizer.no_sync():
                model(ones()).sum().backward()
            model(ones()).sum().backward()
            kept = [p.grad for p in model.parameters()] if keeps else None
            optimizer.step()
            found.add(model[0].weight.grad.data_ptr())
        return len(found), kept

    assert places(keeps=False)[0] == 1
    assert places(keeps=True)[0] == 2
    places(keeps=False)
    assert places(keeps=False)[0] == 1


@on_ranks(1, 2)
@each_strategy
@pytest.mark.parametrize("options", [{}, {"defer_averaging": True}, {"max_grad_norm": 0.5}])
def test_gradients_in_a_flat_buffer_of_the_loop_are_the_mean(cluster, strategy, options):
    def train_flat(model, optimizer, parts):
        params = list(model.parameters())
        flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
        pieces = flat.split([p.numel() for p in params])
        for p, piece in zip(params, pieces, strict=True):
            p.grad = piece.view_as(p)
        for number, (inputs, targets) in enumerate(parts):
            flat.zero_()
            F.mse_loss(model(inputs), targets).backward()
            if model is not oracle:
                optimizer.synchronize()
            elif "max_grad_norm" in options:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            if "max_grad_norm" not in options:
                flat.mul_(0.01 / flat.norm() * (1 + number))
            optimizer.step()
            assert all(p.grad.data_ptr() == q.data_ptr() for p, q in zip(params, pieces, strict=True))

    model, oracle = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters(), eps=1e-2), model, strategy=strategy, **options)
    train_flat(oracle, torch.optim.Adam(oracle.parameters(), eps=1e-2), batches(4, 12))
    train_flat(model, optimizer, [share(batch, cluster)[0] for batch in batches(4, 12)])
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@each_strategy
def test_a_gradient_that_a_loop_holds_while_it_accumulates_becomes_the_mean(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.no_sync():
            model(ones(cluster.rank)).sum().backward()
        held = [p.grad for p in model.parameters()]
        model(ones()).sum().backward()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
        assert same_everywhere(digest(held))
        optimizer.step()
