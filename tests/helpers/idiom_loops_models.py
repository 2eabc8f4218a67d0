"""Loops around models whose parameters are shared, unused, recomputed, compiled, derived or replaced in a forward.

Every public function is a loop; see `helpers.idioms`.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from helpers.idioms import batches, mlp, result
from hvd_adam.distributed.sync_batchnorm import convert


def _train(world, model, forward=None, **options):
    """Trains on the usual batches with the mean squared error of `forward`, or else of the model."""
    optimizer = world.optimizer(model, **options)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss((forward or model)(inputs), targets).backward()
        optimizer.step()
    return result(model)


def _checkpoint_shared_layer(world, reentrant):
    model = torch.nn.ModuleDict({"shared": mlp(6, 8, 6), "head": torch.nn.Linear(6, 3).double()})

    def forward(inputs):
        hidden = inputs.clone().requires_grad_(True)
        for _ in range(3):
            hidden = checkpoint(model["shared"], hidden, use_reentrant=reentrant)
        return model["head"](hidden)

    return _train(world, model, forward)


def reentrant_checkpoint_of_a_shared_layer(world):
    return _checkpoint_shared_layer(world, reentrant=True)


def checkpoint_of_a_shared_layer(world):
    return _checkpoint_shared_layer(world, reentrant=False)


def model_inside_a_reentrant_checkpoint(world):
    """All gradients are computed by a backward inside of the backward that the loop has called."""
    model = mlp()
    return _train(world, model, lambda x: checkpoint(model, x.requires_grad_(True), use_reentrant=True))


def shared_layer(world):
    model = torch.nn.ModuleDict({"shared": mlp(6, 8, 6), "head": torch.nn.Linear(6, 3).double()})
    return _train(world, model, lambda x: model["head"](model["shared"](model["shared"](x))))


def tied_weights(world):
    """A language model whose output layer is its embedding; some rows are never used as inputs."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(20, 5), "out": torch.nn.Linear(5, 20)}).double()
    model["out"].weight = model["embed"].weight
    optimizer = world.optimizer(model)
    generator = torch.Generator().manual_seed(7)
    for _ in range(6):
        tokens = world.shard(torch.randint(0, 15, (12, 4), generator=generator))
        optimizer.zero_grad()
        logits = model["out"](model["embed"](tokens[:, :-1]).tanh())
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return result(model)


def embedding_with_unused_rows(world):
    """Each rank uses other rows of the table, some rows are used by none, and one is for padding."""
    model = torch.nn.Sequential(torch.nn.Embedding(30, 4, padding_idx=0), torch.nn.Linear(4, 3)).double()
    optimizer = world.optimizer(model, weight_decay=0.01)
    for step, (_, targets) in enumerate(batches(world)):
        tokens = world.shard((torch.arange(12) * 2 + step) % 24)
        optimizer.zero_grad()
        F.mse_loss(model(tokens), targets).backward()
        optimizer.step()
    return result(model)


def lstm(world):
    model = torch.nn.LSTM(3, 4, num_layers=2, batch_first=True, proj_size=3).double()
    return _train(world, model, lambda x: model(x.view(-1, 2, 3))[0][:, -1])


def attention(world):
    """A transformer layer: several parameters are slices of one, and normalization has its own."""
    layer = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    return _train(world, model, lambda x: model(torch.stack([x, x.flip(1)], dim=1)))


def parametrized_weights(world):
    """Weight normalization: the parameters are a length and a direction, the weight is computed from both."""
    model = mlp()
    weight_norm(model[0])
    model[2] = weight_norm(model[2])
    return _train(world, model)


def weights_pruned_later(world):
    """Pruning renames a parameter while the optimizer has it, and computes the weight from it and a mask."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, (inputs, targets) in enumerate(batches(world)):
        if step == 3:
            prune.l1_unstructured(model[0], "weight", amount=0.25)
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    prune.remove(model[0], "weight")
    return result(model)


def functional_call_with_moved_weights(world):
    model = mlp()
    generator = torch.Generator().manual_seed(5)

    def forward(inputs):
        moved = {
            name: p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in model.named_parameters()
        }
        return functional_call(model, moved, (inputs,))

    return _train(world, model, forward)


def maml(world):
    """Meta-learning (Finn et al. 2017): each row is a task, with an update of its own inside of the loss."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world, rows=6):
        losses = []
        for x, y in zip(inputs, targets, strict=True):
            weights = dict(model.named_parameters())
            inner = F.mse_loss(functional_call(model, weights, (x,)), y)
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), slopes, strict=True)}
            losses.append(F.mse_loss(functional_call(model, fast, (x.flip(0),)), y))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return result(model)


