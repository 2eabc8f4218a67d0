"""The options of `python -m hvd_adam.simulate`: one dataclass for each subcommand. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hvd_adam.config import option, positive_integer, require
from hvd_adam.config.advise import MOST_PRICE
from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import NETWORKS, PRESETS
from hvd_adam.simulate.workload import PUBLISHED

_RATES = {"k": 1e3, "m": 1e6, "g": 1e9}
_LEAST_RATE, _LONGEST_TIME = 1.0, 1e6  # bit/s and seconds: beyond them a step could be infinite
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class CalibrateConfig:
    """Measures this machine and its network, on the ranks of a launcher, and writes what predict needs."""

    EXAMPLES: ClassVar[str] = """examples:
  horovodrun -np 2 python -m hvd_adam.simulate calibrate --models mlp,cnn
  horovodrun -np 8 -H a:4,b:4 python -m hvd_adam.simulate calibrate --models resnet50 --batch-size 64"""

    models: str = option(
        "mlp,cnn",
        "models to measure, as in --model of hvd_adam.train: cnn, mlp, a torchvision classifier or "
        "package.module:function",
    )
    batch_size: int = option(32, "images of a micro-batch, ≥ 1")
    image_size: int = option(32, "height and width of the images, ≥ 8")
    channels: int = option(3, "channels of the images, ≥ 1")
    classes: int = option(10, "classes of the images, ≥ 2")
    repeats: int = option(12, "repetitions of each measurement, ≥ 3")
    output: str = option("calibration.json", "the file to write", path=True)
    force: bool = option(False, "replace the file if it exists")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one, else the CPU")

    def __post_init__(self) -> None:
        require(bool(self.model_names()), "models", repr(self.models), "names of models, as in mlp,cnn")
        require(self.batch_size >= 1, "batch-size", self.batch_size, "at least 1")
        require(self.image_size >= 8, "image-size", self.image_size, "at least 8")
        require(self.channels >= 1, "channels", self.channels, "at least 1")
        require(self.classes >= 2, "classes", self.classes, "at least 2")
        require(self.repeats >= 3, "repeats", self.repeats, "at least 3")

    def model_names(self) -> tuple[str, ...]:
        """Returns the models to measure."""
        return tuple(word.strip() for word in self.models.split(",") if word.strip())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.image_size, self.image_size


@dataclass(frozen=True)
class JobConfig:
    """The job that is predicted: model, machines and numbers of ranks."""

    calibration: str | None = option(None, "file that calibrate has written", path=True)
    preset: str | None = option(None, f"known hardware instead: {', '.join(PRESETS)}")
    model: str | None = option(
        None,
        f"a model of the calibration (default: its first), or with --preset one of {', '.join(PUBLISHED)}",
    )
    throughput: float | None = option(
        None, "with --preset: samples a second of one rank that trains alone (default for P100: published)"
    )
    batch_size: int = option(64, "with --preset: samples of a micro-batch, ≥ 1")
    bucket_mib: int = option(8, "with --preset: MiB of a bucket, ≥ 1; Horovod fuses 64 where hvd_adam has 8")
    ranks: str = option("2,4,8,16,32,64,128,256,512,1024,2048,4096", "numbers of ranks")
    ranks_per_host: int | None = option(None, "ranks of a host, ≥ 1 (default: as calibrated, or of the preset)")
    accumulate: int = option(1, "micro-batches of an update, ≥ 1")
    network: str | None = option(None, f"another network between hosts: {', '.join(NETWORKS)}")
    bandwidth: str | None = option(None, "another bandwidth of a host, as in 1Gbit, headers included")
    latency: str | None = option(None, "another latency between hosts, as in 50us")
    cores_per_host: float | None = option(None, "cores of a host, > 0 (default: as calibrated)")
    json: bool = option(False, "print one JSON object instead of a table")

    def __post_init__(self) -> None:
        if (self.calibration is None) == (self.preset is None):
            raise UserError("give either --calibration FILE or --preset NAME")
        require(self.preset in (None, *PRESETS), "preset", self.preset, f"one of {', '.join(PRESETS)}")
        require(self.network in (None, *NETWORKS), "network", self.network, f"one of {', '.join(NETWORKS)}")
        for name in ("batch_size", "accumulate", "bucket_mib"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        local = self.ranks_per_host
        require(local is None or local >= 1, "ranks-per-host", local, "at least 1")
        # Beyond these bounds a time of the model could be 0 or infinite.
        for name, least, most in (("throughput", 1e-6, 1e12), ("cores_per_host", 0.01, 1e6)):
            value = getattr(self, name)
            require(value is None or least <= value <= most, name, value, f"from {least:g} to {most:g}")
        self._check_effects()
        self.numbers_of_ranks()
        self.bits_per_second()
        self.seconds_of_latency()

    def _check_effects(self) -> None:
        if self.preset is None:
            for name, default in (("throughput", None), ("batch_size", 64), ("bucket_mib", 8)):
                if getattr(self, name) != default:
                    raise UserError(f"--{name.replace('_', '-')} has no effect without --preset")
            return
        known = f"one of {', '.join(PUBLISHED)}"
        if self.model is None:
            raise UserError(f"--preset {self.preset} needs --model, {known}")
        require(self.model in PUBLISHED, "model", self.model, f"{known} with --preset")
        if self.throughput is None and not self.preset.startswith("p100"):
            raise UserError(f"--preset {self.preset} needs --throughput, the samples a second of one rank alone")
        if self.cores_per_host is not None:
            raise UserError("--cores-per-host has no effect with --preset: GPUs compute and communicate")

    def numbers_of_ranks(self) -> tuple[int, ...]:
        """Returns the numbers of ranks, ascending."""
        numbers = [positive_integer(word.strip()) for word in self.ranks.split(",") if word.strip()]
        valid = bool(numbers) and all(1 <= number <= MOST_RANKS for number in numbers)
        require(valid, "ranks", repr(self.ranks), f"numbers from 1 to {MOST_RANKS:,}, as in 2,4,8")
        return tuple(sorted({*numbers}))

    def bits_per_second(self) -> float | None:
        """Returns the bandwidth that was given in bit/s."""
        value = _quantity(self.bandwidth, r"([kmg])bit", _RATES)
        valid = value is None or _LEAST_RATE <= value < math.inf
        require(valid, "bandwidth", self.bandwidth, "a rate, as in 300Mbit or 25Gbit")
        return value

    def seconds_of_latency(self) -> float | None:
        """Returns the latency that was given in seconds."""
        value = _quantity(self.latency, r"(ns|us|ms|s)", _TIMES)
        valid = value is None or 0 < value <= _LONGEST_TIME
        require(valid, "latency", self.latency, "a time, as in 50us or 1ms")
        return value


@dataclass(frozen=True)
class PredictConfig(JobConfig):
    """Predicts how a job scales: time of a step, throughput, efficiency, cost, and what would help most."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.simulate predict --preset h100-ndr400 --model resnet101 --throughput 1500 --ranks 8,64,512
  python -m hvd_adam.simulate predict --preset p100-roce25 --model vgg16 --ranks 4,512 --html vgg16.html"""

    strategy: Literal["allreduce", "sharded"] = option("allreduce", "as in hvd_adam.train")
    compression: Literal["none", "fp16", "bf16", "int8", "int4"] = option("none", "as in hvd_adam.train")
    price: float | None = option(None, "price of a rank and hour, 0 to 1e9, for the price of a million samples")
    plot: str | None = option(None, "also draw the result into this PNG file", path=True)
    html: str | None = option(None, "also write one HTML page, for proposals", path=True)
    force: bool = option(False, "replace files that exist")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range = self.price is None or 0 <= self.price <= MOST_PRICE
        require(in_range, "price", self.price, f"from 0 to {MOST_PRICE:g}")
        is_png = self.plot is None or Path(self.plot).suffix == ".png"
        require(is_png, "plot", self.plot, "a file name that ends in .png")
        is_html = self.html is None or Path(self.html).suffix in (".html", ".htm")
        require(is_html, "html", self.html, "a file name that ends in .html")


@dataclass(frozen=True)
class TuneConfig(JobConfig):
    """Predicts the step with each strategy and compression, the fastest first, for each number of ranks."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.simulate tune --preset p100-roce25 --model vgg16 --ranks 64,512
  python -m hvd_adam.simulate tune --calibration calibration.json --bandwidth 1Gbit --ranks 2 --ranks-per-host 1"""

    allow: Literal["lossless", "any"] = option(
        "any", "as --tune of hvd_adam.train: lossless: no compression; any: bf16, int8 and int4, too"
    )


def _quantity(text: str | None, unit: str, units: dict[str, float]) -> float | None:
    """Returns a number with a unit; 0 for any other text, None without one."""
    if text is None:
        return None
    match = re.fullmatch(rf"(\d+(?:\.\d+)?){unit}", text.lower())
    return float(match[1]) * units[match[2]] if match else 0.0
