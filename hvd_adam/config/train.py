"""`TrainConfig`: the options of `python -m hvd_adam.train`, and the ranges that it checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hvd_adam import recipes
from hvd_adam.config.combinations import require_combination
from hvd_adam.config.data import DataConfig
from hvd_adam.config.effects import require_effect
from hvd_adam.config.functions import metric_names, require_plain, require_reference
from hvd_adam.config.options import option, require
from hvd_adam.errors import UserError
from hvd_adam.schedule import DECAYS, SCALING_RULES

# PyTorch's names of dtypes, and what --precision calls them.
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Trains a model with Adam, data-parallel over all ranks that the launcher started."""

    # The order in which --help lists the options, the frequent ones first.
    GROUPS: ClassVar[dict[str, str]] = {
        "frequent options": "dataset model epochs batch_size lr output_dir",
        "data": "data_args data_dir image_size cache max_corrupt workers transforms mixup download positive_class "
        "synthetic_shape synthetic_classes synthetic_samples seed",
        "model": "model_args init_from freeze ema dropout sync_batchnorm channels_last compile",
        "loss and metrics": "loss label_smoothing metrics",
        "optimizer": "weight_decay decoupled_weight_decay weight_decay_on betas eps amsgrad max_grad_norm "
        "max_skipped state_format implementation",
        "schedule": "max_steps max_time lr_scaling warmup_epochs lr_decay lr_decay_epochs lr_decay_factor",
        "distribution": "global_batch_size accumulate strategy local_steps islands outer_lr outer_momentum "
        "compression bucket_mib release_gradients tune op elastic commit_every stall_timeout "
        "check_consistency_every",
        "precision and device": "precision device threads deterministic",
        "checkpoints": "resume checkpoint_every keep allow_data_change",
        "logging": "log_every eval_every eval_batch_size noise_scale noise_scale_form",
    }
    EXAMPLES: ClassVar[str] = f"""examples:
  python -m hvd_adam.train --epochs 3
  horovodrun -np 2 python -m hvd_adam.train --dataset cifar10 --model resnet18 --output-dir runs/first
  python -m hvd_adam.train --dataset package.module:function --data-dir photos
  python -m hvd_adam.train --model package.module:build --model-args '{{"width": 64}}' --loss package.module:loss
  python -m hvd_adam.train --config recipe:imagefolder --data-dir photos --cache /tmp/cache
  python -m hvd_adam.train --lr 0.002 --print-config > run.yaml
  python -m hvd_adam.train --config run.yaml --output-dir runs/second
The last command, repeated, resumes its run.
recipes for --config recipe:NAME: {", ".join(recipes.names())}"""

    model: str = option(
        "cnn",
        "cnn, mlp, a torchvision classifier such as resnet18, or a function of yours as package.module:function",
    )
    model_args: Mapping[str, Any] | None = option(
        None, """arguments of your function for the model, as in '{"width": 64}'"""
    )
    init_from: str | None = option(
        None, "run folder or checkpoint of another run: start with those of its weights that fit", path=True
    )
    freeze: str | None = option(
        None, "parameters not to train: patterns of their names with *, separated by commas, as in 'layer1.*'"
    )
    ema: float | None = option(
        None, "decay of a moving average of weights and buffers, in (0, 1), which is evaluated and saved too"
    )
    loss: str | None = option(
        None, "function of (outputs, targets) as package.module:function; a mean (default: cross-entropy)"
    )
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy, 0 ≤ x < 1")
    metrics: str | None = option(
        None, "functions of (outputs, targets) with one value per sample, separated by commas: their test means"
    )
    transforms: str | None = option(
        None, "function of one training input, a uint8 image or what your data set returns; drawn per sample"
    )
    mixup: float | None = option(None, "α > 0: mix each training sample with another, with shares of Beta(α, α)")
    dropout: float = option(0.0, "dropout probability of the cnn, 0 ≤ p < 1")
    epochs: int = option(20, "number of passes over the training images, ≥ 1")
    max_steps: int | None = option(None, "stop after this many updates if the epochs have more, ≥ 1")
    batch_size: int | None = option(None, "images per rank and micro-batch, ≥ 1 (default: 32)")
    global_batch_size: int | None = option(
        None, "images per update over all ranks and micro-batches, ≥ 1; replaces --batch-size"
    )
    accumulate: int = option(1, "number of micro-batches whose gradients are accumulated for one update, ≥ 1")

    lr: float = option(1e-3, "learning rate for the batch of one rank, ≥ 0; --lr-scaling scales it")
    betas: tuple[float, float] = option(
        (0.9, 0.999), "Adam's β₁,β₂: decay rates of the first and second moment, each in [0, 1)"
    )
    eps: float = option(1e-8, "Adam's ε, added to the root of the second moment, ≥ 0")
    weight_decay: float = option(0.0, "weight decay coefficient, ≥ 0")
    decoupled_weight_decay: bool = option(
        False, "apply weight decay to the weights instead of the gradient, as AdamW does"
    )
    weight_decay_on: Literal["all", "matrices"] = option(
        "all", "matrices: no weight decay for tensors of fewer than two dimensions, as biases are"
    )
    amsgrad: bool = option(False, "divide by the maximum of all second moments so far")
    state_format: Literal["float32", "bfloat16", "8bit"] = option(
        "float32", "how Adam holds the moments of large tensors: 8 bytes a parameter, 4, or 2.1"
    )
    implementation: Literal["auto", "fused", "foreach", "reference"] = option(
        "auto", "implementation of Adam; auto: fused (a compiled kernel) from 2^20 parameters on, else foreach"
    )
    max_grad_norm: float | None = option(None, "clip the norm of the averaged gradient to this value, > 0")
    max_skipped: int = option(
        20, "end the job after more than this many updates in a row with gradients that are not finite, ≥ 1"
    )

    lr_scaling: Literal["linear", "sqrt", "halflife", "none"] = option(
        "linear",
        "scaling with k = ranks × micro-batches: linear: --lr ×k; sqrt: --lr ×√k, and betas and eps "
        "too; halflife: the second of betas to its k-th power, and --lr as it is; --strategy local: linear and "
        "sqrt multiply --lr and eps by √islands, too",
    )
    warmup_epochs: float = option(
        1.0,
        "epochs in which the learning rate rises linearly from --lr to its scaled value, ≥ 0; may be a fraction",
    )
    lr_decay: Literal["constant", "cosine", "linear", "step"] = option(
        "cosine", "shape of the decay after the warm-up; cosine and linear end at 0"
    )
    lr_decay_epochs: str = option(
        "", "for --lr-decay step: epochs at which the learning rate is multiplied by the factor, as in 30,60,80"
    )
    lr_decay_factor: float = option(0.1, "for --lr-decay step: the factor, in (0, 1]")

    strategy: Literal["allreduce", "sharded", "local"] = option(
        "allreduce",
        "sharded: each of N ranks holds 1/N of the optimizer state (ZeRO stage 1) instead of all of it; local: "
        "ranks, or --islands, update by themselves, and average weights every --local-steps updates (DiLoCo)",
    )
    local_steps: int = option(50, "with --strategy local: updates of each island between two meetings, ≥ 1")
    islands: int | str | None = option(
        None,
        "with --strategy local: ranks that average the gradients of every update among themselves: host: those of "
        "each host; N: N islands of consecutive ranks (default: every rank is an island)",
    )
    outer_lr: float = option(1.0, "with --strategy local: learning rate of the outer step at meetings, > 0")
    outer_momentum: float = option(0.0, "with --strategy local: Nesterov momentum of the outer step, in [0, 1)")
    op: Literal["average", "adasum"] = option("average", "how gradients of the ranks are combined")
    compression: Literal["none", "fp16", "bf16", "int8", "int4", "auto", "auto:lossless", "auto:any"] = option(
        "none",
        "format in which gradients are sent; int8 and int4 have error feedback; auto:any: the fastest of none, "
        "bf16, int8 and int4, measured in the first updates; auto (auto:lossless): only what rounds no gradient",
    )
    bucket_mib: float = option(8.0, "gradients are reduced in buckets of at most so many MiB, > 0")
    release_gradients: bool = option(
        False,
        "update each bucket during backward and give the memory of its gradients back, so that two buckets exist "
        "instead of all gradients; one that is not finite ends the job",
    )
    tune: Literal["off", "lossless", "any"] = option(
        "off",
        "measure before the first update which of --strategy, --compression, --bucket-mib and --threads are the "
        "fastest, and use them; lossless: only what rounds no gradient; any: bf16, int8 and int4, too",
    )
    precision: Literal["fp32", "bf16", "fp16", "fp64", "float32", "bfloat16", "float16", "float64"] = option(
        "fp32", "precision of the model; bf16 and fp16 use autocast, with fp32 weights"
    )
    sync_batchnorm: bool = option(
        False, "compute batch-normalization statistics over all ranks instead of on each rank"
    )
    channels_last: bool = option(False, "store images and weights in channels-last memory format")
    compile: bool = option(False, "compile the model with torch.compile")

    seed: int = option(0, "seed of weights, sample order and augmentation, in [0, 2^63)")
    output_dir: str | None = option(None, "run folder (default: runs/<date>-<time>-<dataset>-<model>)", path=True)
    resume: str = option(
        "auto",
        "auto: resume the run in --output-dir if there is one; never; or the path of a checkpoint to start from",
        path=True,
    )
    allow_data_change: bool = option(
        False, "resume a run whose data set has other images of the same classes than before"
    )
    checkpoint_every: int | None = option(
        None, "updates between checkpoints, ≥ 1 (default: one checkpoint per epoch)"
    )
    keep: int = option(2, "number of newest checkpoints to keep, ≥ 1; the best one is kept too")
    max_time: float | None = option(
        None, "seconds after which to save a checkpoint and stop with exit code 75, > 0"
    )
    elastic: bool = option(False, "continue when ranks are lost or added; needs launch/elastic.sh")
    commit_every: int = option(
        10,
        "with --elastic: updates between copies of the state in memory, ≥ 1; at most so many are repeated "
        "(--strategy local: those of a round)",
    )
    stall_timeout: float = option(
        600.0, "seconds without progress after which the job ends with a report of all ranks, > 0"
    )
    threads: int | None = option(
        None, "PyTorch's threads on the CPU in each rank, ≥ 1 (default: the rank's share of the cores)"
    )
    deterministic: bool = option(False, "refuse operations that may give different results from run to run")
    check_consistency_every: int | None = option(
        None,
        "updates between checks that weights and optimizer state are identical on all ranks, ≥ 1 (default: never)",
    )
    log_every: int = option(10, "updates between lines of metrics, ≥ 1")
    eval_every: int = option(1, "epochs between evaluations, ≥ 1; the last epoch is always evaluated")
    eval_batch_size: int = option(256, "samples per rank and batch of an evaluation, ≥ 1")
    noise_scale: int | None = option(
        None, "updates between measurements of the gradient noise scale, ≥ 1 (default: never)"
    )
    noise_scale_form: Literal["gradient", "adam"] = option(
        "gradient", "noise scale of the gradients, or of the gradients divided by Adam's √v̂ + ε"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "precision", PRECISIONS.get(self.precision, self.precision))
        self._check_numbers()
        self._check_functions()
        require_combination(self)
        if (self.lr_decay == "step") != bool(self.milestones()):
            raise UserError("--lr-decay step and --lr-decay-epochs go together, as in --lr-decay-epochs 30,60,80")
        require_effect(self)

    def _check_numbers(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "global_batch_size", "accumulate", "threads"):
            require(
                getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1"
            )
        for name in "log_every eval_every eval_batch_size keep max_skipped commit_every local_steps".split():
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("checkpoint_every", "check_consistency_every", "noise_scale"):
            every = getattr(self, name)
            require(every is None or every >= 1, name, every, "at least 1")
        seconds = self.max_time
        require(seconds is None or seconds > 0, "max-time", seconds, "above 0")
        patience = self.stall_timeout
        require(0 < patience < math.inf, "stall-timeout", patience, "above 0 and finite")
        for name in ("lr", "eps", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(math.isfinite(value), name, value, "a finite number")
            require(value >= 0, name, value, "0 or above")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", f"{self.betas[0]:g},{self.betas[1]:g}", "two numbers in [0, 1)")
        require(0 < self.bucket_mib < math.inf, "bucket-mib", self.bucket_mib, "above 0 and finite")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(0 < self.lr_decay_factor <= 1, "lr-decay-factor", self.lr_decay_factor, "in (0, 1]")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2⁶³)")
        require(0 < self.outer_lr < math.inf, "outer-lr", self.outer_lr, "above 0 and finite")
        require(0 <= self.outer_momentum < 1, "outer-momentum", self.outer_momentum, "in [0, 1)")
        is_number = isinstance(self.islands, int) and self.islands >= 1
        require(self.islands in (None, "host") or is_number, "islands", self.islands, "host, or a number ≥ 1")
        clip = self.max_grad_norm
        require(clip is None or 0 < clip < math.inf, "max-grad-norm", clip, "above 0 and finite")
        require(self.lr_scaling in SCALING_RULES, "lr-scaling", self.lr_scaling, f"one of {SCALING_RULES}")
        require(self.lr_decay in DECAYS, "lr-decay", self.lr_decay, f"one of {DECAYS}")

    def _check_functions(self) -> None:
        require_plain(self.model_args, "model-args")
        require_reference(self.loss, "loss")
        require_reference(self.transforms, "transforms")
        metric_names(self.metrics)
        require(0 <= self.label_smoothing < 1, "label-smoothing", self.label_smoothing, "in [0, 1)")
        mixup = self.mixup
        require(mixup is None or (mixup > 0 and math.isfinite(mixup)), "mixup", mixup, "above 0")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "in (0, 1)")

    def milestones(self) -> tuple[float, ...]:
        """Returns the epochs of the step decay, ascending."""
        try:
            epochs = tuple(float(part) for part in self.lr_decay_epochs.split(",") if part.strip())
        except ValueError:
            epochs = (math.nan,)
        valid = all(epoch > 0 for epoch in epochs) and list(epochs) == sorted(set(epochs))
        require(valid, "lr-decay-epochs", self.lr_decay_epochs, "ascending epochs, as in 30,60,80")
        return epochs

    def global_batch(self, size: int) -> int:
        """Returns the images per update over all ranks, at the start of a run.

        Args:
            size: number of ranks.

        Raises:
            UserError: without --elastic, --global-batch-size is no multiple of ranks × micro-batches, or
                --noise-scale is given with one rank and micro-batch.
        """
        parts = size * self.accumulate
        if parts == 1 and self.noise_scale is not None and not self.elastic:
            raise UserError(
                f"--noise-scale {self.noise_scale} compares ranks, or micro-batches, of which there is one: use "
                "more ranks or --accumulate 2, or leave it out"
            )
        if self.global_batch_size is None:
            return (self.batch_size or 32) * parts
        if self.global_batch_size % parts and not self.elastic:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} does not divide by {size} ranks × "
                f"{self.accumulate} micro-batches: use a multiple of {parts}"
            )
        return self.global_batch_size
