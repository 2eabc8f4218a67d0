"""What a run reports: exact averages over ranks, `metrics.jsonl`, TensorBoard events, progress, `curves.png`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hvd_adam.checkpoint import storage
from hvd_adam.errors import UserError
from hvd_adam.training.append_log import AppendLog, ScalarLog

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Rank 0's record of a run. On the other ranks (`folder` None) it does nothing.

    Each event is one line of `metrics.jsonl`, written at once, or as soon as the disk takes it; its numbers go to
    TensorBoard too. On a terminal there is a progress bar; in a pipe or a log file, plain lines.

    Args:
        folder: the run's.
        total_steps: updates in the whole run.
        first_step: updates made before, None in a new run; what was recorded after them is taken back, for it will
            be done again.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path | None, total_steps: int, first_step: int | None = None) -> None:
        self._folder = folder
        if folder is None:
            return
        try:
            _take_back(folder / METRICS_FILE, first_step)
            self._lines = AppendLog(folder / METRICS_FILE)
            self._board = ScalarLog(folder, (first_step or 0) + 1)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder} ({error.strerror})") from None
        self._bar = tqdm(
            total=total_steps,
            initial=first_step or 0,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._total_steps = total_steps
        self._warned = self._behind = False

    def event(self, event: str, step: int, epoch: int, **values: Any) -> None:
        """Records what happened after `step` updates.

        Args:
            event: "start", "resume", "step", "skip", "eval", "checkpoint" or "end".
            step: updates made so far.
            epoch: epochs begun so far.
            values: numbers by name, in the units of the README's table of metrics.
        """
        if self._folder is None:
            return
        finite = {name: value if _is_finite(value) else None for name, value in values.items()}
        line = {"event": event, "step": step, "epoch": epoch, "time": time.time(), **finite}
        self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        if finite != values and not self._warned:
            self._warned = True
            self.say(
                f"warning: {next(n for n in values if finite[n] != values[n])} is no longer finite (step {step})"
            )
        for name, value in values.items():
            if event in ("step", "eval") and isinstance(value, float):
                self._board.add(name if "_" in name else f"train_{name}", value, step)
        self._look_behind()
        self._show(event, step, epoch, values)

    def say(self, text: str) -> None:
        """Prints a line for the person who watches."""
        if self._folder is not None:
            self._bar.clear()
            sys.stdout.write(text + "\n")  # in one write: launchers tag each write with the rank
            sys.stdout.flush()
            self._bar.refresh()

    def close(self) -> None:
        """Flushes everything to disk."""
        if self._folder is not None:
            self._bar.close()
            self._board.close()
            self._lines.close()

    def _look_behind(self) -> None:
        """Says once, each time, that records wait for the disk."""
        error = self._lines.error or self._board.error
        if error and not self._behind:
            self.say(f"warning: cannot write to {self._folder}: {error.strerror}; training goes on, metrics wait")
        self._behind = error is not None

    def _show(self, event: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        if event == "step":
            self._bar.update(step - self._bar.n)
            shown = {
                "loss": f"{values['loss']:.4f}",
                "lr": f"{values['lr']:.2e}",
                "images/s": f"{values['images_per_second']:.0f}",
            }
            self._bar.set_postfix(shown)
            if self._bar.disable:
                details = "  ".join(f"{name} {value}" for name, value in shown.items())
                self.say(f"epoch {epoch}  step {step}/{self._total_steps}  {details}")
        elif event == "eval":
            scores = "  ".join(
                f"{name.replace('_', ' ')} {value:.4f}"
                for name, value in values.items()
                if name.startswith("test_")
            )
            self.say(f"epoch {epoch}  step {step}/{self._total_steps}  {scores}")


def _take_back(path: Path, step: int | None) -> None:
    """Removes the events after `step` updates, and the end of the run; a line that a killed process began, too."""
    if not path.exists():
        return
    last = -1 if step is None else step
    kept = [event for event in read_events(path) if event["step"] <= last and event["event"] != "end"]
    storage.write_atomically(path, "".join(json.dumps(event) + "\n" for event in kept))


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for one that was never completed."""
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
