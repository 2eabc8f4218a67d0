"""Batch normalisation over the whole global batch, on CPUs and GPUs (Horovod's own takes GPU tensors only).

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with means and variances over the samples of all ranks;
the backward pass adds up its two sums over the ranks too. One small all-reduce each way for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_adam.distributed.context import horovod


class SyncBatchNorm(_BatchNorm):
    """As `torch.nn.BatchNorm*d` of any number of dimensions, but in training over all ranks.

    Every rank must run it equally often, in the same order, with at least one sample. In evaluation, and on one
    rank, it is PyTorch's own.
    """

    name: str = ""  # of the collectives; set by `convert`

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises input of shape (samples, channels, …)."""
        batch_statistics = self.training or self.running_mean is None
        if horovod().size() == 1 or not batch_statistics:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self.name)
        if self.training and self.track_running_stats:
            self._track(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces every batch normalisation in the model by `SyncBatchNorm`, keeping parameters and buffers."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _BatchNorm):
            layer.__class__ = SyncBatchNorm
            layer.name = f"hvd_adam.batchnorm.{name}"
    return model


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, name: str) -> tuple:
        wide = x if x.dtype == torch.float64 else x.float()
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(wide, dim=others, correction=0)
        samples = x.numel() // x.shape[1]
        # Sums in float64: the variance is a small difference of large ones.
        sums = torch.cat([mean.double(), (variance + mean * mean).double(), mean.new_ones(1).double()]) * samples
        sums = horovod().allreduce(sums, op=horovod().Sum, name=f"{name}.forward")
        total_mean, total_square = (sums[:-1] / sums[-1]).chunk(2)
        total_variance = total_square - total_mean * total_mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse = (total_variance + eps).rsqrt().to(wide.dtype).view(shape)
        normalised = (wide - total_mean.to(wide.dtype).view(shape)) * inverse
        ctx.save_for_backward(normalised, inverse, weight, sums[-1])
        ctx.name, ctx.others, ctx.shape, ctx.has_bias = name, others, shape, bias is not None
        output = normalised if weight is None else normalised * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        ctx.mark_non_differentiable(total_mean, total_variance, sums[-1])
        return output.to(x.dtype), total_mean, total_variance, sums[-1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple:
        normalised, inverse, weight, count = ctx.saved_tensors
        wide = gradient.to(normalised.dtype)
        local = torch.stack([wide.sum(ctx.others), (wide * normalised).sum(ctx.others)])
        total = horovod().allreduce(local.double(), op=horovod().Sum, name=f"{ctx.name}.backward") / count
        mean, projection = (row.to(wide.dtype).view(ctx.shape) for row in total)
        scale = inverse if weight is None else inverse * weight.view(ctx.shape)
        x_gradient = (wide - mean - normalised * projection) * scale
        # The parameters' gradients stay local: the optimizer averages them.
        weight_gradient = None if weight is None else local[1].to(weight.dtype)
        bias_gradient = local[0].to(weight.dtype) if ctx.has_bias else None
        return x_gradient.to(gradient.dtype), weight_gradient, bias_gradient, None, None
