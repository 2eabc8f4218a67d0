"""`CompareConfig`: the options of `python -m hvd_adam.compare`. Imports no torch."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvd_adam import schedule
from hvd_adam.config import DataConfig, option, positive_integer, require
from hvd_adam.config.effects import require_effect
from hvd_adam.errors import UserError

BETAS, EPS = (0.9, 0.999), 1e-8  # of every optimizer that has them

# The default learning rates of each optimizer. The middle one alone is used in the studies.
OPTIMIZERS: dict[str, tuple[float, ...]] = {
    "adam": (0.001, 0.003, 0.01),
    "adamw": (0.001, 0.003, 0.01),
    "amsgrad": (0.001, 0.003, 0.01),
    "sgd": (0.01, 0.03, 0.1),
    "nadam": (0.001, 0.003, 0.01),
    "radam": (0.001, 0.003, 0.01),
}

# The optimizers that each study trains with by default.
STUDIES: dict[str, tuple[str, ...]] = {
    "optimizers": tuple(OPTIMIZERS),
    "initialization": ("adam", "sgd"),
    "vanishing": ("adam", "sgd"),
    "batch-size": ("adam",),
}

SCALING_RULES = ("none", *(rule for rule in schedule.SCALING_RULES if rule != "none"))


@dataclass(frozen=True)
class CompareConfig(DataConfig):
    """Compares Adam with other optimizers, or studies what training with it depends on, over several seeds."""

    GROUPS: ClassVar[dict[str, str]] = {
        "frequent options": "study optimizers lrs seeds model epochs batch_size dataset output_dir",
        "data": "data_args data_dir image_size cache max_corrupt workers download positive_class synthetic_shape "
        "synthetic_classes synthetic_samples seed",
        "training": "initialization max_steps lr_decay eval_every target device",
        "studies": "batch_sizes depth",
        "output": "resume stall_timeout",
    }
    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.compare --seeds 5
  horovodrun -np 2 python -m hvd_adam.compare --output-dir runs/compare --resume
  python -m hvd_adam.compare --optimizers adam,sgd --lrs adam=0.001,0.003,sgd=0.03,0.1
  python -m hvd_adam.compare --study vanishing --depth 24
The second command, repeated, continues where it was stopped."""

    study: Literal["optimizers", "initialization", "vanishing", "batch-size"] = option(
        "optimizers",
        "optimizers: compare them; initialization: bad and good initial weights; vanishing: deep networks by "
        "activation, normalization and residuals; batch-size: rules that scale the learning rate",
    )
    optimizers: str | None = option(
        None, f"some of {','.join(OPTIMIZERS)} (default: all; adam,sgd in studies, adam for batch-size)"
    )
    lrs: str | None = option(
        None,
        "learning rates to choose from, for all optimizers, as in 0.001,0.003, or for each, as in "
        "adam=0.001,0.003,sgd=0.1 (default: three for each optimizer, one in studies)",
    )
    seeds: int = option(5, "number of runs with each learning rate, which differ in their seeds, ≥ 2")
    seed: int = option(0, "the first seed, in [0, 2^62)")
    model: str = option(
        "cnn",
        "cnn, mlp, a torchvision classifier such as resnet18, or a function of yours as package.module:function",
    )
    initialization: Literal["default", "he"] = option(
        "default", "initial weights: those of --model; he: normal with variance 2/fan-in, biases 0"
    )
    epochs: int = option(6, "number of passes over the training images, ≥ 1")
    max_steps: int | None = option(None, "stop after this many updates if the epochs have more, ≥ 1")
    batch_size: int = option(64, "images per update, ≥ 1; every run is trained by one process")
    lr_decay: Literal["constant", "cosine", "linear"] = option(
        "cosine", "shape of the learning rate's decay; cosine and linear end at 0"
    )
    eval_every: int = option(10, "updates between evaluations on the validation images, ≥ 1")
    target: float = option(0.9, "validation accuracy to which updates and seconds are counted, in (0, 1]")
    batch_sizes: str | None = option(
        None, "with --study batch-size: the batch sizes (default: 1, 2, 4 and 8 times --batch-size)"
    )
    depth: int = option(16, "with --study vanishing: hidden layers of the networks, ≥ 2")
    output_dir: str | None = option(
        None, "folder of the results (default: runs/<date>-<time>-compare-<study>)", path=True
    )
    resume: bool = option(False, "use the finished runs in --output-dir, and make those that are missing")
    stall_timeout: float = option(
        600.0, "seconds without an update on any rank after which the job ends with a report of all ranks, > 0"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "max_steps", "batch_size", "eval_every"):
            require(
                getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1"
            )
        require(self.seeds >= 2, "seeds", self.seeds, "at least 2: one run alone has no standard error")
        require(0 <= self.seed < 2**62, "seed", self.seed, "in [0, 2⁶²)")
        require(0 < self.stall_timeout < math.inf, "stall-timeout", self.stall_timeout, "above 0 and finite")
        require(0 < self.target <= 1, "target", self.target, "above 0 and at most 1")
        require(self.depth >= 2, "depth", self.depth, "at least 2")
        if self.resume and self.output_dir is None:
            raise UserError("--resume needs --output-dir: name the folder of the comparison to continue")
        self._check_effects()
        self.grids()
        self._check_batch_sizes()

    def _check_effects(self) -> None:
        require_effect(self)
        for name, study in (("batch_sizes", "batch-size"), ("depth", "vanishing")):
            if self.study != study and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --study {study}")
        if self.initialization != "default" and self.study in ("initialization", "vanishing"):
            raise UserError(f"--initialization he has no effect with --study {self.study}, which has its own")
        if self.study == "vanishing" and self.model != "cnn":
            raise UserError(
                f"--model {self.model} has no effect with --study vanishing, which has its own networks"
            )

    def _check_batch_sizes(self) -> None:
        if self.study != "batch-size":
            return
        for name, lrs in self.grids().items():
            require(
                len(lrs) == 1, "lrs", self.lrs, f"one rate for {name}, tuned for --batch-size {self.batch_size}"
            )
        for size in self.batch_size_list():
            # Raises if a beta is below 0.
            schedule.scale(size / self.batch_size, "sqrt", lr=1.0, betas=BETAS, eps=EPS)

    def seed_list(self) -> tuple[int, ...]:
        """Returns the seeds."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def optimizer_names(self) -> tuple[str, ...]:
        """Returns the optimizers, each once, in the order given."""
        if self.optimizers is None:
            return STUDIES[self.study]
        names = tuple(dict.fromkeys(filter(None, (part.strip() for part in self.optimizers.split(",")))))
        require(bool(names), "optimizers", repr(self.optimizers), f"some of {', '.join(OPTIMIZERS)}")
        for name in names:
            _require_known(name, "--optimizers")
        return names

    def grids(self) -> dict[str, tuple[float, ...]]:
        """Returns the learning rates of each optimizer, ascending."""
        names = self.optimizer_names()
        if self.lrs is None:
            every = {name: OPTIMIZERS[name] for name in names}
            return every if self.study == "optimizers" else {name: lrs[1:2] for name, lrs in every.items()}
        given = _grids(self.lrs)
        for name in filter(None, given):
            _require_known(name, "--lrs")
            if name not in names:
                raise UserError(f"--lrs has rates for {name}, which is not among --optimizers {','.join(names)}")
        missing = [name for name in names if not given.get(name) and not given.get("")]
        if missing or not all(given.values()):
            empty = missing or [name for name, lrs in given.items() if not lrs]
            raise UserError(f"--lrs is {self.lrs!r}: it has no rate for {', '.join(empty)}")
        return {name: tuple(sorted(set(given.get(name, given.get("", []))))) for name in names}

    def batch_size_list(self) -> tuple[int, ...]:
        """Returns the batch sizes of the study, ascending; --batch-size is always among them."""
        if self.batch_sizes is None:
            return tuple(self.batch_size * factor for factor in (1, 2, 4, 8))
        sizes = [positive_integer(part.strip()) for part in self.batch_sizes.split(",") if part.strip()]
        valid = bool(sizes) and all(sizes)
        require(valid, "batch-sizes", repr(self.batch_sizes), "whole numbers above 0, as in 32,64,128")
        return tuple(sorted({self.batch_size, *sizes}))


def _require_known(name: str, where: str) -> None:
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use some of {', '.join(OPTIMIZERS)}"
        raise UserError(f"{where}: optimizer {name!r} is not known: {hint}")


def _grids(text: str) -> dict[str, list[float]]:
    """Returns the learning rates by optimizer of "adam=0.1,0.2,sgd=0.3"; "" is the key of those without a name."""
    grids: dict[str, list[float]] = {}
    name = ""
    for part in text.split(","):
        before, equals, value = part.rpartition("=")
        if equals:
            name = before.strip()
        lrs = grids.setdefault(name, [])
        if not value.strip():
            continue
        try:
            lr = float(value)
        except ValueError:
            lr = math.nan
        require(0 < lr < math.inf, "lrs", text, "numbers above 0, as in 0.001,0.003 or adam=0.001,sgd=0.1")
        lrs.append(lr)
    return {key: lrs for key, lrs in grids.items() if key or lrs}
