"""What a run is told: typed configurations of the commands, and their ranges. Imports no torch.

A field's help text is its documentation: `python -m hvd_adam.train --help` prints it. Underscores in names
are dashes on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hvd_adam.errors import UserError
from hvd_adam.schedule import DECAYS, SCALING_RULES

# PyTorch's names, by what --precision calls them.
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def option(default: Any, help: str) -> Any:
    """A field of a configuration: its default, and what `--help` says of it."""
    return field(default=default, metadata={"help": help})


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raises UserError, with the option's name, its value and what it must be, unless that holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {wanted}")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    dataset: str = option("digits", "digits, cifar10, synthetic, or package.module:function")
    data_dir: str = option("data", "folder that holds the data set, or where cifar10 is downloaded to")
    download: bool = option(True, "download cifar10 where it is missing")
    positive_class: str | None = option(None, "tell this class from all the others")
    synthetic_shape: str = option("3x32x32", "channels x height x width of the synthetic images")
    synthetic_classes: int = option(10, "classes of the synthetic data set, ≥ 2")
    synthetic_samples: int = option(4096, "training images of the synthetic data set")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU where there is one")

    def __post_init__(self) -> None:
        require(self.synthetic_classes >= 2, "synthetic-classes", self.synthetic_classes, "at least 2")
        require(self.synthetic_samples >= 1, "synthetic-samples", self.synthetic_samples, "at least 1")
        self.synthetic_size()

    def synthetic_size(self) -> tuple[int, int, int]:
        """The synthetic images' channels, height and width."""
        parts = self.synthetic_shape.lower().split("x")
        valid = len(parts) == 3 and all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts)
        require(valid, "synthetic-shape", self.synthetic_shape, "CHANNELSxHEIGHTxWIDTH, as in 3x32x32")
        channels, height, width = (int(part) for part in parts)
        return channels, height, width


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Everything that decides a training run."""

    model: str = option("cnn", "cnn, mlp, a torchvision model such as resnet18, or package.module:function")
    dropout: float = option(0.0, "dropout of the cnn, 0 ≤ p < 1")
    epochs: int = option(20, "passes over the training images")
    max_steps: int | None = option(None, "stop after so many updates, if that is sooner")
    batch_size: int | None = option(None, "images per rank and micro-batch (default: 32)")
    global_batch_size: int | None = option(None, "images per update over all ranks, instead of --batch-size")
    accumulate: int = option(1, "micro-batches to one update, ≥ 1")

    lr: float = option(1e-3, "learning rate for one rank's batch, before scaling")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's decay rates of the moments, as in 0.9,0.999")
    eps: float = option(1e-8, "Adam's ε, outside the root")
    weight_decay: float = option(0.0, "weight decay, ≥ 0")
    decoupled_weight_decay: bool = option(False, "decay the weights apart from the gradient, as AdamW does")
    amsgrad: bool = option(False, "divide by the largest second moment so far")
    implementation: Literal["auto", "fused", "foreach", "reference"] = option(
        "auto", "how Adam computes: auto takes the compiled kernel for 2^20 parameters and more"
    )
    max_grad_norm: float | None = option(None, "clip the averaged gradient to this norm")
    max_skipped: int = option(20, "end the job after more updates in a row that were skipped as not finite")

    lr_scaling: Literal["linear", "sqrt", "none"] = option(
        "linear", "how the learning rate (sqrt: betas and eps too) follows ranks × accumulate"
    )
    warmup_epochs: float = option(1.0, "epochs from the unscaled to the scaled learning rate; may be 0.5")
    lr_decay: Literal["constant", "cosine", "linear", "step"] = option("cosine", "decay after the warm-up")
    lr_decay_epochs: str = option("", "epochs of the step decay, as in 30,60,80")
    lr_decay_factor: float = option(0.1, "multiplier at each epoch of the step decay")

    strategy: Literal["allreduce", "sharded"] = option(
        "allreduce", "sharded: each rank keeps one N-th of the optimizer state (ZeRO stage 1)"
    )
    op: Literal["average", "adasum"] = option("average", "how gradients are combined")
    compression: Literal["none", "fp16", "bf16"] = option("none", "what gradients travel as")
    precision: Literal["fp32", "bf16", "fp16", "fp64", "float32", "bfloat16", "float16", "float64"] = option(
        "fp32", "arithmetic of the model; bf16 and fp16 are autocast"
    )
    sync_batchnorm: bool = option(False, "normalise batches over all ranks instead of each by itself")
    channels_last: bool = option(False, "keep images and weights in channels-last order")
    compile: bool = option(False, "compile the model with torch.compile")

    seed: int = option(0, "decides weights, sample order and augmentation, ≥ 0")
    output_dir: str | None = option(None, "run folder (default: runs/<date>-<dataset>-<model>)")
    resume: str = option(
        "auto", "auto: go on with the run in --output-dir, if there is one; never; or a checkpoint to start from"
    )
    checkpoint_every: int | None = option(None, "updates between two checkpoints (default: an epoch's)")
    keep: int = option(2, "how many of the newest checkpoints to keep, besides the best")
    max_time: float | None = option(None, "seconds after which to save and stop, with exit code 75")
    elastic: bool = option(False, "go on when ranks are lost or added, under launch/elastic.sh")
    commit_every: int = option(10, "elastic: updates between two copies in memory; so many are repeated at most")
    stall_timeout: float = option(600.0, "seconds without progress after which the job ends with a report")
    deterministic: bool = option(False, "refuse operations whose result may differ from run to run")
    check_consistency_every: int | None = option(
        None, "updates between two checks that all ranks have the same weights and optimizer state"
    )
    log_every: int = option(10, "updates between two lines of metrics")
    eval_every: int = option(1, "epochs between two evaluations; the last epoch is always evaluated")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "precision", PRECISIONS.get(self.precision, self.precision))
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "global_batch_size", "accumulate"):
            require(
                getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1"
            )
        for name in ("log_every", "eval_every", "keep", "max_skipped", "commit_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("checkpoint_every", "check_consistency_every"):
            every = getattr(self, name)
            require(every is None or every >= 1, name, every, "at least 1")
        seconds = self.max_time
        require(seconds is None or seconds > 0, "max-time", seconds, "above 0")
        patience = self.stall_timeout
        require(patience > 0 and math.isfinite(patience), "stall-timeout", patience, "above 0")
        for name in ("lr", "eps", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "0 or above")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", f"{self.betas[0]:g},{self.betas[1]:g}", "two numbers in [0, 1)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(0 < self.lr_decay_factor <= 1, "lr-decay-factor", self.lr_decay_factor, "in (0, 1]")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2⁶³)")
        clip = self.max_grad_norm
        require(clip is None or (clip > 0 and math.isfinite(clip)), "max-grad-norm", clip, "above 0")
        require(self.lr_scaling in SCALING_RULES, "lr-scaling", self.lr_scaling, f"one of {SCALING_RULES}")
        require(self.lr_decay in DECAYS, "lr-decay", self.lr_decay, f"one of {DECAYS}")

    def _check_combinations(self) -> None:
        if self.batch_size is not None and self.global_batch_size is not None:
            raise UserError("--batch-size and --global-batch-size exclude each other: give one")
        if (self.lr_decay == "step") != bool(self.milestones()):
            raise UserError("--lr-decay step and --lr-decay-epochs go together, as in --lr-decay-epochs 30,60,80")
        if self.op == "adasum":
            if self.strategy == "sharded":
                raise UserError("--op adasum combines updates of whole tensors: use --strategy allreduce")
            if self.max_grad_norm is not None or self.precision == "fp16":
                raise UserError(
                    "--op adasum combines the ranks' own steps: no --max-grad-norm, no --precision fp16"
                )
            if self.compression == "bf16":
                raise UserError("--op adasum has no bf16 compression: use --compression none or fp16")

    def milestones(self) -> tuple[float, ...]:
        """The epochs of the step decay, ascending."""
        try:
            epochs = tuple(float(part) for part in self.lr_decay_epochs.split(",") if part.strip())
        except ValueError:
            epochs = (math.nan,)
        valid = all(epoch > 0 for epoch in epochs) and list(epochs) == sorted(set(epochs))
        require(valid, "lr-decay-epochs", self.lr_decay_epochs, "ascending epochs, as in 30,60,80")
        return epochs

    def global_batch(self, size: int) -> int:
        """Images per update over `size` ranks, at the start of a run.

        Raises:
            UserError: --global-batch-size does not divide among the ranks and micro-batches, and is not --elastic.
        """
        parts = size * self.accumulate
        if self.global_batch_size is None:
            return (self.batch_size or 32) * parts
        if self.global_batch_size % parts and not self.elastic:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} does not divide by {size} ranks × "
                f"{self.accumulate} micro-batches: use a multiple of {parts}"
            )
        return self.global_batch_size


@dataclass(frozen=True)
class EvaluateConfig:
    """What `python -m hvd_adam.evaluate` is told."""

    checkpoint: str = option("", "run folder, checkpoints folder or one checkpoint")
    dataset: str | None = option(None, "another data set than the one trained on, with the same classes")
    data_dir: str | None = option(None, "where the data set lies now, if it has moved")
    batch_size: int = option(256, "images per rank and batch")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU where there is one")
    json: bool = option(False, "print one JSON object instead of lines")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("--checkpoint is missing: give a run folder or a checkpoint")
        require(self.batch_size >= 1, "batch-size", self.batch_size, "at least 1")
