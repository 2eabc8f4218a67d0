"""Loops that change what is trained, how, or with which state: schedules, freezing, copies of the model, loading.

Every public function is a loop; see `helpers.idioms`.
"""

import math
import warnings
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from helpers.idioms import batches, global_batches, mlp, result


def _step(optimizer, model, batch):
    """Makes one step as usual and returns the loss."""
    inputs, targets = batch
    optimizer.zero_grad()
    loss = F.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def freeze_and_unfreeze(world):
    """The first layer is frozen for some steps while the optimizer has it; weights decay."""
    model = mlp()
    optimizer = world.optimizer(model, weight_decay=0.1)
    for step, batch in enumerate(batches(world, steps=8)):
        if step in (2, 5):
            model[0].requires_grad_(step == 5)
        _step(optimizer, model, batch)
    return result(model)


def head_first_then_all(world):
    """Trains the last layer with one optimizer, then all layers with another, while the first one still exists."""
    model = mlp()
    model[0].requires_grad_(False)
    head = world.wrap(world.adam(model[2].parameters(), lr=0.05), model)
    for batch in batches(world, steps=3):
        _step(head, model, batch)
    model[0].requires_grad_(True)
    optimizer = world.optimizer(model)
    for batch in batches(world, steps=4):
        _step(optimizer, model, batch)
    return result(model)


def new_optimizer_for_each_phase(world):
    """Replaces the optimizer of all parameters by a new one, in the same variable."""
    model = mlp()
    for rate in (0.05, 0.01, 0.002):
        optimizer = world.optimizer(model, lr=rate)
        for batch in batches(world, steps=3):
            _step(optimizer, model, batch)
    return result(model)


def ema_of_parameters(world):
    model = mlp()
    optimizer = world.optimizer(model)
    ema = deepcopy(model).requires_grad_(False)
    for batch in batches(world):
        _step(optimizer, model, batch)
        for average, p in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(p, 0.1)
    return result(model, ema)


def ema_of_the_state_dictionary(world):
    """As in timm: writes through what `state_dict` of the copy returns, buffers included."""
    model = torch.nn.Sequential(mlp(6, 8, 8), torch.nn.BatchNorm1d(8).eval(), torch.nn.Linear(8, 3)).double()
    optimizer = world.optimizer(model)
    ema = deepcopy(model)
    for batch in batches(world):
        _step(optimizer, model, batch)
        with torch.no_grad():
            for average, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                average.copy_(0.9 * average + 0.1 * value)
    return result(model, ema)


def swa(world):
    model = mlp()
    optimizer = world.optimizer(model)
    average = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    for step, batch in enumerate(batches(world, steps=8)):
        _step(optimizer, model, batch)
        ema.update_parameters(model)
        if step >= 3:
            average.update_parameters(model)
            scheduler.step()
    return result(model, average, ema)


def target_network(world):
    """Q-learning with a copy of the network that follows slowly, once through `load_state_dict`."""
    model = mlp()
    optimizer = world.optimizer(model)
    target = deepcopy(model)
    for step, (states, rewards) in enumerate(batches(world)):
        with torch.no_grad():
            wanted = rewards[:, 0] + 0.9 * target(states.flip(1)).max(dim=1).values
        optimizer.zero_grad()
        F.smooth_l1_loss(model(states)[:, 0], wanted).backward()
        optimizer.step()
        if step == 3:
            target.load_state_dict(model.state_dict())
        with torch.no_grad():
            for slow, p in zip(target.parameters(), model.parameters(), strict=True):
                slow.mul_(0.8).add_(p, alpha=0.2)
    return result(model, target)


def plateau_of_an_averaged_metric(world):
    model = mlp()
    optimizer = world.optimizer(model)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)
    rates = []
    for step, batch in enumerate(batches(world, steps=8)):
        loss = _step(optimizer, model, batch)
        scheduler.step(world.mean(loss * (1 + step % 3)).item())
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 2
    return result(model, also=rates)


def one_cycle_with_momentum(world):
    model = mlp()
    optimizer = world.optimizer(model)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8, cycle_momentum=True)
    betas = []
    for batch in batches(world, steps=8):
        _step(optimizer, model, batch)
        scheduler.step()
        betas.append(optimizer.param_groups[0]["betas"][0])
    return result(model, also=betas)


