"""`Run`: what a run folder records, read without torch; and whether runs can be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hvd_adam.errors import UserError
from hvd_adam.log import logger
from hvd_adam.text import described
from hvd_adam.training.plots import CROSS_ENTROPY
from hvd_adam.training.run_log import METRICS_FILE, parse_events
from hvd_adam.training.scores import calibration, mistakes_file
from hvd_adam.training.scores.mistakes_file import ShownMistakes

CONFIG_FILE = "config.yaml"
BUILT_IN_SCORES = ("test_loss", "test_accuracy", "test_balanced_accuracy", "test_ece")
MOST_PICTURES = 96  # on a page: each takes up to 17 kB

# What PyYAML raises for a text that does not fit its tag, as in `!!int ""`, besides its own errors.
_MISFITS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: the folder's name, or its path where several runs have the same name.
        folder: the run folder.
        events: the events of `metrics.jsonl`, in order; not empty.
        damaged_lines: number of lines of `metrics.jsonl` that are no event, without an incomplete last one.
        config: the options by name; None if there is no `config.yaml`.
        head: the comments in front of the options by what precedes their colon, such as "Command line".
        mistakes: the most confident ones of the last evaluation; None if it has recorded none.
    """

    name: str
    folder: Path
    events: list[dict[str, Any]]
    damaged_lines: int
    config: dict[str, Any] | None
    head: dict[str, str]
    mistakes: ShownMistakes | None = None

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Returns the events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def last(self, *kinds: str) -> dict[str, Any]:
        """Returns the last event of some kinds; empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), {})

    @property
    def start(self) -> dict[str, Any]:
        """The last `start` or `resume` event; empty if there is none."""
        return self.last("start", "resume")

    @property
    def data(self) -> dict[str, Any]:
        """What the run has recorded of its data; empty for runs of releases that did not."""
        data = self.start.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def loss_function(self) -> str:
        """The loss, as `--loss` names it; releases without the option had the cross-entropy."""
        return str(self.start.get("loss_function", CROSS_ENTROPY))

    @property
    def metrics(self) -> list[str]:
        """The keys of the scores that `--metrics` adds to evaluations."""
        keys = dict.fromkeys(key for event in self.of("eval") for key in event if key.startswith("test_"))
        return [key for key in keys if key not in BUILT_IN_SCORES]

    @property
    def confusion(self) -> list[list[int]]:
        """The confusion matrix of the last evaluation; empty if there is none."""
        matrix = self.last("eval").get("confusion")
        rows = matrix if isinstance(matrix, list) else []
        square = all(isinstance(row, list) and len(row) == len(rows) for row in rows)
        return rows if square and all(isinstance(n, int) and n >= 0 for row in rows for n in row) else []

    @property
    def recall(self) -> list[float | None]:
        """Recall of each class in the last evaluation, None for one without samples; empty if there is none."""
        values = self.last("eval").get("recall")
        rows = values if isinstance(values, list) and len(values) == len(self.classes) else []
        return [number({"recall": value}, "recall") for value in rows]

    @property
    def calibration(self) -> list[list[Any]]:
        """The bins of the last evaluation, as `Calibration.rows` returns them; empty if there is none."""
        rows: Any = self.last("eval").get("calibration")
        return rows if calibration.is_rows(rows) else []

    @property
    def classes(self) -> list[str]:
        """The names of the classes; their numbers if they are not recorded; empty if nothing is known of them."""
        names = self.data.get("classes")
        if isinstance(names, list) and names and len(self.confusion) in (0, len(names)):
            return [str(name) for name in names]
        return [str(number) for number in range(len(self.confusion))]


def number(event: dict[str, Any], key: str) -> float | None:
    """Returns a number of an event; None if it is missing or not finite."""
    value = event.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Reads run folders.

    Raises:
        UserError: one is no run folder, cannot be read, is damaged, or is given twice; or the classes differ.
    """
    folders = [Path(path) for path in paths]
    resolved = [_resolved(folder) for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{folder} is given twice: give each run once")
    names = [place.name for place in resolved]
    runs = [
        _load(folder, name if names.count(name) == 1 else str(folder), MOST_PICTURES // len(paths))
        for folder, name in zip(folders, names, strict=True)
    ]
    _require_same_classes(runs)
    return runs


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "its symbolic links form a loop"
        raise UserError(f"{folder} cannot be read ({reason}): give a run folder of hvd_adam.train") from None


def _load(folder: Path, name: str, pictures: int) -> Run:
    metrics = folder / METRICS_FILE
    try:
        if not metrics.is_file():
            raise UserError(_no_metrics(folder))
        text = metrics.read_text(errors="replace")
        config, head = _load_config(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None
    events, lines = list(parse_events(text)), text.split("\n")
    if not events:
        raise UserError(f"{metrics} has no events: the run has not started, or the file is damaged")
    damaged = sum(map(bool, lines[:-1])) - len(events)  # what follows the last line's end is being written
    return Run(name, folder, events, max(0, damaged), config, head, _load_mistakes(folder, pictures))


def _load_mistakes(folder: Path, pictures: int) -> ShownMistakes | None:
    try:
        return mistakes_file.read(folder, pictures)
    except UserError as error:  # the rest of the run is whole
        logger.warning(f"{error}: the mistakes are left out")
        return None


def _no_metrics(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder {folder}: give a run folder of hvd_adam.train"
    if not folder.is_dir():
        return f"{folder} is a file: give its run folder"
    inner = sorted(folder.glob(f"*/{METRICS_FILE}"))
    hint = f"it contains runs, such as {inner[0].parent}" if inner else "give a run folder of hvd_adam.train"
    return f"{folder} has no {METRICS_FILE}: {hint}"


class _Loader(yaml.SafeLoader):
    """Names the line of a value that does not fit its tag, or is a number of thousands of digits."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # as the page shows it: Python writes no more than 4300 digits
        except _MISFITS:
            problem = "this value is not of its kind, or has too many digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value


def _load_config(path: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Returns the options and the comments in front of them."""
    if not path.is_file():
        return None, {}
    text = path.read_text(errors="replace")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("aliases repeat values, without end or too often")
        config = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{place}: this is not valid YAML ({problem}): repair or remove the file") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has no options: repair or remove the file")
    head = re.findall(r"^# ([A-Z][a-z ]*): (.*)$", text, re.MULTILINE)
    return {str(name): value for name, value in config.items()}, dict(head)


def _require_same_classes(runs: list[Run]) -> None:
    """Checks that the runs solve the same task: losses and accuracies of different classes are not comparable."""
    known = [run for run in runs if run.classes]
    for run in known[1:]:
        first = known[0]
        named = first.data.get("classes") is not None and run.data.get("classes") is not None
        if first.classes != run.classes if named else len(first.classes) != len(run.classes):
            raise UserError(
                f"{first.folder} has {described(first.classes)} and {run.folder} {described(run.classes)}: "
                "give runs with the same classes"
            )


def data_differences(runs: Sequence[Run]) -> list[str]:
    """Returns why the test scores of the runs are not comparable; empty if they are, as far as is recorded."""
    reasons = []
    if len({number(run.data, "test_images") for run in runs if run.data}) > 1:
        reasons.append("the numbers of test images differ")
    if len({str(run.data.get("fingerprint")) for run in runs if run.data}) > 1:
        reasons.append("the training images differ")
    options = ("dataset", "positive_class", "synthetic_shape", "synthetic_samples")
    values = [[repr((run.config or {}).get(name)) for name in options] for run in runs if run.config]
    if any(value != values[0] for value in values[1:]) and not reasons:
        reasons.append("the options of the data set differ")
    if len({run.loss_function for run in runs}) > 1:
        reasons.append("the loss functions differ")
    return reasons
