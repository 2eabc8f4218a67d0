"""`UpdateTimer`: the time that each update takes, without waiting for the device in between; `agreed_laps`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hvd_adam.distributed.automatic.trial import Lap
from hvd_adam.distributed.context import horovod


def agreed_laps(laps: Sequence[Lap], name: str) -> list[Lap]:
    """Returns the same laps on all ranks: the time on the slowest one, the wait on the one that waits least.

    The rank that computes longest does not wait for others, so its wait is that for the network. Every rank must
    call it.

    Args:
        laps: of this rank; as many on all ranks.
        name: of the collective.
    """
    own = torch.tensor([laps], dtype=torch.float64, device="cpu")
    of_ranks = horovod().allgather(own, name=name) if horovod().size() > 1 else own
    longest, shortest = of_ranks.amax(dim=0), of_ranks.amin(dim=0)
    return [Lap(*pair) for pair in zip(longest[:, 0].tolist(), shortest[:, 1].tolist(), strict=True)]


class UpdateTimer:
    """Times updates, each from the end of the one before.

    On a GPU an event is recorded at the end of each update; they are read in `take`.

    Args:
        device: of the parameters.
        waited: returns the seconds that this process has waited for others so far.

    Attributes:
        count: laps since the last `take` or `restart`.
    """

    def __init__(self, device: torch.device, waited: Callable[[], float]) -> None:
        self._device, self._waited = device, waited
        self.restart()

    @property
    def count(self) -> int:
        """Number of laps since `restart` or `take`."""
        return len(self._laps)

    def restart(self) -> None:
        """Starts the first lap now."""
        self._laps: list[tuple[_Mark, _Mark]] = []
        self._last = self._mark()

    def lap(self, *, counts: bool) -> None:
        """Ends a lap.

        Args:
            counts: whether to keep it.
        """
        before, self._last = self._last, self._mark()
        if counts:
            self._laps.append((before, self._last))

    def take(self) -> list[Lap]:
        """Returns the laps, and forgets them. Waits for the device."""
        laps, self._laps = self._laps, []
        return [Lap(end.since(start), end.waited - start.waited) for start, end in laps]

    def _mark(self) -> _Mark:
        return _Mark(self._device, self._waited())


class _Mark:
    """A point in time of the device, and of the host."""

    def __init__(self, device: torch.device, waited: float) -> None:
        self.waited, self._seconds = waited, time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def since(self, start: _Mark) -> float:
        """Returns the seconds between two points in time."""
        if self._event is None or start._event is None:
            return self._seconds - start._seconds
        self._event.synchronize()
        return float(start._event.elapsed_time(self._event)) / 1e3