def scheduler_from_before_distribute(world):
    """A scheduler of the optimizer that `distribute` was given; it must not warn about the order of its calls."""
    model = mlp()
    adam = world.adam(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.LambdaLR(adam, lambda epoch: 0.7**epoch)
    optimizer = world.wrap(adam, model)
    for batch in batches(world):
        _step(optimizer, model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()
    return result(model, also=[optimizer.param_groups[0]["lr"]])


def warm_up_then_cosine(world):
    model = mlp()
    optimizer = world.optimizer(model)
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [3])
    for batch in batches(world, steps=8):
        _step(optimizer, model, batch)
        scheduler.step()
    return result(model, also=[scheduler.get_last_lr()[0]])


def learning_rate_set_by_hand(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for step, batch in enumerate(batches(world)):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / 6))
            group["weight_decay"] = 0.01 * step
        _step(optimizer, model, batch)
    return result(model)


def groups_with_options_of_their_own(world):
    model = mlp()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.05, "betas": (0.7, 0.9)}]
    optimizer = world.wrap(world.adam(groups, amsgrad=True), model)
    for batch in batches(world):
        _step(optimizer, model, batch)
    return result(model)


def decoupled_weight_decay(world):
    model = mlp()
    optimizer = world.optimizer(model, decoupled_weight_decay=True, weight_decay=0.5)
    for batch in batches(world):
        _step(optimizer, model, batch)
    return result(model)


def group_added_later(world):
    model = torch.nn.Sequential(mlp(), torch.nn.Tanh(), mlp(3, 4, 3))
    optimizer = world.wrap(world.adam(model[0].parameters()), model)
    for step, batch in enumerate(batches(world)):
        if step == 3:
            optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.05})
        _step(optimizer, model, batch)
        model[2].zero_grad()
    return result(model)


def roll_back(world):
    """Loads an earlier state of model and optimizer on all ranks, and trains on."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, batch in enumerate(batches(world, steps=8)):
        if step == 2:
            saved = deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if step == 5:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        _step(optimizer, model, batch)
    return result(model)


def resume_with_new_objects(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for batch in batches(world, steps=3):
        _step(optimizer, model, batch)
    states = deepcopy([model.state_dict(), optimizer.state_dict()])
    model = mlp()
    optimizer = world.optimizer(model)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    for batch in batches(world, steps=3):
        _step(optimizer, model, batch)
    return result(model)


def partial_loading_through_the_state_dictionary(world):
    """Copies pre-trained weights into what `state_dict` returns, before and during training."""
    pretrained, model = mlp(), mlp()

    def load():
        own_state = model.state_dict()
        for name, value in pretrained.state_dict().items():
            if name.startswith("0"):
                own_state[name].copy_(value)

    load()
    optimizer = world.optimizer(model)
    for step, batch in enumerate(batches(world)):
        if step == 3:
            load()
            assert torch.equal(model[0].weight, pretrained[0].weight)
        _step(optimizer, model, batch)
    return result(model)


def evaluation_in_between(world):
    model = mlp()
    model.insert(2, torch.nn.BatchNorm1d(8).double().eval())
    optimizer = world.optimizer(model)
    held_out = next(global_batches(1, rows=18))
    log, best = [], math.inf
    for batch in batches(world):
        _step(optimizer, model, batch)
        model.eval()
        with torch.no_grad():
            inputs, targets = map(world.shard, held_out)
            log.append(world.mean(F.mse_loss(model(inputs), targets)))
        if log[-1] < best:
            best, best_state = log[-1], deepcopy(model.state_dict())
    return result(model, also=[*log, *best_state.values()])


def epochs_with_an_uneven_last_batch(world):
    """`DistributedSampler` shuffles 42 samples; the last of four batches has half the size."""
    inputs, targets = next(global_batches(1, rows=42))
    dataset = TensorDataset(inputs, targets)
    sampler = DistributedSampler(dataset, world.size, world.rank, seed=5)
    loader = DataLoader(dataset, batch_size=12 // world.size, sampler=sampler)
    model = mlp()
    optimizer = world.optimizer(model)
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        losses += [world.mean(_step(optimizer, model, batch)) for batch in loader]
    return result(model, also=losses)


def weights_initialized_again(world):
    """Sets the last layer back in place, with the same random numbers on all ranks."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, batch in enumerate(batches(world)):
        if step == 3:
            torch.manual_seed(11)
            model[2].reset_parameters()
        _step(optimizer, model, batch)
    return result(model)