def compiled_model(world):
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    return _train(world, model, compiled)


def compiled_in_place(world):
    model = mlp()
    model.compile(backend="eager")
    return _train(world, model)


def parameter_unused_on_all_ranks(world):
    """Neither weight decay nor moments may move a parameter that never has a gradient."""
    model = torch.nn.ModuleDict({"used": mlp(), "unused": mlp()})
    return _train(world, model, model["used"], weight_decay=0.1)


def layer_used_on_one_rank(world):
    """A mixture of experts: one row goes to the second expert, in some steps none; weights decay."""
    model = torch.nn.ModuleDict({"first": mlp(), "second": mlp()})
    optimizer = world.optimizer(model, weight_decay=0.1)
    for step, (inputs, targets) in enumerate(batches(world, steps=8)):
        routed = world.shard(torch.arange(12) == (step if step % 3 else 12))
        outputs = model["first"](inputs)
        if routed.any():
            outputs = outputs.index_put((routed,), model["second"](inputs[routed]))
        optimizer.zero_grad()
        F.mse_loss(outputs, targets).backward()
        optimizer.step()
    return result(model)


def rank_without_a_loss(world):
    """Only some rows have targets: a rank with no such row calls `step` without `backward`."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, (inputs, targets) in enumerate(batches(world)):
        labeled = world.shard(torch.arange(12) == step) if step % 2 else torch.ones(len(inputs), dtype=torch.bool)
        optimizer.zero_grad()
        if labeled.any():
            errors = (model(inputs[labeled]) - targets[labeled]).square().mean(dim=1)
            (errors.sum() / len(inputs)).backward()
        optimizer.step()
    return result(model)


def rank_with_a_loss_without_parameters(world):
    """The loss of a rank is a constant in some steps, made differentiable so that `backward` accepts it."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, (inputs, targets) in enumerate(batches(world)):
        labeled = world.shard(torch.arange(12) == step) if step % 2 else torch.ones(len(inputs), dtype=torch.bool)
        loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
        if labeled.any():
            loss = loss + (model(inputs[labeled]) - targets[labeled]).square().mean(dim=1).sum() / len(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result(model)


def layers_dropped_at_random(world):
    """Stochastic depth with the same random numbers on all ranks: a layer has no gradient in some steps."""
    model = torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)]).double()
    generator = torch.Generator().manual_seed(1)

    def forward(inputs):
        for layer in model[:-1]:
            if torch.rand((), generator=generator) < 0.5:
                inputs = inputs + layer(inputs).tanh()
        return model[-1](inputs)

    return _train(world, model, forward, weight_decay=0.01)


def learned_loss_weights(world):
    """Two tasks weighted by learned scalars (Kendall et al. 2018); 0-dimensional parameters."""
    model = torch.nn.ModuleDict({"net": mlp()})
    model.register_parameter("log_a", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
    model.register_parameter("log_b", torch.nn.Parameter(torch.ones((), dtype=torch.float64)))
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        outputs = model["net"](inputs)
        optimizer.zero_grad()
        a, b = F.mse_loss(outputs, targets), F.l1_loss(outputs, inputs[:, :3])
        loss = a * torch.exp(-model.log_a) + model.log_a + b * torch.exp(-model.log_b) + model.log_b
        loss.backward()
        optimizer.step()
    return result(model)


def frozen_batch_norm(world):
    """Fine-tuning with the statistics of the pre-trained model."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)).double()
    model(torch.randn(12, 6, dtype=torch.float64))  # the statistics
    model.train()
    model[1].eval()
    return _train(world, model)


def synchronized_batch_norm(world):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    model = model.double()
    return _train(world, convert(model) if world.strategy else model)


def siamese_network(world):
    """One backbone embeds two views in two forwards, with gradients stopped on one side of each pair."""
    model = torch.nn.ModuleDict({"backbone": mlp(6, 8, 4), "predictor": mlp(4, 6, 4)})
    optimizer = world.optimizer(model)
    for inputs, _ in batches(world):
        a, b = model["backbone"](inputs), model["backbone"](inputs.flip(1))
        p, q = model["predictor"](a), model["predictor"](b)
        optimizer.zero_grad()
        loss = -(F.cosine_similarity(p, b.detach()).mean() + F.cosine_similarity(q, a.detach()).mean()) / 2
        loss.backward()
        optimizer.step()
    return result(model)
