"""`SlowRankDetector`: decides from the times of all ranks which of them holds the others up. Pure: no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from hvd_adam.training.slow_ranks.times import WindowTimes

WINDOWS = 5  # in a row; all but one must show a slowdown
# In a row, of which four fifths must, where a rank's own time alone shows it: a virtual machine's processor may be
# slow for a second without being taken away.
OWN_WINDOWS = 20
CHECKPOINTS = 3  # in a row; all must
START, END = 0.10, 0.05  # slowdowns: named from the first one on, until the second one
_BASELINE = 16  # windows that say how long transfers take, at most; WINDOWS at least
# Where the whole machine is slow, transfers and computation are. The network is named only if transfers have
# become slower by this factor more than computation has.
_TRANSFER_FACTOR = 1.5
# Standard deviations of the slowdowns before; and the median absolute deviation of a normal distribution to one.
_DEVIATIONS, _DEVIATION = 3.0, 1.4826

DATA, COMPUTE, NETWORK, CHECKPOINT = "data", "compute", "network", "checkpoint"

# What shows that a rank is slow, the least noisy first; and the cause that it shows. "own" may have each.
_SIGNS = ("preempted", "data", "own")
_CAUSES = {"preempted": COMPUTE, "data": DATA}

Numbers = np.ndarray[Any, np.dtype[np.float64]]

_COLUMNS = WindowTimes._fields


@dataclass(frozen=True)
class Slow:
    """What holds a training up.

    Attributes:
        cause: "data", "compute", "network" or "checkpoint".
        rank: None for the network, which all ranks wait for.
        slowdown: by which part of the undisturbed time updates take longer: 0.5 for 150 ms instead of 100.
        seconds: by which an update, or a checkpoint, takes longer.
    """

    cause: str
    rank: int | None
    slowdown: float
    seconds: float


@dataclass(frozen=True)
class _Window:
    """Times in seconds per update; arrays have one number for each rank.

    Attributes:
        excesses: by how much a time is above the median of the other ranks', by its name in `WindowTimes`.
        slowdowns: the same as a part of the time that the update takes without it.
        own: median over the ranks.
        transfer: least wait of all ranks.
        update: median over the ranks.
    """

    excesses: dict[str, Numbers]
    slowdowns: dict[str, Numbers]
    own: float
    transfer: float
    update: float

    @classmethod
    def of(cls, times: Numbers) -> _Window:
        columns = dict(zip(_COLUMNS, times.T, strict=True))
        update = median_update(times)
        excesses = {name: _excesses(columns[name]) for name in (*_SIGNS, "compute")}
        slowdowns = {name: _slowdown(excess, update) for name, excess in excesses.items()}
        own, transfer = float(np.median(columns["own"])), float(columns["least_wait"].min())
        return cls(excesses, slowdowns, own, transfer, update)


class SlowRankDetector:
    """Names what makes updates at least 10 % slower, in four of the last five windows, or 16 of the last 20.

    A rank is slow if its own work takes longer than the median of that of the other ranks. The ranks wait for each
    other in every update, so all updates take longer by about the difference. Three times show it, each by itself:
    that for which the rank had no processor (then the cause is computation), that for its data, and all of its own
    work, where the larger part is the cause. The first has to be above what it was before: threads of a rank may
    share a processor. The third varies more than the others, and needs 16 of the last 20 windows.

    The network is slow if the least wait of all ranks is longer than it was: the last rank to be ready waits for
    no other one, so its wait is that of the transfer. Ranks from which an update needs no more than from others
    cannot be distinguished by it.

    A named cause ends when the median of the last five windows is below 5 %.

    The limit is 10 %, or three standard deviations of the rank's slowdowns in the 16 windows before, estimated by
    their median absolute deviation, if that is more; 20 % as long as fewer than ten windows are known.

    False alarms: if a rank is above its limit in a window with probability p by chance, independently of other
    windows, it is above it in four of five with probability below 5 p⁴. With two such times, a run of n windows on
    N ranks has at most 10 n N p⁴ false alarms on average: 0.003 for p = 0.02, two ranks and 1,000 windows. A
    disturbance that lasts for four windows is no false alarm: the rank was slow.
    """

    def __init__(self) -> None:
        self._recent: deque[_Window] = deque(maxlen=WINDOWS)
        self._before: deque[_Window] = deque(maxlen=_BASELINE)
        self._longer: deque[_Window] = deque(maxlen=OWN_WINDOWS)
        self._named: dict[int | None, Slow] = {}
        # Of a rank: what has shown that it is slow, and below which slowdown it no longer is.
        self._shown: dict[int, tuple[str, float]] = {}
        self._transfer: float | None = None  # before the network was named

    def restart(self) -> None:
        """Forgets the windows, but not what is named: the times of transfers are to change."""
        for windows in (self._recent, self._before, self._longer):
            windows.clear()
        self._transfer = None

    def add(self, times: Numbers | Sequence[WindowTimes]) -> tuple[list[Slow], list[Slow]]:
        """Takes the times of a window.

        Args:
            times: [ranks, times], at least 2 ranks, in their order; columns as in `WindowTimes`.

        Returns:
            What has become slow with this window, and what was named and has ended.
        """
        if len(self._recent) == WINDOWS and not self._named:
            self._before.append(self._recent[0])
        self._recent.append(_Window.of(np.asarray(times, dtype=np.float64)))
        self._longer.append(self._recent[-1])
        if len(self._recent) < WINDOWS:
            return [], []
        started = self._slow_ranks()
        if (network := self._slow_network()) is not None:
            started.append(network)
        ended = [slow for slow in self._named.values() if self._has_ended(slow)]
        for slow in ended:
            del self._named[slow.rank]
        self._named |= {slow.rank: slow for slow in started}
        return started, ended

    def _slow_ranks(self) -> list[Slow]:
        held_up = self._typical("own") > 0  # for a rank that is ready before others, no other waits
        held_up[[rank for rank in self._named if rank is not None]] = False
        started: dict[int, Slow] = {}
        for sign in _SIGNS:
            shown = held_up & self._shown_by(sign)
            started |= {rank: self._slow(sign, rank) for rank in np.flatnonzero(shown).tolist()}
            held_up &= ~shown
        return [started[rank] for rank in sorted(started)]

    def _shown_by(self, sign: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns for each rank whether a sign has shown for long enough that it is slow."""
        windows, wanted = (self._longer, OWN_WINDOWS) if sign == "own" else (self._recent, WINDOWS)
        slowdowns, least = _slowdowns(windows, sign), wanted * (WINDOWS - 1) / WINDOWS
        shown: np.ndarray[Any, np.dtype[np.bool_]] = (slowdowns >= START).sum(axis=0) >= least
        if len(windows) == wanted and shown.any():  # seldom: limits, which are not lower, take longer to compute
            shown &= (slowdowns >= self._limit(sign)).sum(axis=0) >= least
            return shown
        return np.zeros_like(shown)

    def _slow(self, sign: str, rank: int) -> Slow:
        self._shown[rank] = sign, float(self._usual(sign)[rank]) + END
        cause = _CAUSES.get(sign) or max((DATA, COMPUTE), key=lambda name: self._typical(name)[rank])
        seconds = median(float(window.excesses[sign][rank]) for window in self._recent)
        return Slow(cause, rank, float(self._typical(sign)[rank]), seconds)

    def _typical(self, sign: str) -> Numbers:
        """Returns the median of the recent slowdowns of each rank."""
        typical: Numbers = np.median(_slowdowns(self._recent, sign), axis=0)
        return typical

    def _usual(self, sign: str) -> Numbers:
        """Returns the slowdown that a sign shows all the time, if any: threads of a rank may share a processor."""
        if sign != "preempted" or len(self._before) < WINDOWS:
            return np.zeros_like(self._recent[-1].slowdowns[sign])
        usual: Numbers = np.maximum(np.median(_slowdowns(self._before, sign), axis=0), 0)
        return usual

    def _limit(self, sign: str) -> Numbers | float:
        """Returns the slowdown from which on each rank is named: more where its times vary."""
        if len(self._before) < WINDOWS:
            return 2 * START  # it is not known yet how much they do
        before = _slowdowns(self._before, sign)
        deviation = _DEVIATION * np.median(np.abs(before - np.median(before, axis=0)), axis=0)
        limit: Numbers = self._usual(sign) + np.maximum(START, _DEVIATIONS * deviation)
        return limit

    def _slow_network(self) -> Slow | None:
        if self._named or len(self._before) < WINDOWS:
            return None
        own = median(window.own for window in self._before)
        transfer = median(window.transfer for window in self._before)
        slower = self._slower_than(transfer)
        more = sum(w.transfer * own >= _TRANSFER_FACTOR * w.own * transfer for w in self._recent) >= WINDOWS - 1
        if sorted(slower)[1] < START or not more:
            return None
        if self._typical("own").max() >= median(slower):  # a rank holds the others up by more
            return None
        self._transfer = transfer
        return Slow(NETWORK, None, median(slower), median(w.transfer - transfer for w in self._recent))

    def _has_ended(self, slow: Slow) -> bool:
        if slow.rank is not None:
            sign, end = self._shown[slow.rank]
            return bool(self._typical(sign)[slow.rank] < end)
        return self._transfer is None or median(self._slower_than(self._transfer)) < END

    def _slower_than(self, transfer: float) -> list[float]:
        """Returns by which part updates have become slower, because transfers take longer than this."""
        windows = np.array([(window.transfer - transfer, window.update) for window in self._recent])
        slower: list[float] = _slowdown(*windows.T).tolist()
        return slower


