"""`AutomaticCompression`: measures compressions in the first updates, uses the fastest, and keeps watching."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.agreement import require_same
from hvd_adam.distributed.automatic.candidates import ANY, FIRST, candidates
from hvd_adam.distributed.automatic.estimate import exchange_seconds
from hvd_adam.distributed.automatic.timer import UpdateTimer, agreed_laps
from hvd_adam.distributed.automatic.trial import LEAST_GAIN, WARM_UP, Lap, Trial
from hvd_adam.distributed.context import current_cluster, horovod
from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.layout import DistributedLayout
from hvd_adam.errors import UserError
from hvd_adam.text import milliseconds

# Updates after which the wait for the network is compared with that of the trial.
WINDOW = 100
# Windows in a row that must differ from it, in the same direction.
WINDOWS = 2
# By this part of the time that an update took: a change of the network by much.
FAR = 0.25

_logger = logging.getLogger("hvd_adam")


class AutomaticCompression:
    """Decides which compression an optimizer uses. Every rank calls it after each update, and all decide the same.

    Args:
        option: "auto", "auto:lossless" or "auto:any".
        layout: of the optimizer; its compression is changed.
        averager: of the optimizer.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other optimizer.
    """

    def __init__(self, option: str, layout: DistributedLayout, averager: GradientAverager, prefix: str) -> None:
        self._option, self._layout, self._averager = option, layout, averager
        self._prefix = f"{prefix}.automatic"
        # On one rank, and with Adasum, nothing is reduced in buckets, and there is nothing to choose from.
        self._active = bool(layout.buffers)
        self._device = layout.buffers[0].device if self._active else torch.device("cpu")
        self._timer = UpdateTimer(self._device, lambda: averager.waited)
        if not self._active and horovod().size() > 1:
            self._log(f"uses {FIRST}: op='adasum' leaves no choice")
        self._trial: Trial | None = None
        self._begun = False  # whether there has been a trial
        self._compared: frozenset[str] = frozenset()  # in the last trial
        self._fixed = False  # whether `use` has been called, and nothing loaded since
        self._chosen = Lap(0.0, 0.0)  # an update with the chosen compression, in the trial
        self._drifted = 0  # windows in a row that have differed from it, negative if the wait was shorter

    @property
    def is_measuring(self) -> bool:
        """Whether a trial is to come, or in progress."""
        return self._active and not self._fixed and (self._trial is not None or not self._begun)

    def _candidates(self) -> tuple[str, ...]:
        return candidates(self._option, self._dtypes())

    def _dtypes(self) -> set[torch.dtype]:
        return {buffer.dtype for buffer in self._layout.buffers}

    def after_update(self, skipped: Tensor | None) -> None:
        """Called after an update, with the same on all ranks.

        Args:
            skipped: whether it was skipped; None if that is not checked. Read in a trial only.
        """
        if not self._active or self._fixed:
            return
        if self._layout.trains_nothing:
            self._timer.lap(counts=False)
        elif not self._begun:
            self._begin(WARM_UP)
        elif self._candidates_have_changed():
            self._begin(0)
        elif self._trial is not None:
            # Of a skipped update no parameters are sent.
            self._timer.lap(counts=skipped is None or not bool(skipped))
            if self._timer.count == self._trial.block:
                self._end_block(self._trial)
        elif len(self._candidates()) > 1:
            self._timer.lap(counts=True)
            if self._timer.count >= WINDOW:
                self._end_window()

    def _candidates_have_changed(self) -> bool:
        """Returns whether parameters of other dtypes are trained, so that a trial must be made again.

        After a trial only if there is more to choose from: parameters that a choice does not allow are refused
        themselves.
        """
        allowed = set(self._candidates())
        return allowed != self._compared if self._trial is not None else not allowed <= self._compared

    def use(self, compression: str) -> None:
        """Uses a compression from the next update on, and ends all measurements. Every rank must call it.

        Raises:
            CollectiveError: on every rank: the ranks give different ones.
            UserError: it is not among what this option may choose.
            RuntimeError: gradients have been averaged, and no update has used them.
        """
        if self._averager.averaged:
            problem = "use_compression() between backward() and step() would lose a part of the gradients"
            raise RuntimeError(f"{problem}: call it after step()")
        self._averager.start_meeting("use_compression()")()
        require_same(current_cluster(), "arguments of use_compression()", {"compression": compression})
        allowed = self._candidates() if self._layout.buffers else (FIRST,)
        if compression not in allowed:
            raise UserError(
                f"compression {compression!r} is not what {self._option} may choose here: use one of "
                f"{', '.join(allowed)}"
            )
        self._fixed, self._trial = True, None
        self._layout.use(compression)

    # A trial.

    def _begin(self, warm_up: int) -> None:
        self._trial, self._begun = Trial(self._candidates(), warm_up), True
        self._compared = frozenset(self._trial.candidates)
        self._layout.use(self._trial.compression)
        self._timer.restart()

    def _end_block(self, trial: Trial) -> None:
        trial.add(agreed_laps(self._timer.take(), f"{self._prefix}.laps"))
        self._layout.use(trial.compression)
        if trial.is_over:
            self._trial, self._drifted = None, 0
            self._chosen = Lap(trial.seconds(trial.compression), trial.waited(trial.compression))
            others = trial.fastest_first()
            if len(others) > 1:
                self._log_choice(trial)
            else:
                self._log_estimate(trial)
        self._timer.restart()

    # After the trial.

    def _end_window(self) -> None:
        waited = median(lap.waited for lap in agreed_laps(self._timer.take(), f"{self._prefix}.laps"))
        drift = waited - self._chosen.waited
        direction = 0 if abs(drift) <= FAR * self._chosen.seconds else 1 if drift > 0 else -1
        self._drifted = self._drifted + direction if self._drifted * direction > 0 else direction
        if abs(self._drifted) < WINDOWS:
            return
        self._log(
            f"an update waits {milliseconds(waited)} ms for the network, {milliseconds(self._chosen.waited)} when "
            f"{self._layout.compression} was chosen: measures again"
        )
        self._drifted = 0
        self._begin(0)

    # Messages.

    def _log(self, text: str) -> None:
        if horovod().rank() == 0:
            _logger.info(f"compression {self._option}: {text}")

    def _log_choice(self, trial: Trial) -> None:
        first, *others = trial.fastest_first()
        chosen, exact = trial.compression, trial.candidates[0]
        times = ", ".join(f"{milliseconds(trial.seconds(name))} with {name}" for name in others)
        why = ""
        if chosen != first:
            why = f"; {first} is not faster than {chosen} by more than noise" if chosen == exact else ""
            why = why or f"; {first} is faster than {chosen} by less than {LEAST_GAIN:.0%}"
        self._log(
            f"uses {chosen}: an update takes {milliseconds(trial.seconds(first))} ms with {first}, {times}{why}"
        )

    def _log_estimate(self, trial: Trial) -> None:
        """Reports what compressions would gain that this option does not allow."""
        largest = max(self._layout.buffers, key=lambda buffer: buffer.layout.total)
        elements = sum(buffer.layout.total for buffer in self._layout.buffers)
        names = candidates(ANY, self._dtypes())
        found = exchange_seconds(names, elements, largest.dtype, self._device, f"{self._prefix}.estimate")
        seconds, waited = trial.seconds(FIRST), trial.waited(FIRST)
        gains = {name: min(waited, found[FIRST] - found[name]) for name in names if name != FIRST}
        worth = sorted(
            (name for name in gains if gains[name] > LEAST_GAIN * seconds), key=lambda name: -gains[name]
        )
        listed = ", ".join(f"{milliseconds(gains[name])} with {name}" for name in worth)
        saving = f"{ANY} would save about {listed}" if worth else f"{ANY} would be no faster"
        self._log(
            f"uses {FIRST}: others round these gradients. An update takes {milliseconds(seconds)} ms; {saving}"
        )

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """Returns the choice, and where a trial stands, in plain containers; identical on all ranks."""
        return {
            "ranks": int(horovod().size()),
            "compression": self._layout.compression,
            "trial": None if self._trial is None else self._trial.state_dict(),
            "chosen": list(self._chosen) if self._begun and self._trial is None else None,
            "fixed": self._fixed,
            "compared": sorted(self._compared),
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continues from what `state_dict` returned, if that was measured with as many ranks. Every rank calls it.

        Args:
            saved: identical on all ranks; None to measure.

        Raises:
            UserError: it is something else.
        """
        if not self._active:
            return
        try:
            compression = self._continue(saved)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise UserError(f"this is no choice of a compression that this version has saved: {error!r}") from None
        self._layout.use(compression)
        self._timer.restart()

    def _continue(self, saved: Mapping[str, Any] | None) -> str:
        """Takes over what `load_state_dict` was given; returns the compression to use."""
        # Where all parameters are frozen, nothing is known of those that will be trained.
        dtypes = {torch.bfloat16} if self._layout.trains_nothing else self._dtypes()
        allowed = set(candidates(self._option, dtypes))
        self._begun, self._fixed, self._trial, self._drifted, compression = False, False, None, 0, FIRST
        self._compared = frozenset(allowed if saved is None else saved.get("compared", allowed))
        if saved is not None and saved["ranks"] == horovod().size() and saved["compression"] in allowed:
            trial = saved["trial"]
            if saved["fixed"]:
                self._fixed, compression = True, saved["compression"]
            elif trial is not None and allowed == trial["laps"].keys():
                self._trial, self._begun = Trial.from_state_dict(trial), True
                compression = self._trial.compression
            elif saved["chosen"] is not None:
                self._chosen, self._begun = Lap.of_saved(saved["chosen"]), True
                compression = saved["compression"]
        return compression
