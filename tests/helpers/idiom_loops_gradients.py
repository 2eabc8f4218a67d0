"""Loops that read or change gradients between `backward` and `step`, or compute them in several passes.

Every public function is a loop; see `helpers.idioms`.
"""

import torch
import torch.nn.functional as F

from helpers.idioms import batches, mlp, result


def clip_by_norm(world):
    model = mlp()
    optimizer = world.optimizer(model)
    norms = []
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
        optimizer.step()
    return result(model, also=norms)


def clip_by_value(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.02)
        optimizer.step()
    return result(model)


def clip_by_the_method_of_the_optimizer(world):
    model = mlp()
    optimizer = world.optimizer(model)
    norms = []
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        norms.append(world.clip_grad_norm_(optimizer, model, 0.3))
        optimizer.step()
    return result(model, also=norms)


def log_the_norm(world):
    model = mlp()
    optimizer = world.optimizer(model)
    log = []
    for inputs, targets in batches(world):
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        log.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
        optimizer.step()
        log.append(world.mean(loss))
    return result(model, also=log)


def skip_large_gradients(world):
    """Drops a batch after its backward if the norm of the gradient is too large."""
    model = mlp()
    optimizer = world.optimizer(model)
    skipped = 0
    for step, (inputs, targets) in enumerate(batches(world)):
        loss = F.mse_loss(model(inputs), targets * (10 if step in (1, 2) else 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        if norm < 4:
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    assert skipped == 2
    return result(model)


def centralize(world):
    """Gradient centralization (Yong et al. 2020): subtracts the mean of each row in place."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        for p in model.parameters():
            if p.dim() > 1:
                p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
        optimizer.step()
    return result(model)


def add_noise(world):
    """Replaces `p.grad` by a sum of it and noise that is identical on all ranks."""
    model = mlp()
    optimizer = world.optimizer(model)
    generator = torch.Generator().manual_seed(3)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        for p in model.parameters():
            p.grad = p.grad + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return result(model)


def assign_gradients(world):
    """Assigns gradients from `torch.autograd.grad`, averaged by the loop itself, as it must do under DDP."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        gradients = torch.autograd.grad(F.mse_loss(model(inputs), targets), list(model.parameters()))
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = world.mean(gradient)
        optimizer.step()
    return result(model)


def tensor_hooks(world):
    model = mlp()
    for p in model[0].parameters():
        p.register_hook(lambda gradient: gradient * 0.25)
    optimizer = world.optimizer(model)
    handle = model[2].bias.register_hook(lambda gradient: gradient * 3)
    for step, (inputs, targets) in enumerate(batches(world)):
        if step == 3:
            handle.remove()
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return result(model)


def post_accumulate_hooks(world):
    """Changes gradients in hooks that run once they are accumulated: some before `distribute`, some after."""
    model = mlp()

    def shrink(p):
        p.grad.mul_(0.25)

    if hasattr(torch.Tensor, "register_post_accumulate_grad_hook"):
        model[0].weight.register_post_accumulate_grad_hook(shrink)
    optimizer = world.optimizer(model)
    if hasattr(torch.Tensor, "register_post_accumulate_grad_hook"):
        model[2].weight.register_post_accumulate_grad_hook(shrink)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return result(model)


def two_losses(world):
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        outputs = model(inputs)
        F.mse_loss(outputs, targets).backward(retain_graph=True)
        outputs.abs().mean().backward()
        optimizer.step()
    return result(model)


def two_losses_of_different_layers(world):
    """Each loss reaches one layer only, through the argument `inputs` of `backward`."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        outputs = model(inputs)
        F.mse_loss(outputs, targets).backward(inputs=list(model[2].parameters()), retain_graph=True)
        F.smooth_l1_loss(outputs, targets).backward(inputs=list(model[0].parameters()))
        optimizer.step()
    return result(model)


def gradient_penalty(world):
    """As in WGAN-GP (Gulrajani et al. 2017): the penalty is a function of the gradient of the inputs."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        inputs.requires_grad_(True)
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        (F.mse_loss(outputs, targets) + 0.5 * penalty).backward()
        optimizer.step()
    return result(model)


def fgsm(world):
    """Adversarial training (Goodfellow et al. 2015): the first backward is for the gradient of the inputs."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        inputs.requires_grad_(True)
        F.mse_loss(model(inputs), targets).backward()
        adversarial = inputs.detach() + 0.1 * inputs.grad.sign()
        optimizer.zero_grad()
        F.mse_loss(model(adversarial), targets).backward()
        optimizer.step()
    return result(model)


def sharpness_aware(world):
    """SAM (Foret et al. 2021): the second backward is at weights moved along the first gradient."""
    model = mlp()
    optimizer = world.optimizer(model)
    for inputs, targets in batches(world):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        moves = [0.1 * p.grad / norm for p in model.parameters()]
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()
    return result(model)


def gradients_set_to_zero(world):
    model = mlp()
    optimizer = world.optimizer(model, weight_decay=0.01)
    for inputs, targets in batches(world):
        optimizer.zero_grad(set_to_none=False)
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return result(model)


def gradients_cleared_by_hand(world):
    """Clears gradients through the model, and by assigning None."""
    model = mlp()
    optimizer = world.optimizer(model)
    for step, (inputs, targets) in enumerate(batches(world)):
        if step % 2:
            model.zero_grad()
        else:
            for p in model.parameters():
                p.grad = None
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return result(model)


def closure(world):
    model = mlp()
    optimizer = world.optimizer(model)
    losses = []
    for inputs, targets in batches(world):

        def evaluate(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        losses.append(world.mean(optimizer.step(evaluate)))
    return result(model, also=losses)