class SlowCheckpoints:
    """Notices checkpoints that hold training up: each of the last three by at least 10 % of the time between them.

    Training waits for a checkpoint only to be copied, and for the one before to be written. Rank 0 writes, so it
    holds the others up.

    Args:
        least_seconds: that the last three must span; checkpoints of less are too short to judge.
    """

    def __init__(self, least_seconds: float) -> None:
        self._least, self._named = least_seconds, False
        self._recent: deque[tuple[float, float]] = deque(maxlen=CHECKPOINTS)

    def add(self, between: float, held: float) -> tuple[Slow | None, bool]:
        """Takes a checkpoint.

        Args:
            between: seconds of training since the one before.
            held: seconds for which training waited.

        Returns:
            What has become slow, or None; and whether that has ended.
        """
        self._recent.append((between, held))
        slowdowns = [held / max(between, 1e-9) for between, held in self._recent]
        spans = sum(map(sum, self._recent)) >= self._least
        if not self._named and len(self._recent) == CHECKPOINTS and spans and min(slowdowns) >= START:
            self._named = True
            return Slow(CHECKPOINT, 0, median(slowdowns), median(held for _, held in self._recent)), False
        ended = self._named and median(slowdowns) < END
        self._named = self._named and not ended
        return None, ended


def median_update(times: Numbers) -> float:
    """Returns the median over the ranks of the seconds of an update."""
    return float(np.median(times[:, _COLUMNS.index("update")]))


def _slowdowns(windows: Iterable[_Window], sign: str) -> Numbers:
    """Returns the slowdowns of windows, [windows, ranks]."""
    return np.stack([window.slowdowns[sign] for window in windows])


def _excesses(times: Numbers) -> Numbers:
    """Returns by how much the time of each rank is above the median of those of the others."""
    order, others = np.argsort(times), len(times) - 1
    ranked, place = times[order], np.empty_like(order)
    place[order] = np.arange(len(times))

    def of_others(number: int) -> Numbers:
        """Returns for each rank the other ranks' time of this number, in ascending order."""
        time: Numbers = ranked[number + (place <= number)]
        return time

    return times - (of_others((others - 1) // 2) + of_others(others // 2)) / 2


def _slowdown(excess: Numbers, update: Numbers | float) -> Numbers:
    """Returns an excess as a part of the time that the update takes without it."""
    slowdown: Numbers = excess / np.maximum(update - excess, 1e-9)
    return slowdown
