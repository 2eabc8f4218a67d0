"""`Objective`: the loss that training minimizes, and the metrics that evaluation adds to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hvd_adam.config import metric_names
from hvd_adam.data.protocols import Batch
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure, resolve

Function = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """Loss and metrics of a run: cross-entropy, or functions of the user's own.

    Attributes:
        dtype: the outputs of the model are cast to it, where they are a floating-point tensor.
        loss_name: `--loss`; None for cross-entropy.
        own_loss: its function: the mean loss of (outputs, targets), a scalar tensor.
        label_smoothing: of the cross-entropy in training, in [0, 1); evaluation has none.
        metrics: functions by name: values of shape (samples,) of (outputs, targets).
    """

    dtype: torch.dtype
    loss_name: str | None
    own_loss: Function | None
    label_smoothing: float
    metrics: Mapping[str, Function]

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: torch.dtype) -> Objective:
        """Imports the functions that a configuration names.

        Args:
            config: of the training, by option; options that an older checkpoint lacks have their defaults.
            dtype: of outputs.

        Raises:
            UserError: a function cannot be imported.
        """
        name = config.get("loss")
        return cls(
            dtype=dtype,
            loss_name=name,
            own_loss=None if name is None else resolve(name, "--loss"),
            label_smoothing=config.get("label_smoothing", 0.0),
            metrics={
                short: resolve(reference, "--metrics")
                for short, reference in metric_names(config.get("metrics")).items()
            },
        )

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean training loss of a micro-batch: a scalar tensor."""
        if self.own_loss is not None:
            return self.own_loss(self._cast(outputs), targets)
        return F.cross_entropy(self._cast(outputs), targets, label_smoothing=self.label_smoothing)

    def test_loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the test losses of a batch: a scalar tensor."""
        if self.own_loss is not None:
            return self.own_loss(self._cast(outputs), targets) * len(targets)
        return F.cross_entropy(self._cast(outputs), targets, reduction="sum")

    def metric_sums(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Returns the sum of each metric over a batch: float64, shape (metrics,).

        Raises:
            UserError: a metric fails, or does not return one value per sample.
        """
        sums = [self._values(name, outputs, targets).sum(dtype=torch.float64) for name in self.metrics]
        return torch.stack(sums) if sums else targets.new_empty(0, dtype=torch.float64)

    def _values(self, name: str, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        what = f"--metrics: {name}"
        try:
            values = self.metrics[name](self._cast(outputs), targets)
        except Exception as error:
            raise UserError(f"{what} fails: {failure(error)}") from error
        if not isinstance(values, torch.Tensor) or values.shape != (len(targets),):
            raise UserError(
                f"{what} must return one value per sample, a tensor of shape ({len(targets)},), not {kind(values)}"
            )
        if values.is_complex():
            raise UserError(f"{what} returns complex values: return real numbers")
        return values

    def _cast(self, outputs: Any) -> Any:
        is_float = isinstance(outputs, torch.Tensor) and outputs.is_floating_point()
        return outputs.to(self.dtype) if is_float else outputs

    def try_out(self, model: torch.nn.Module, model_name: str, train: Batch, test: Batch, classes: int) -> None:
        """Checks that model, loss and metrics fit each other and the data; changes and draws nothing.

        Args:
            model: not yet distributed.
            model_name: for messages.
            train: a few samples with targets as training has them.
            test: the same samples with targets as evaluation has them.
            classes: number of classes; 0 if the data has none.

        Raises:
            UserError: one of them fails, or has a result of the wrong kind.
        """
        inputs, targets = train
        given = f"inputs of shape {tuple(inputs.shape)}"
        training = model.training
        cuda = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error is one line, and training itself warns again
            try:
                outputs = model.eval()(inputs)
            except Exception as error:
                raise UserError(f"model {model_name!r} with {given} fails: {failure(error)}") from error
            finally:
                model.train(training)
            self._try_loss(outputs, targets, f"model {model_name!r} with {given}", classes)
            self.metric_sums(outputs, test[1])

    def _try_loss(self, outputs: Any, targets: torch.Tensor, model: str, classes: int) -> None:
        if self.own_loss is None and kind(outputs) != f"a tensor of shape {(len(targets), classes)}":
            raise UserError(
                f"{model} returns {kind(outputs)}, not logits of shape {(len(targets), classes)}; for other "
                "outputs give a --loss"
            )
        where = f"--loss {self.loss_name or 'cross-entropy'} of {kind(outputs)} and targets of shape "
        where += f"{tuple(targets.shape)}, {targets.dtype}"
        try:
            loss = self.loss(outputs, targets)
        except Exception as error:
            raise UserError(f"{where} fails: {failure(error)}") from error
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
            raise UserError(f"{where} is {kind(loss)}: return a scalar tensor, such as the mean over the samples")
        if not loss.requires_grad:
            raise UserError(
                f"{where} is not differentiable: no gradient leads from it to a weight that is trained; compute "
                "it with operations of torch, without detach(), item() and argmax()"
            )


def kind(value: object) -> str:
    """Describes a result for a message: the shape of a tensor, the type of anything else."""
    if isinstance(value, torch.Tensor):
        whole = "" if value.is_floating_point() or value.dtype == torch.bool else f" and dtype {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)}{whole}"
    return f"a {type(value).__name__}"
