"""`Trial`: the order in which compressions are measured, and the choice between them. Pure functions of times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

# Updates before the first measurement: kernels are compiled, and caches filled.
WARM_UP = 3
# Consecutive updates with one compression. The first is not counted: new buffers, and names that Horovod does not
# know yet.
BLOCK = 4
# Blocks of each compression, at most, and of those that seem faster than the most exact one by less than the
# noise. 27 updates in place of 9 tell 5 % from nothing, where times of updates differ by 6 %.
ROUNDS, MOST_ROUNDS = 3, 9

# A smaller gain does not justify rounding gradients.
LEAST_GAIN = 0.02
# A compression that is slower by this much, and by more than twice the noise, is not measured again.
OBVIOUS = 0.1


class Lap(NamedTuple):
    """One update.

    Attributes:
        seconds: from the end of the update before to its end.
        waited: seconds of these that the process has waited for others.
    """

    seconds: float
    waited: float

    @classmethod
    def of_saved(cls, saved: Sequence[Any]) -> Lap:
        """Returns a lap from a checkpoint. Raises ValueError: it is not two finite numbers."""
        seconds, waited = map(float, saved)
        if not (math.isfinite(seconds) and math.isfinite(waited)):
            raise ValueError(f"an update that took {seconds} s and waited for {waited} s")
        return cls(seconds, waited)


class Trial:
    """Measures compressions in turns: a b c, c b a, a b c. What is obviously slower is left out after a turn.

    If the most exact one would be chosen only because of noise, it and those that seem faster are measured in more
    turns.

    Args:
        candidates: the compressions, the most exact one first. If there is one only, one block of it is measured.
        warm_up: updates before the first measurement.

    Attributes:
        compression: the one to use in the next updates; when the trial is over, the chosen one.
        is_over: whether it has been chosen.
    """

    def __init__(self, candidates: Sequence[str], warm_up: int = 0) -> None:
        self._candidates, self._left = list(candidates), list(candidates)
        self._laps: dict[str, list[Lap]] = {name: [] for name in candidates}
        self._warm_up, self._round, self._place = warm_up, 0, 0
        self.compression, self.is_over = self._left[0], False

    @property
    def candidates(self) -> tuple[str, ...]:
        """As the argument."""
        return tuple(self._candidates)

    @property
    def block(self) -> int:
        """Updates until `add` is to be called."""
        return self._warm_up + BLOCK

    def add(self, laps: Sequence[Lap]) -> None:
        """Adds the measurements of a block, and continues with the next one.

        Args:
            laps: of all its updates, the same on all ranks.
        """
        self._laps[self.compression] += laps[self._warm_up + 1 :]
        self._warm_up = 0
        self._place += 1
        if self._place == len(self._left):
            self._end_round()
        if not self.is_over:
            self.compression = self._order()[self._place]

    def _order(self) -> list[str]:
        return self._left[::-1] if self._round % 2 else self._left

    def _end_round(self) -> None:
        self._round, self._place = self._round + 1, 0
        # Among those that are left only: they have been measured in the same rounds, however updates have slowed
        # down since the others were left out.
        fastest = min(self._left, key=self.seconds)
        self._left = [
            name
            for name in self._left
            if self.seconds(name) - self.seconds(fastest)
            <= max(2 * self._noise(name, fastest), OBVIOUS * self.seconds(fastest))
        ]
        exact = self._candidates[0]
        if exact in self._left:
            faster = self._faster_than(exact)
            certain = [n for n in faster if self.seconds(exact) - self.seconds(n) > self._noise(n, exact)]
        else:  # it was obviously slower
            faster = certain = list(self._left)
        if self._round == ROUNDS and faster and not certain:
            self._left = [name for name in self._left if name == exact or name in faster]
        elif self._round in (ROUNDS, MOST_ROUNDS) or len(self._left) == 1:
            self.is_over, self.compression = True, self._choice(certain)

    def _faster_than(self, exact: str) -> list[str]:
        """Returns those left that seem faster than the most exact one by more than the least gain."""
        limit = (1 - LEAST_GAIN) * self.seconds(exact)
        return [name for name in self._left if self.seconds(name) < limit]

    def _choice(self, faster: Sequence[str]) -> str:
        """Returns the fastest of those that are faster than the most exact one for certain, or one nearly so."""
        if not faster:
            return self._candidates[0]
        least = min(map(self.seconds, faster))
        return next(name for name in faster if self.seconds(name) <= (1 + LEAST_GAIN) * least)

    def fastest_first(self) -> list[str]:
        """Returns the compressions by the time of an update; those last that were left out in earlier rounds."""
        return sorted(self._candidates, key=lambda name: (name not in self._left, self.seconds(name)))

    def seconds(self, name: str) -> float:
        """Returns the median time of an update with a compression."""
        return median(lap.seconds for lap in self._laps[name])

    def waited(self, name: str) -> float:
        """Returns the median time that an update waits for the network."""
        return median(lap.waited for lap in self._laps[name])

    def _noise(self, name: str, other: str) -> float:
        """Returns two standard errors of the difference between two medians.

        That of a median is 1.253·σ/√n. σ is the distance between the quartiles / 1.349, which a few slow updates
        do not change; of n = 3, 6 and 9 values that distance is too short by a factor of 1 + 1.75/n.
        """
        errors = []
        for laps in (self._laps[name], self._laps[other]):
            low, _, high = quantiles([lap.seconds for lap in laps], n=4, method="inclusive")
            sigma = (high - low) / 1.349 * (1 + 1.75 / len(laps))
            errors.append(1.253 * sigma / math.sqrt(len(laps)))
        return 2 * math.hypot(*errors)

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """Returns where the trial stands, in plain containers: the block in progress starts again."""
        return {
            "left": list(self._left),
            "round": self._round,
            "place": self._place,
            "warm_up": self._warm_up,
            "laps": {name: [list(lap) for lap in laps] for name, laps in self._laps.items()},
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> Trial:
        """Returns the trial that `state_dict` is of."""
        trial = cls([*saved["laps"]], saved["warm_up"])
        trial._left, trial._round, trial._place = list(saved["left"]), saved["round"], saved["place"]
        trial._laps = {name: [*map(Lap.of_saved, laps)] for name, laps in saved["laps"].items()}
        trial.compression = trial._order()[trial._place]
        return trial
