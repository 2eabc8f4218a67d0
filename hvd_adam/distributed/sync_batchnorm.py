"""Batch normalization over the global batch, on CPUs and GPUs (Horovod's own supports GPU tensors only).

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with mean and variance over the samples of all ranks. In
training every layer makes one small all-reduce in the forward and one in the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from hvd_adam.distributed.context import current_rank, horovod
from hvd_adam.errors import UserError

_MOST_NAMED = 5  # layers in one message


class SyncBatchNorm(_BatchNorm):
    """Batch normalization with the statistics of all ranks' samples in training.

    `SyncBatchNorm1d`, `2d` and `3d` are also `torch.nn.BatchNorm1d`, `2d` and `3d`, so that code which selects
    layers by class finds them. In training every rank must run a layer equally often and in the same order, with
    at least one sample. In evaluation there is no collective, and a layer is PyTorch's own; so it is on one rank.
    It can be differentiated once: second derivatives raise `RuntimeError`.
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
        if not self.training or horovod().size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        normalize: Any = _Normalize.apply
        output: torch.Tensor
        output, mean, variance, count = normalize(input, self.weight, self.bias, self.eps, self.collective_name)
        if self.track_running_stats:
            self._update_running_statistics(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        batches, weight = self.num_batches_tracked, self.momentum or 0.0
        if batches is not None:
            batches.add_(1)
            weight = self.momentum if self.momentum is not None else 1.0 / batches.item()
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


# PyTorch's class comes first: it only checks the input's dimensions, and `forward` is that of SyncBatchNorm.
class SyncBatchNorm1d(BatchNorm1d, SyncBatchNorm):
    """`torch.nn.BatchNorm1d` over all ranks."""


class SyncBatchNorm2d(BatchNorm2d, SyncBatchNorm):
    """`torch.nn.BatchNorm2d` over all ranks."""


class SyncBatchNorm3d(BatchNorm3d, SyncBatchNorm):
    """`torch.nn.BatchNorm3d` over all ranks."""


_SYNCHRONIZED: Mapping[type, type[SyncBatchNorm]] = {
    BatchNorm1d: SyncBatchNorm1d,
    BatchNorm2d: SyncBatchNorm2d,
    BatchNorm3d: SyncBatchNorm3d,
}


def convert(model: torch.nn.Module, *, strict: bool = False) -> torch.nn.Module:
    """Makes every `torch.nn.BatchNorm1d`, `2d` and `3d` of the model a `SyncBatchNorm`, in place.

    Only the class of a layer changes. Parameters, buffers, options, mode, hooks and attributes remain the same
    objects.

    Exactly these three classes are converted. A layer of a class derived from them, such as timm's
    `BatchNormAct2d` or `torch.nn.SyncBatchNorm`, or with a `forward` of its own, may compute something else, which
    a conversion would drop. It is kept as it is, and normalizes each rank's own batch. That gives other weights
    than were asked for, so one warning names these layers; `strict` makes it an error, as
    `train --sync-batchnorm` does. A class of yours is synchronized if it derives from `SyncBatchNorm1d`, `2d` or
    `3d` and its `forward` calls `super().forward`. Convert before you register parametrizations, which change the
    class of a layer. Layers without batch statistics, such as `torch.nn.InstanceNorm2d`, are not concerned.

    Args:
        model: the same on all ranks; it may be a batch normalization itself.
        strict: refuse a model with a batch normalization that cannot be converted.

    Returns:
        The model.

    Raises:
        UserError: a lazy layer has not seen a batch, or, with `strict`, a layer cannot be converted; nothing has
            been changed.
    """
    found = {name: layer for name, layer in model.named_modules() if _is_batch_norm(layer)}
    uninitialized = [name for name, layer in found.items() if _is_uninitialized(layer)]
    if uninitialized:
        raise UserError(
            f"batch normalization without a size yet: {_listed(uninitialized, found)}; run one batch through the "
            "model before it is converted"
        )
    kept = [name for name, layer in found.items() if not (_is_plain(layer) or isinstance(layer, SyncBatchNorm))]
    if kept:
        message = (
            f"batch normalization that is not synchronized, because only torch.nn.BatchNorm1d, 2d and 3d are: "
            f"{_listed(kept, found)}; use these classes, or derive from {__name__}.SyncBatchNorm2d"
        )
        if strict:
            raise UserError(message)
        if current_rank() == 0:
            logging.getLogger("hvd_adam").warning(message)
    for name, layer in found.items():
        if name not in kept:
            synchronized: Any = layer
            synchronized.__class__ = _SYNCHRONIZED.get(type(layer), type(layer))
            synchronized.collective_name = synchronized.collective_name or f"hvd_adam.batchnorm.{name}"
    return model


def _is_batch_norm(layer: torch.nn.Module) -> bool:
    """Returns whether a layer normalizes by the statistics of a batch, scripted layers included."""
    scripted = isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in getattr(layer, "original_name", "")
    return scripted or isinstance(layer, _BatchNorm)


def _is_plain(layer: torch.nn.Module) -> bool:
    """Returns whether a layer computes exactly what PyTorch's class does; a wrapped `forward` is an attribute."""
    return type(layer) in _SYNCHRONIZED and "forward" not in vars(layer)


def _is_uninitialized(layer: torch.nn.Module) -> bool:
    return isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()


def _listed(names: Sequence[str], layers: Mapping[str, torch.nn.Module]) -> str:
    """Returns names and classes of layers for a message."""
    named = [f"{name or 'the model itself'} ({type(layers[name]).__name__})" for name in names[:_MOST_NAMED]]
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return ", ".join(named + more)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, name: str
    ) -> tuple[torch.Tensor, ...]:
        wide = x if x.dtype == torch.float64 else x.float()
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(wide, dim=others, correction=0)
        samples = x.numel() // x.shape[1]
        if not samples:  # NaN of both, which would be NaN in all sums
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        # Sums in float64: the variance is a small difference of large numbers.
        mean, variance = mean.double(), variance.double()
        sums = torch.cat([mean, variance + mean * mean, mean.new_ones(1)]) * samples
        sums = horovod().allreduce(sums, op=horovod().Sum, name=f"{name}.forward")
        total_mean, total_square = (sums[:-1] / sums[-1]).chunk(2)
        total_variance = (total_square - total_mean * total_mean).clamp_(min=0)
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse = (total_variance + eps).rsqrt().to(wide.dtype).view(shape)
        normalized = (wide - total_mean.to(wide.dtype).view(shape)) * inverse
        ctx.save_for_backward(normalized, inverse, weight, sums[-1])
        ctx.name, ctx.others, ctx.shape = name, others, shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = normalized if weight is None else normalized * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        ctx.mark_non_differentiable(total_mean, total_variance, sums[-1])
        return output.to(x.dtype), total_mean, total_variance, sums[-1]

    @staticmethod
    @once_differentiable  # the saved tensors do not lead back to the input
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
        bias_gradient = None if ctx.bias_dtype is None else local[0].to(ctx.bias_dtype)
        return x_gradient.to(gradient.dtype), weight_gradient, bias_gradient, None, None
