"""The record of a run: `metrics.jsonl`, TensorBoard events, progress bar and log lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.errors import UserError
from hvd_adam.log import logger, set_progress_bar
from hvd_adam.training.append_log import AppendLog
from hvd_adam.training.tensorboard_log import TensorBoardLog

METRICS_FILE = "metrics.jsonl"
MOST_RECENT = 8  # events; an update has two at most


class RunLog:
    """Records the events of a run on rank 0. On other ranks (`folder` is None) it does nothing.

    Each event becomes one line of `metrics.jsonl`, written at once, or as soon as the disk accepts it. Its numbers
    also go to TensorBoard. On a terminal a progress bar is shown; in a pipe or a log file, plain lines.

    Args:
        folder: the run folder; None on ranks other than 0.
        total_steps: updates in the whole run.
        first_step: updates made before a resume; None for a new run. Later events in `metrics.jsonl` are removed,
            because their updates are computed again.
        config: the configuration by option, for TensorBoard.
        classes: names of the classes, for TensorBoard.
        recent: `recent` of the rank whose state the run resumes from; those missing in `metrics.jsonl` are added.

    Attributes:
        recent: the last "step" and "skip" events, on every rank. Rank 0 may be lost after an update of which it
            has not recorded the event, and the other ranks continue after that update.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        first_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        recent: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._folder = folder
        self.recent = deque(recent, MOST_RECENT)
        if folder is None:
            return
        try:
            missing = _restore_events(folder / METRICS_FILE, first_step, recent)
            self._lines = AppendLog(folder / METRICS_FILE)
            self._board = TensorBoardLog(folder, (first_step or 0) + 1, classes)
            if config is not None:
                self._board.add_config(config, first_step or 0)
            for event in missing:
                self._board.add_event(event["event"], event, event["step"])
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder} ({error.strerror})") from None
        self._bar = tqdm(
            total=total_steps,
            initial=first_step or 0,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        set_progress_bar(self._bar)
        self._total_steps = total_steps
        self._positive_class = None if config is None else config["positive_class"]
        self._nonfinite_logged = self._disk_error_logged = False

    def event(self, event: str, step: int, epoch: int, **values: Any) -> None:
        """Records an event.

        Args:
            event: "start", "resume", "step", "skip", "eval", "checkpoint", "checkpoint_failed",
                "slow_rank", "slow_rank_end" or "end".
            step: updates made so far.
            epoch: the current epoch, from 1; 0 before the first.
            values: the event's values by name, in the units that the documentation of `metrics.jsonl` lists.
                Numbers that are not finite are recorded as null.
        """
        finite = {name: value if _is_finite(value) else None for name, value in values.items()}
        line = {"event": event, "step": step, "epoch": epoch, "time": time.time(), **finite}
        if event in ("step", "skip"):
            self.recent.append(line)
        if self._folder is None:
            return
        self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        if finite != values and not self._nonfinite_logged:
            self._nonfinite_logged = True
            name = next(name for name in values if finite[name] != values[name])
            logger.warning(f"{name} is no longer finite (step {step})")
        self._board.add_event(event, values, step)
        self._log_disk_error()
        if event == "step":
            self._show_step(step, epoch, values)
        elif event == "eval":
            self._show_scores(step, epoch, values)

    def close(self) -> None:
        """Writes what is still in memory and closes all files."""
        if self._folder is not None:
            set_progress_bar(None)
            self._bar.close()
            self._board.close()
            self._lines.close()
            if error := self._lines.error:
                logger.warning(f"{self._folder / METRICS_FILE} lacks the last records: {error.strerror}")

    def _log_disk_error(self) -> None:
        """Logs, once for each time that the disk fails, that records are held in memory."""
        error = self._lines.error or self._board.error
        if error and not self._disk_error_logged:
            logger.warning(
                f"cannot write to {self._folder}: {error.strerror}; training continues, metrics stay in memory"
            )
        self._disk_error_logged = error is not None

    def _show_step(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        self._bar.update(step - self._bar.n)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "lr": f"{values['lr']:.2e}",
            "images/s": f"{values['images_per_second']:.0f}",
        }
        self._bar.set_postfix(shown)
        if self._bar.disable:
            details = "  ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"epoch {epoch}  step {step}/{self._total_steps}  {details}")

    def _show_scores(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        shown = shown_scores(values, self._positive_class).items()
        scores = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown)
        logger.info(f"epoch {epoch}  step {step}/{self._total_steps}  {scores}")


def shown_scores(scores: Mapping[str, Any], positive_class: str | None) -> dict[str, float]:
    """Returns the scores of an evaluation that are printed: the balanced accuracy only with a positive class."""
    hidden = {"test_ece"} | ({"test_balanced_accuracy"} if positive_class is None else set())
    return {
        name: value
        for name, value in scores.items()
        if name.startswith("test_") and name not in hidden and value is not None
    }


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a `metrics.jsonl`, except for lines that are incomplete or damaged.

    Raises:
        OSError: the file cannot be read.
    """
    yield from parse_events(path.read_text(errors="replace"))


def parse_events(text: str) -> Iterator[dict[str, Any]]:
    """Yields the events in the text of a `metrics.jsonl`, as `read_events` does."""
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if (
                isinstance(event, dict)
                and isinstance(event.get("event"), str)
                and isinstance(event.get("step"), int)
            ):
                yield event


def _restore_events(path: Path, step: int | None, recent: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Removes the events after `step` updates (None: all), the "end" event and an incomplete last line.

    Args:
        path: of `metrics.jsonl`.
        step: updates made.
        recent: events up to `step`; those that are missing are added.

    Returns:
        The events that were added.
    """
    if not path.exists():
        return []
    last = -1 if step is None else step
    kept = [event for event in read_events(path) if event["step"] <= last and event["event"] != "end"]
    recorded = {(event["event"], event["step"]) for event in kept}
    missing = [event for event in recent if (event["event"], event["step"]) not in recorded]
    write_atomically(path, "".join(json.dumps(event) + "\n" for event in (*kept, *missing)))
    return missing


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
