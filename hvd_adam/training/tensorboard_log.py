"""`TensorBoardLog`: the event file of a run: grouped curves, hyper-parameters, configuration and pictures."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_adam.training.append_log import AppendLog
from hvd_adam.training.scores import confusion

# The tag of each value of `metrics.jsonl` that is shown as a curve. TensorBoard groups tags by what precedes "/".
TAGS = {
    ("step", "loss"): "train/loss",
    ("step", "lr"): "optim/lr",
    ("step", "grad_norm"): "optim/grad_norm",
    ("step", "noise_scale"): "optim/noise_scale",
    ("step", "noise_scale_low"): "optim/noise_scale_low",
    ("step", "noise_scale_high"): "optim/noise_scale_high",
    ("step", "images_per_second"): "perf/images_per_second",
    ("skip", "skipped"): "optim/skipped_updates",
    ("eval", "test_loss"): "eval/loss",
    ("eval", "test_accuracy"): "eval/accuracy",
    ("eval", "test_balanced_accuracy"): "eval/balanced_accuracy",
    ("eval", "test_ece"): "eval/calibration_error",
}
CONFUSION_TAG = "eval/confusion_matrix"
CONFIG_TAG = "config"

# The columns of the table of hyper-parameters that are results.
RESULTS = ("eval/accuracy", "eval/balanced_accuracy", "eval/loss", "train/loss")


class TensorBoardLog(AppendLog):
    """An event file for TensorBoard, written at once.

    TensorBoard's own writer uses a thread, which a full disk ends.

    Args:
        folder: the folder in which TensorBoard looks for event files.
        first_step: TensorBoard discards points of earlier files from this step on.
        classes: names of the classes, for the confusion matrix.
    """

    def __init__(self, folder: Path, first_step: int, classes: Sequence[str] = ()) -> None:
        # Imported here: it takes a second, and only rank 0 needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}")
        self._event, self._summary, self._writer = Event, Summary, RecordWriter(self)
        self._classes = classes
        self._write_event(first_step, file_version="brain.Event:2")
        self._write_event(first_step, session_log=SessionLog(status=SessionLog.START))

    def add_config(self, config: Mapping[str, Any], step: int) -> None:
        """Adds the configuration as text, and its numbers, words and flags to the table of hyper-parameters.

        Args:
            config: values by option. Those that are None are not in the table; tuples are shown as text.
            step: updates made so far.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.plugins.text.summary_v2 import text_pb

        rows = "".join(f"| `{name}` | {_markdown(value)} |\n" for name, value in config.items())
        self._write_event(step, summary=text_pb(CONFIG_TAG, f"| option | value |\n|---|---|\n{rows}"))
        values = {name: _hparam(value) for name, value in config.items() if value is not None}
        columns = [hparams.HParam(name) for name in values]
        results = [hparams.Metric(tag) for tag in RESULTS]
        self._write_event(step, summary=hparams.hparams_config_pb(columns, results))
        self._write_event(step, summary=hparams.hparams_pb(values))

    def add_event(self, event: str, values: Mapping[str, Any], step: int) -> None:
        """Adds a point to the curve of each value that has one, and a picture of the confusion matrix."""
        for name, value in values.items():
            tag = TAGS.get((event, name))
            if event == "eval" and name.startswith("test_"):
                tag = tag or name.replace("test_", "eval/", 1)  # a metric of the user's own
            if tag is not None and value is not None:
                self._write_value(step, tag=tag, simple_value=value)
        matrix = values.get("confusion")
        if event == "eval" and matrix is not None:
            png, width, height = confusion.draw(matrix, self._classes)
            image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            self._write_value(step, tag=CONFUSION_TAG, image=image)

    def _write_value(self, step: int, **value: Any) -> None:
        self._write_event(step, summary=self._summary(value=[self._summary.Value(**value)]))

    def _write_event(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())


def _hparam(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float) else _text(value)


def _text(value: Any) -> str:
    """Returns a value as text in UTF-8, which a path of another encoding is not."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _markdown(value: Any) -> str:
    """Returns a value for a cell of a Markdown table."""
    if value is None:
        return "–"
    return "`" + " ".join(_text(value).replace("|", "\\|").replace("`", "'").split()) + "`"
