"""The command-line options of `bench wire`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_adam.bench.config import DEFERRED, OURS, RanksConfig, require_training, words
from hvd_adam.config import option, require

# DistributedDataParallel, by communication hook. PyTorch refuses the hook for bf16 without NCCL.
DDP_VARIANTS = ("ddp", "ddp-fp16", "ddp-bf16", "ddp-powersgd")
_GPU_ONLY = ("ddp-bf16",)

_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SLOWEST, _FASTEST = 1e6, 1e11  # bit/s


@dataclass(frozen=True)
class WireConfig(RanksConfig):
    """Compares compressions of gradients by time, bytes sent and error, over any link: hvd_adam and DDP."""

    np: int = option(2, "number of ranks, at least 2")
    models: str = option("mlp", "models to train: mlp (10.5 M parameters) or as in --model of hvd_adam.train")
    link: str | None = option(
        None,
        "rates of a link between two hosts to train over, as in 100Mbit,1Gbit,3Gbit: the hosts are network "
        "namespaces of this machine, which needs root (default: no link)",
    )
    batch_size: int = option(32, "images per rank")
    repeats: int = option(3, "rounds; in each, every variant has a turn")
    steps: int = option(10, "timed steps per turn")
    variants: str = option(
        "all",
        f"variants to compare, as in {OURS}allreduce-none,{OURS}allreduce-int4{DEFERRED},{','.join(DDP_VARIANTS)}",
    )
    timeout: float = option(600.0, "time limit in seconds of a variant's start and warm-up, and of each turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_training(self, least_ranks=2, peers=DDP_VARIANTS, ours=f"{OURS}STRATEGY-COMPRESSION")
        if self.link is not None:
            self.rates()
            require(self.np == 2, "np", self.np, "2 with --link, which joins two hosts of one rank each")
            require(self.device != "cuda", "device", self.device, "auto or cpu with --link")

    def model_names(self) -> tuple[str, ...]:
        """Returns the models to train."""
        return words(self.models)

    def rates(self) -> dict[str, int]:
        """Returns the rates of the link in bit/s, by their names in --link; empty without it."""
        if self.link is None:
            return {}
        rates = {word: _bits_per_second(word) for word in words(self.link)}
        valid = bool(rates) and all(rate is not None for rate in rates.values())
        require(valid, "link", repr(self.link), "rates from 1Mbit to 100Gbit, as in 100Mbit,1Gbit,3Gbit")
        return {word: rate for word, rate in rates.items() if rate is not None}

    def variant_names(self, ours: Sequence[str], device: str) -> tuple[str, ...]:
        """Returns the variants to compare.

        Args:
            ours: those of hvd_adam; with the suffix `DEFERRED` they defer averaging, as `train` does.
            device: "cpu" or "cuda".

        Raises:
            UserError: an unknown variant.
        """
        known = (*ours, *(name for name in DDP_VARIANTS if device == "cuda" or name not in _GPU_ONLY))
        names = words(self.variants)
        for name in names:
            require(
                name in ("all", *known) or name.removesuffix(DEFERRED) in ours,
                "variants",
                name,
                f"some of {', '.join(known)} on this device ({device})",
            )
        return tuple(dict.fromkeys(chosen for name in names for chosen in (known if name == "all" else (name,))))


def _bits_per_second(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text.lower())
    rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    return round(rate) if _SLOWEST <= rate <= _FASTEST else None
