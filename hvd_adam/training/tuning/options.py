"""What `--tune` may choose, in stages, and how it reports a choice. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hvd_adam.text import milliseconds

# Options of `TrainConfig` by name; those that are missing have the values that the user has given.
Options = Mapping[str, Any]

DEFAULT_MIB = 8.0
BUCKETS_MIB = (2.0, DEFAULT_MIB, 32.0)


@dataclass(frozen=True)
class Choice:
    """The options that `--tune` has chosen, and why.

    Attributes:
        allowed: `--tune`: "lossless" or "any".
        ranks: number of ranks that were measured.
        options: what differs from the defaults.
        seconds: median seconds of an update by command line: of the slowest rank; empty if there was nothing to
            compare.
    """

    allowed: str
    ranks: int
    options: dict[str, Any]
    seconds: dict[str, float]

    def summary(self) -> str:
        """Returns what was chosen, and what that gains."""
        if not self.seconds:
            return "tune: uses the defaults: there is nothing to compare on one rank with one thread"
        own, before = self.seconds[command_line(self.options)], self.seconds[command_line({})]
        if not self.options:
            return f"tune: nothing measured is faster than the defaults, {milliseconds(before)} ms an update"
        return (
            f"tune: uses {command_line(self.options)}: {milliseconds(own)} ms an update, {milliseconds(before)} "
            f"with the defaults ({before / own:.2f} times as fast)"
        )


def command_line(options: Options) -> str:
    """Returns options as they are written on the command line; "the defaults" if there are none."""
    return (
        " ".join(f"--{name.replace('_', '-')} {_shown(value)}" for name, value in options.items())
        or "the defaults"
    )


def stages(
    compressions: Sequence[str], strategies: Sequence[str], *, ranks: int, threads: int, gradient_bytes: int
) -> Iterator[Sequence[Options]]:
    """Yields what to compare in each stage, the defaults first; each stage continues with the choice before it.

    Strategy and compression are compared together: what one costs depends on the other. Buckets and threads matter
    less, and are compared by themselves.

    Args:
        compressions: those that are allowed, the most exact one first.
        strategies: those that the model allows, the default first.
        ranks: number of ranks.
        threads: PyTorch's threads in a rank; 1 on GPUs, where they matter little.
        gradient_bytes: of all gradients.
    """
    if ranks > 1:
        pairs = product(compressions, strategies)
        yield [changed({"strategy": strategy, "compression": name}) for name, strategy in pairs]
        # As many bytes as all gradients have or more are one bucket.
        counts = {size: -(-gradient_bytes // int(size * 2**20)) for size in BUCKETS_MIB}
        others = [size for size in BUCKETS_MIB if counts[size] != counts[DEFAULT_MIB]]
        if others:
            yield [{}, *({"bucket_mib": size} for size in others)]
    fewer = sorted({threads - 1, threads // 2, 1} & set(range(1, threads)), reverse=True)
    if fewer:
        yield [{}, *({"threads": number} for number in fewer)]


def changed(options: Options) -> Options:
    """Returns strategy and compression without those that are the defaults."""
    defaults = {"strategy": "allreduce", "compression": "none"}
    return {name: value for name, value in options.items() if value != defaults[name]}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
