"""Batch normalization over the global batch, on CPUs and GPUs (Horovod's own supports GPU tensors only).

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with mean and variance over the samples of all ranks. Every
layer makes one small all-reduce in the forward and one in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_adam.distributed.context import horovod


class SyncBatchNorm(_BatchNorm):
    """Batch normalization with the statistics of all ranks' samples in training.

    Takes the place of `torch.nn.BatchNorm1d`, `2d` and `3d`. Every rank must run it equally often and in the same
    order, with at least one sample. In evaluation, and on one rank, it is PyTorch's own.
    """

    collective_name: str = ""  # prefix of the names of the collectives; set by `convert`

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the normalized input.

        Args:
            input: of shape (samples, channels, …).
        """
        batch_statistics = self.training or self.running_mean is None
        if horovod().size() == 1 or not batch_statistics:
            return super().forward(input)
        self._check_input_dim(input)
        normalize: Any = _Normalize.apply
        output: torch.Tensor
        output, mean, variance, count = normalize(input, self.weight, self.bias, self.eps, self.collective_name)
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        batches, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        assert batches is not None and running_mean is not None and running_var is not None
        batches.add_(1)
        weight = self.momentum if self.momentum is not None else 1.0 / batches.item()
        running_mean.lerp_(mean.to(running_mean.dtype), weight)
        running_var.lerp_(variance.to(running_var.dtype), weight)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every batch normalization of the model a `SyncBatchNorm`, in place, keeping parameters and buffers.

    Args:
        model: the same on all ranks.

    Returns:
        The model.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _BatchNorm):
            synchronized: Any = layer
            synchronized.__class__ = SyncBatchNorm
            synchronized.collective_name = f"hvd_adam.batchnorm.{name}"
    return model


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, name: str
    ) -> tuple[torch.Tensor, ...]:
        wide = x if x.dtype == torch.float64 else x.float()
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(wide, dim=others, correction=0)
        samples = x.numel() // x.shape[1]
        # Sums in float64: the variance is a small difference of large numbers.
        sums = torch.cat([mean.double(), (variance + mean * mean).double(), mean.new_ones(1).double()]) * samples
        sums = horovod().allreduce(sums, op=horovod().Sum, name=f"{name}.forward")
        total_mean, total_square = (sums[:-1] / sums[-1]).chunk(2)
        total_variance = total_square - total_mean * total_mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse = (total_variance + eps).rsqrt().to(wide.dtype).view(shape)
        normalized = (wide - total_mean.to(wide.dtype).view(shape)) * inverse
        ctx.save_for_backward(normalized, inverse, weight, sums[-1])
        ctx.name, ctx.others, ctx.shape, ctx.has_bias = name, others, shape, bias is not None
        output = normalized if weight is None else normalized * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        ctx.mark_non_differentiable(total_mean, total_variance, sums[-1])
        return output.to(x.dtype), total_mean, total_variance, sums[-1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        normalized, inverse, weight, count = ctx.saved_tensors
        wide = gradient.to(normalized.dtype)
        local = torch.stack([wide.sum(ctx.others), (wide * normalized).sum(ctx.others)])
        total = horovod().allreduce(local.double(), op=horovod().Sum, name=f"{ctx.name}.backward") / count
        mean, projection = (row.to(wide.dtype).view(ctx.shape) for row in total)
        scale = inverse if weight is None else inverse * weight.view(ctx.shape)
        x_gradient = (wide - mean - normalized * projection) * scale
        # Gradients of the parameters are this rank's: the optimizer averages them.
        weight_gradient = None if weight is None else local[1].to(weight.dtype)
        bias_gradient = local[0].to(weight.dtype) if ctx.has_bias else None
        return x_gradient.to(gradient.dtype), weight_gradient, bias_gradient, None, None
