"""Loops with several micro-batches per update, with a GradScaler, or with two optimizers.

Every public function is a loop; see `helpers.idioms`.
"""

from contextlib import nullcontext
from itertools import chain

import torch
import torch.nn.functional as F

from helpers.idioms import batches, global_batches, mlp, result


def _scaler(**options):
    """Returns a scaler that grows during a loop; its scales are powers of two, so that scaling is exact."""
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**8, "growth_interval": 2, **options})


def _overflowing(loss, step, world, at=2):
    """Makes the loss infinite in one step, on rank 0 only."""
    return loss * float("inf") if step == at and world.rank == 0 else loss


def accumulate_by_hand(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for batch in global_batches(rows=24):
        optimizer.zero_grad()
        parts = world.micro_batches(4, *batch)
        for inputs, targets in parts:
            (F.mse_loss(model(inputs), targets) / len(parts)).backward()
        optimizer.step()
    return result(model)


def accumulate_with_no_sync(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for batch in global_batches(rows=24):
        optimizer.zero_grad()
        parts = world.micro_batches(4, *batch)
        for i, (inputs, targets) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else optimizer.no_sync():
                (F.mse_loss(model(inputs), targets) / len(parts)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    return result(model, also=[norm])


def no_sync_then_two_synchronized_backwards(world):
    """Of four micro-batches the first two are accumulated locally, and the others are averaged one by one."""
    model = mlp()
    optimizer = world.optimizer(model)
    for batch in global_batches(rows=24):
        optimizer.zero_grad()
        parts = world.micro_batches(4, *batch)
        for i, (inputs, targets) in enumerate(parts):
            with optimizer.no_sync() if i < len(parts) - 2 else nullcontext():
                (F.mse_loss(model(inputs), targets) / len(parts)).backward()
        optimizer.step()
    return result(model)


def accumulate_by_option(world):
    model = mlp()
    optimizer = world.wrap(world.adam(model.parameters()), model, accumulate=4)
    for batch in global_batches(rows=24):
        for inputs, targets in world.micro_batches(4, *batch):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    return result(model)


def accumulate_by_option_and_clip(world):
    """Clips after the last micro-batch: by PyTorch's function and by the method, in turn."""
    model = mlp()
    optimizer = world.wrap(world.adam(model.parameters()), model, accumulate=2)
    norms = []
    for step, batch in enumerate(global_batches()):
        parts = world.micro_batches(2, *batch)
        for i, (inputs, targets) in enumerate(parts):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            if i == len(parts) - 1:
                if step % 2:
                    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
                else:
                    norms.append(world.clip_grad_norm_(optimizer, model, 0.3))
            optimizer.step()
    return result(model, also=norms)


def grad_scaler(world):
    model, scaler = mlp(), _scaler()
    optimizer = world.optimizer(model)
    scales = []
    for step, (inputs, targets) in enumerate(batches(world)):
        optimizer.zero_grad()
        loss = _overflowing(F.mse_loss(model(inputs), targets), step, world)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return result(model, also=scales)


def grad_scaler_unscale_and_clip(world):
    model, scaler = mlp(), _scaler()
    optimizer = world.optimizer(model)
    norms, scales = [], []
    for step, (inputs, targets) in enumerate(batches(world)):
        optimizer.zero_grad()
        loss = _overflowing(F.mse_loss(model(inputs), targets), step, world)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        norms += [] if step == 2 else [norm]
        scales.append(scaler.get_scale())
    return result(model, also=[*norms, *scales])


def grad_scaler_accumulation_and_clip(world):
    """Everything that recipes for large batches combine."""
    model, scaler = mlp(), _scaler()
    optimizer = world.optimizer(model)
    for step, batch in enumerate(global_batches()):
        parts = world.micro_batches(2, *batch)
        for i, (inputs, targets) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else optimizer.no_sync():
                loss = F.mse_loss(model(inputs), targets) / len(parts)
                scaler.scale(_overflowing(loss, step, world)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return result(model, also=[scaler.get_scale()])


def loss_scaler_option(world):
    model, scaler = mlp(), _scaler()
    optimizer = world.wrap(world.adam(model.parameters()), model, loss_scaler=scaler)
    scales = []
    for step, (inputs, targets) in enumerate(batches(world)):
        optimizer.zero_grad()
        scaler.scale(_overflowing(F.mse_loss(model(inputs), targets), step, world)).backward()
        world.scaled_step(scaler, optimizer)
        scales.append(scaler.get_scale())
    return result(model, also=scales)


def loss_scaler_option_of_two_optimizers(world):
    """Both backwards come before both steps. The losses overflow in turn, so that the scale changes often."""
    first, second, scaler = mlp(), mlp(), _scaler(growth_interval=1)
    optimizers = [
        world.wrap(world.adam(model.parameters()), model, loss_scaler=scaler) for model in (first, second)
    ]
    scales = []
    for step, (inputs, targets) in enumerate(batches(world)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = F.mse_loss(first(inputs), targets), F.smooth_l1_loss(second(inputs), targets)
        scaler.scale(_overflowing(losses[0], step, world, at=1)).backward()
        scaler.scale(_overflowing(losses[1], step, world, at=3)).backward()
        world.scaled_step(scaler, *optimizers)
        scales.append(scaler.get_scale())
    return result(first, second, also=scales)


def grad_scaler_of_two_optimizers(world):
    """One model, two optimizers, two losses that reach all parameters, one scaler with PyTorch's usual calls."""
    model, scaler = mlp(), _scaler()
    body = world.wrap(world.adam(model[0].parameters()), model)
    head = world.wrap(world.adam(model[2].parameters(), lr=0.02), model)
    for step, (inputs, targets) in enumerate(batches(world)):
        body.zero_grad()
        head.zero_grad()
        outputs = model(inputs)
        losses = F.mse_loss(outputs, targets), F.smooth_l1_loss(outputs, targets)
        scaler.scale(losses[0]).backward(retain_graph=True)
        scaler.scale(_overflowing(losses[1], step, world)).backward()
        scaler.unscale_(body)
        scaler.step(body)
        scaler.step(head)
        scaler.update()
    return result(model, also=[scaler.get_scale()])


class _Gan:
    """A generator and a discriminator with an optimizer each, and their losses."""

    def __init__(self, world):
        self.world = world
        self.generator, self.discriminator = mlp(4, 8, 6), mlp(6, 8, 1)
        self.g_optimizer = world.optimizer(self.generator)
        self.d_optimizer = world.optimizer(self.discriminator, lr=0.02)

    def batches(self):
        """Yields real samples and noise."""
        for real, noise in global_batches():
            yield self.world.shard(real), self.world.shard(torch.cat([noise, noise[:, :1] ** 2], dim=1))

    def d_loss(self, real, noise):
        fake = self.generator(noise).detach()
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def g_loss(self, noise):
        return F.softplus(-self.discriminator(self.generator(noise))).mean()

    def result(self):
        return result(self.generator, self.discriminator)


def gan_discriminator_first(world):
    gan = _Gan(world)
    for real, noise in gan.batches():
        gan.d_optimizer.zero_grad()
        gan.d_loss(real, noise).backward()
        gan.d_optimizer.step()
        gan.g_optimizer.zero_grad()
        gan.g_loss(noise).backward()  # also computes gradients of the discriminator, which are not used
        gan.g_optimizer.step()
    return gan.result()


def gan_generator_first(world):
    gan = _Gan(world)
    for real, noise in gan.batches():
        gan.g_optimizer.zero_grad()
        gan.g_loss(noise).backward()
        gan.g_optimizer.step()
        gan.d_optimizer.zero_grad()
        gan.d_loss(real, noise).backward()
        gan.d_optimizer.step()
    return gan.result()


def gan_zero_grad_between_backward_and_step(world):
    gan = _Gan(world)
    for real, noise in gan.batches():
        gan.g_optimizer.zero_grad()
        gan.g_loss(noise).backward()
        gan.d_optimizer.zero_grad()
        gan.d_loss(real, noise).backward()
        gan.d_optimizer.step()
        gan.g_optimizer.step()
    return gan.result()


def gan_with_a_shared_scaler(world):
    gan, scaler = _Gan(world), _scaler()
    for step, (real, noise) in enumerate(gan.batches()):
        gan.d_optimizer.zero_grad()
        scaler.scale(gan.d_loss(real, noise)).backward()
        scaler.step(gan.d_optimizer)
        gan.g_optimizer.zero_grad()
        scaler.scale(_overflowing(gan.g_loss(noise), step, world)).backward()
        scaler.step(gan.g_optimizer)
        scaler.update()
    return [*gan.result(), *result(also=[scaler.get_scale()])]


def wgan_with_clipped_weights(world):
    """WGAN (Arjovsky et al. 2017): two critic updates per generator update, and weights that are clipped."""
    gan = _Gan(world)
    critic = gan.discriminator
    for step, (real, noise) in enumerate(gan.batches()):
        gan.d_optimizer.zero_grad()
        (critic(gan.generator(noise).detach()).mean() - critic(real).mean()).backward()
        gan.d_optimizer.step()
        for p in critic.parameters():
            p.data.clamp_(-0.2, 0.2)
        if step % 2:
            critic.requires_grad_(False)
            gan.g_optimizer.zero_grad()
            (-critic(gan.generator(noise)).mean()).backward()
            gan.g_optimizer.step()
            critic.requires_grad_(True)
    return gan.result()


def one_optimizer_for_two_models(world):
    first, second = mlp(6, 8, 6), mlp()
    both = torch.nn.ModuleList([first, second])
    optimizer = world.wrap(world.adam(chain(first.parameters(), second.parameters())), both)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(first(inputs), inputs).backward()
        F.mse_loss(second(first(inputs)), targets).backward()
        optimizer.step()
    return result(first, second)
