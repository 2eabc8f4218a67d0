"""The command-line options of the benchmarks: one dataclass for each subcommand. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from hvd_adam.config import option, positive_integer, require
from hvd_adam.distributed.placement import cores
from hvd_adam.errors import UserError
from hvd_adam.training.outputs import require_outputs

Number = TypeVar("Number", int, float)

# Prefix of the variants "hvd_adam-STRATEGY". Their list is in distributed.api, which imports torch.
OURS = "hvd_adam-"
COMPRESSED = ("", "-fp16", "-bf16", "-int8", "-int4")  # after the strategy: with this compression
DEFERRED = "-deferred"  # after both: with defer_averaging, as `train` has it
RELEASED = f"{OURS}allreduce-released"  # with release_gradients
PEERS = ("horovod", "horovod-fused", "ddp-fused", "ddp-zero", "plain", "compute")

# Models that `bench adam` takes its tensor shapes from, and its default workloads on a GPU.
TENSOR_LISTS = ("resnet18", "resnet50", "transformer")
GPU_WORKLOADS = ("1M", "16M", "100M", "1G", *TENSOR_LISTS)
CUSTOM = "custom"  # set by --parameters and --tensors

# Suffix of a dtype: with float32 master weights.
MASTER = "-master"
DTYPES = ("float32", "float64", "bfloat16", "float16", f"bfloat16{MASTER}", f"float16{MASTER}")


@dataclass(frozen=True)
class BenchConfig:
    """Options of all benchmarks."""

    json: bool = option(False, "print one JSON object instead of a table")
    plot: str | None = option(None, "also draw the result into this PNG file", path=True)
    force: bool = option(False, "replace the file of --plot if it exists")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto uses a GPU if there is one")

    def __post_init__(self) -> None:
        require(Path(self.plot or "a.png").suffix == ".png", "plot", self.plot, "a file name that ends in .png")
        require_outputs({"--plot": self.plot}, replace=self.force)


@dataclass(frozen=True)
class AdamConfig(BenchConfig):
    """Times one optimizer step without communication: hvd_adam, PyTorch, apex, DeepSpeed, compared with a copy."""

    workloads: str = option(
        "auto",
        "parameters to update: a number in one tensor, as in 16M,1G, or those of resnet18 (11.7 M in 62 tensors), "
        "resnet50 (25.6 M in 161), transformer (1.3 G in 292); auto: resnet18, on a GPU also the others",
    )
    parameters: int | None = option(None, "number of parameters, instead of --workloads")
    tensors: int | None = option(None, "number of tensors that --parameters are divided into (default: 62)")
    threads: str = option("auto", "numbers of threads to compare, as in 1,2; auto: 1, 2, 4, … up to the cores")
    dtype: str = option(
        "auto",
        f"dtypes of the parameters to compare, as in float32,bfloat16; bfloat16{MASTER}, float16{MASTER}: with "
        f"float32 master weights; auto: float32, on a GPU also bfloat16{MASTER}",
    )
    gradients: Literal["auto", "new", "kept"] = option(
        "auto",
        "new: every step gets new gradient tensors, as after zero_grad(); kept: the same, as after "
        "zero_grad(set_to_none=False); auto: new, on a GPU kept",
    )
    reference: bool = option(False, "also time the slow reference above a million parameters")
    repeats: int = option(20, "rounds; in each, every optimizer makes a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
        require(self.parameters is None or self.parameters >= 1, "parameters", self.parameters, "at least 1")
        if self.tensors is not None:
            if self.parameters is None:
                raise UserError("--tensors needs --parameters: --workloads have fixed tensors")
            require(1 <= self.tensors <= self.parameters, "tensors", self.tensors, "from 1 to --parameters")
        if self.parameters is not None and self.workloads != "auto":
            raise UserError("--parameters and --workloads exclude each other: use one")
        self.thread_counts()
        self.workload_names("cpu")
        self.dtype_names("cpu")

    def workload_names(self, device: str) -> tuple[str, ...]:
        """Returns the workloads for device "cpu" or "cuda": numbers of parameters, `TENSOR_LISTS`, or `CUSTOM`."""
        if self.parameters is not None:
            return (CUSTOM,)
        if self.workloads == "auto":
            return GPU_WORKLOADS if device == "cuda" else ("resnet18",)
        names = words(self.workloads)
        valid = bool(names) and all(name in TENSOR_LISTS or flat_elements(name) is not None for name in names)
        wanted = f"numbers of parameters, as in 16M,1G, or some of {', '.join(TENSOR_LISTS)}"
        require(valid, "workloads", self.workloads, wanted)
        return names

    def dtype_names(self, device: str) -> tuple[str, ...]:
        """Returns the `DTYPES` to compare on a device, "cpu" or "cuda"."""
        if self.dtype == "auto":
            return ("float32", f"bfloat16{MASTER}") if device == "cuda" else ("float32",)
        names = words(self.dtype)
        require(
            bool(names) and set(names) <= {*DTYPES}, "dtype", self.dtype, f"one of {', '.join(DTYPES)}, or several"
        )
        return names

    def thread_counts(self) -> tuple[int, ...]:
        """Returns the numbers of threads to compare."""
        most = len(cores())
        if self.threads == "auto":
            return tuple(sorted({*(2**power for power in range(most.bit_length())), most}))
        wanted = f"numbers from 1 to the {most} cores, as in 1,{max(2, most)}"
        return _numbers("threads", self.threads, int, lambda count: 1 <= count <= most, wanted)

    def tensor_sizes(self) -> tuple[int, ...] | None:
        """Returns the number of elements of each tensor; None without --parameters."""
        if self.parameters is None:
            return None
        tensors = self.tensors or min(62, self.parameters)
        size, larger = divmod(self.parameters, tensors)
        return (size + 1,) * larger + (size,) * (tensors - larger)


@dataclass(frozen=True)
class RanksConfig(BenchConfig):
    """Options of all benchmarks on several ranks."""

    launcher: Literal["mpi", "gloo"] = option("mpi", "controller of horovodrun: --mpi or --gloo")
    timeout: float = option(120.0, "time limit in seconds of a variant's start and warm-up, and of each turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.timeout > 0, "timeout", self.timeout, "above 0")


@dataclass(frozen=True)
class StepConfig(RanksConfig):
    """Times whole training steps: hvd_adam by strategy, stock Horovod, DDP, ZeRO, plain PyTorch, no optimizer."""

    np: int = option(2, "number of ranks; one is started without a launcher")
    models: str = option(
        "mlp,cnn,resnet18", "models to train: mlp (10.5 M parameters) or as in --model of hvd_adam.train"
    )
    batch_size: int = option(32, "images per rank")
    precision: Literal["fp32", "bf16"] = option("fp32", "arithmetic of the model; bf16 is autocast")
    channels_last: bool = option(False, "keep images and weights in channels-last order")
    compile: bool = option(False, "compile the model with torch.compile")
    repeats: int = option(5, "rounds; in each, every variant has a turn")
    steps: int = option(10, "timed steps per turn; on a GPU they are timed together")
    variants: str = option(
        "all",
        f"variants to compare, as in {OURS}allreduce,{','.join(PEERS)}; plain, without distribution: --np 1 only",
    )
    timeout: float = option(300.0, "time limit in seconds of a variant's start and warm-up, and of each turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_training(self, least_ranks=1, peers=PEERS, ours=f"{OURS}STRATEGY")
        if "plain" in words(self.variants) and self.np > 1:
            raise UserError("--variants plain trains one rank without distribution: use --np 1, or leave it out")

    def model_names(self) -> tuple[str, ...]:
        """Returns the models to train."""
        return words(self.models)

    def variant_names(self, strategies: Iterable[str]) -> tuple[str, ...]:
        """Returns the variants to compare.

        Args:
            strategies: the strategies of `hvd_adam.distribute`.

        Raises:
            UserError: an unknown variant.
        """
        ours = [OURS + strategy for strategy in strategies]
        usual = (*ours, *(peer for peer in PEERS if peer != "plain" or self.np == 1))
        options = [c + d for c in COMPRESSED for d in ("", DEFERRED)][1:]
        known = (*usual, RELEASED, *(name + option for name in ours for option in options))
        names = usual if self.variants == "all" else words(self.variants)
        for name in names:
            require(name in known, "variants", name, f"some of {', '.join(known)}")
        return names


@dataclass(frozen=True)
class AllreduceConfig(RanksConfig):
    """Times sums over the ranks by message size: Horovod, MPI, torch.distributed, compared with a ring's bound."""

    np: int = option(2, "number of ranks, at least 2")
    sizes: str = option("0.004,0.06,0.25,1,4,8,16,40", "message sizes in MB (a million bytes)")
    repeats: int = option(5, "rounds; in each, every variant has a turn")
    calls: int = option(10, "timed sums of each size per turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.np >= 2, "np", self.np, "at least 2")
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
        require(self.calls >= 1, "calls", self.calls, "at least 1")
        self.elements()

    def elements(self) -> tuple[int, ...]:
        """Returns the message sizes as numbers of float32, ascending."""
        valid, wanted = (lambda size: 4e-6 <= size < math.inf), "sizes in MB, at least 0.000004, as in 0.25,1,40"
        return tuple(
            sorted({round(size * 1e6 / 4) for size in _numbers("sizes", self.sizes, float, valid, wanted)})
        )


@dataclass(frozen=True)
class CheckpointConfig(RanksConfig):
    """Times training with and without checkpoints, which shows the cost of writing them during training."""

    np: int = option(2, "number of ranks")
    models: str = option("cnn,resnet18", "models to train, as in --model of hvd_adam.train")
    batch_size: int = option(32, "images per rank")
    every: int = option(10, "updates between two checkpoints, at least 1")
    steps: int = option(60, "updates per run, at least twice --every")
    repeats: int = option(5, "runs of each kind, interleaved")
    folder: str | None = option(
        None, "existing directory to write to (default: the system's temporary directory)", path=True
    )
    timeout: float = option(300.0, "time limit of a run, in seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("np", "batch_size", "every", "repeats"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.steps >= 2 * self.every, "steps", self.steps, f"at least twice --every ({2 * self.every})")
        require(bool(self.model_names()), "models", repr(self.models), "names of models, as in cnn,resnet18")
        require(
            self.folder is None or Path(self.folder).is_dir(), "folder", self.folder, "a directory that exists"
        )

    def model_names(self) -> tuple[str, ...]:
        """Returns the models to train."""
        return words(self.models)


@dataclass(frozen=True)
class MemoryConfig(RanksConfig):
    """Measures bytes per parameter on a rank by strategy and number of ranks, compared with the prediction."""

    model: str = option("mlp", "mlp (10.5 M parameters) or as in --model of hvd_adam.train")
    np: str = option("1,2,4", "numbers of ranks to compare")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_counts()

    def rank_counts(self) -> tuple[int, ...]:
        """Returns the numbers of ranks to compare."""
        return _numbers("np", self.np, int, lambda count: count >= 1, "numbers of ranks, as in 1,2,4")


@dataclass(frozen=True)
class DataConfig(BenchConfig):
    """Reads a folder of JPEG images from the files and from a packed cache, compared with torch's DataLoader."""

    images: str = option("2000", "numbers of generated images to compare")
    image_size: int = option(224, "height and width of the batches' images, at least 8")
    workers: int = option(2, "worker processes")
    batch_size: int = option(32, "images per batch")
    batches: int = option(20, "batches per turn")
    repeats: int = option(5, "rounds; in each, every variant has a turn")
    timeout: float = option(600.0, "time limit of a variant's start, and of each turn, in seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.device != "cuda", "device", self.device, "auto or cpu: batches are made on the CPU")
        require(self.image_size >= 8, "image-size", self.image_size, "at least 8")
        require(self.workers >= 0, "workers", self.workers, "0 or above")
        for name in ("batch_size", "batches", "repeats"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for count in self.image_counts():
            require(count >= 2 * self.batch_size, "images", self.images, "at least twice --batch-size")

    def image_counts(self) -> tuple[int, ...]:
        """Returns the numbers of images to compare."""
        return _numbers("images", self.images, int, lambda count: count >= 64, "at least 64 each, as in 2000,8000")


def flat_elements(workload: str) -> int | None:
    """Returns the number of parameters of a workload such as "16M" or "1G"; None for other names."""
    match = re.fullmatch("([1-9][0-9]*)([KMG]?)", workload)
    return match and (positive_integer(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]] or None)


def require_training(config: Any, *, least_ranks: int, peers: Sequence[str], ours: str) -> None:
    """Checks what benchmarks that train models with several variants have in common.

    `peers` are the variants of others; `ours` is the form of the names of our own, for messages.
    """
    require(config.np >= least_ranks, "np", config.np, f"at least {least_ranks}")
    for name in ("batch_size", "repeats", "steps"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    require(bool(config.model_names()), "models", repr(config.models), "names of models, as in mlp,cnn")
    require(bool(words(config.variants)), "variants", repr(config.variants), "all, or names of variants")
    for name in words(config.variants):
        known = name in ("all", *peers) or name.startswith(OURS)
        require(known, "variants", name, f"some of {ours}, {', '.join(peers)}")


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a comma-separated list, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(
    name: str, text: str, kind: Callable[[str], Number], valid: Callable[[Number], bool], wanted: str
) -> tuple[Number, ...]:
    try:
        values = tuple(kind(word) for word in words(text))
    except ValueError:
        values = ()
    require(bool(values) and all(map(valid, values)), name, text, wanted)
    return values
