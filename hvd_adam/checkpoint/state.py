"""`TrainingState`: everything that a run needs to resume, as the dictionary that a checkpoint holds.

The dictionary contains plain containers, numbers, strings and tensors. The optimizer's part has the format of
`torch.optim.Adam` for every strategy, unless `--state-format` holds the state in few bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from hvd_adam.checkpoint.random_states import random_state
from hvd_adam.distributed.broadcast.tensors import with_versions
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.errors import UserError

# Options that a resumed run may change: they affect where and how fast it computes, not the result, or, with
# --strategy local, how far the islands go between meetings.
CHANGEABLE_OPTIONS = frozenset(
    "epochs max_steps batch_size global_batch_size accumulate implementation state_format strategy local_steps "
    "islands outer_lr outer_momentum compression bucket_mib release_gradients tune threads "
    "channels_last compile deterministic device data_dir download output_dir resume checkpoint_every keep "
    "max_time log_every eval_every eval_batch_size metrics init_from check_consistency_every max_skipped "
    "allow_data_change elastic commit_every stall_timeout cache max_corrupt workers noise_scale "
    "noise_scale_form".split()
)

# Entries of `TrainingState.data` that a resumed run must find again, and their names in messages.
DATA_FACTS = {
    "classes": "the list of classes",
    "train_images": "the number of training images",
    "test_images": "the number of test images",
    "mean": "the mean of the training images",
    "fingerprint": "the fingerprint of the training images",
}


@dataclass
class Progress:
    """How far a run has come. The names of the fields are the keys in a checkpoint.

    Attributes:
        step: updates made, skipped ones included.
        epoch: the current epoch, from 1.
        epoch_done: whether the epoch is complete, with its evaluation, if it has one.
        skipped: updates skipped because a gradient was not finite.
        skipped_in_a_row: skipped updates since the last one that was applied.
        best_accuracy: the highest test accuracy so far, in [0, 1]; None without one.
        best_loss: the test loss of that evaluation, or the lowest without accuracies; None without one.
        best_step: the updates before that evaluation; None without one, and of older checkpoints.
        scores: the evaluation of these updates (`training.scores.scoring.Scores.as_dict`), or None.
        global_batch_size: images per update, over all ranks.
        micro_batch_size: the largest number of images in a micro-batch of one rank.
        noise: the state of the `NoiseMeter`; empty without one.
    """

    step: int = 0
    epoch: int = 1
    epoch_done: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_accuracy: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    scores: dict[str, Any] | None = None
    global_batch_size: int = 0
    micro_batch_size: int = 0
    noise: list[float] = field(default_factory=list)

    def is_best(self, accuracy: float | None, loss: float) -> bool:
        """Returns whether an evaluation is the best so far, and remembers it.

        The highest accuracy is the best, and of equal ones, or where there is none, the lowest loss.
        """
        lower_loss = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if accuracy is None:
            is_best = lower_loss
        elif self.best_accuracy is None or accuracy > self.best_accuracy:
            is_best = True
        else:
            is_best = accuracy == self.best_accuracy and self.best_loss is not None and lower_loss
        if is_best:
            self.best_accuracy, self.best_loss = accuracy, loss if math.isfinite(loss) else math.inf
            self.best_step = self.step
        return is_best

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Progress:
        """Builds it from a checkpoint's `progress`; missing keys have their defaults."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})


# Parts that older checkpoints do not have, and those that may be None.
_NEWER_PARTS = ("ema", "residuals", "islands")
_OPTIONAL_PARTS = ("loss_scaler", *_NEWER_PARTS)

# The types of the entries of `Progress` that may be missing.
_PROGRESS: dict[str, tuple[type, ...]] = {
    "epoch_done": (bool,),
    **dict.fromkeys(("skipped", "skipped_in_a_row", "best_step", "micro_batch_size"), (int,)),
    **dict.fromkeys(("best_accuracy", "best_loss"), (float, int)),
    "scores": (dict,),
    "noise": (list,),
}


@dataclass
class TrainingState:
    """The state that rank 0 saves.

    Attributes:
        model: the model's state dictionary.
        optimizer: `Adam.held_state_dict`: the format of `torch.optim.Adam`, unless state is held in few bits.
        loss_scaler: the loss scaler's state dictionary, or None.
        progress: a `Progress` as a dictionary; in memory also "events", the last ones of `RunLog`.
        schedule: "initial" and "peak" learning rate.
        ranks: one dictionary per rank: `random_state`, and "loss", the rank's part of the running mean.
        config: the run's configuration.
        data: "classes" of the data set; "mean" and "std" of its channels; "shape" of an input; "resize", the size
            that a test image is resized to cover before its center is cropped, or None; the numbers
            "train_images" and "test_images"; "fingerprint", a checksum of the training images and labels.
        ema: the moving average of the model's state dictionary, or None.
        residuals: `ErrorFeedback.state_dict_on_root` or `total_state_dict`, or None.
        islands: `LocalAdam.islands_on_root`, or None.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    loss_scaler: dict[str, Any] | None
    progress: dict[str, Any]
    schedule: dict[str, float]
    ranks: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any]
    ema: dict[str, Any] | None = None
    residuals: dict[str, Any] | None = None
    islands: dict[str, Any] | None = None

    def copy(self, over: TrainingState | None = None) -> TrainingState:
        """Returns a copy on the CPU that training does not modify, in the memory of `over` where it fits."""
        return TrainingState(**copy_to_cpu(self.as_dict(), None if over is None else over.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """Returns the dictionary that a checkpoint holds, without copying; `from_dict` reads it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], where: str) -> TrainingState:
        """Builds the state from a checkpoint's dictionary.

        Args:
            saved: the dictionary.
            where: the checkpoint, for the message.

        Raises:
            UserError: a part that a resume needs is missing or has a wrong type; the message names it.
        """
        for part in fields(cls):
            if part.name not in saved and part.name not in _NEWER_PARTS:
                raise UserError(f"checkpoint {where} cannot be resumed: it has no {part.name}")
        for name, value, expected in _typed(saved):
            if not isinstance(value, expected):
                wrong = f"{name} is of type {type(value).__name__}, not {expected[0].__name__}"
                raise UserError(f"checkpoint {where} cannot be resumed: {wrong}")
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def require_same_run(self, config: Mapping[str, Any], global_batch_size: int | None, where: str) -> None:
        """Raises UserError if the checkpoint belongs to a run with other options; names the first difference.

        Args:
            config: the configuration of the run that resumes.
            global_batch_size: its images per update; None if it uses the checkpoint's.
            where: the checkpoint, for the message.
        """
        remedy = "use the same, or --resume never and another --output-dir"
        for name, value in config.items():
            saved = self.config.get(name, value)
            if name not in CHANGEABLE_OPTIONS and saved != value:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {value!r}, but {saved!r} in checkpoint {where}: {remedy}")
        saved = self.progress["global_batch_size"]
        if global_batch_size not in (None, saved):
            raise UserError(
                f"an update has {global_batch_size} images, but {saved} in checkpoint {where}: use "
                f"--global-batch-size {saved}, or --resume never and another --output-dir"
            )

    def require_same_data(self, data: Mapping[str, Any], where: str, *, allow_change: bool = False) -> None:
        """Raises UserError if the run has been trained on other data; names the first difference.

        Args:
            data: `DeviceLoader.description()` of the run that resumes.
            where: the checkpoint, for the message.
            allow_change: accept other images of the same classes.
        """
        for name, what in DATA_FACTS.items():
            own = data[name]
            saved = self.data.get(name, own)  # older checkpoints have classes and means only
            is_unknown = name == "fingerprint" and not saved
            if own == saved or is_unknown or (allow_change and name != "classes"):
                continue
            remedy = "use the same data, or --resume never and another --output-dir"
            if name != "classes":
                remedy += "; --allow-data-change continues with the data as it is now"
            raise UserError(f"{what} is {own}, but {saved} in checkpoint {where}: {remedy}")


def _typed(saved: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Yields the name, the value and the required types of each part, then of entries that every resume reads."""
    for part in fields(TrainingState):
        value = saved.get(part.name)
        if value is not None or part.name not in _OPTIONAL_PARTS:
            yield part.name, value, (list,) if part.name == "ranks" else (dict,)
    for number, rank in enumerate(saved["ranks"]):
        yield f"the state of rank {number}", rank, (dict,)
    progress = saved["progress"]
    for name in ("step", "epoch", "global_batch_size"):
        yield f"progress.{name}", progress.get(name), (int,)
    for name, expected in _PROGRESS.items():
        if progress.get(name) is not None:
            yield f"progress.{name}", progress[name], expected
    for name in ("initial", "peak"):
        yield f"schedule.{name}", saved["schedule"].get(name), (float, int)


@contextmanager
def naming_part(part: str, where: str) -> Iterator[None]:
    """Names a part of a checkpoint, as a UserError, if loading it in this block fails because of what it holds.

    Args:
        part: as in "the optimizer".
        where: the checkpoint.
    """
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"checkpoint {where} cannot be resumed: {part} in it cannot be loaded ({reason})"
        ) from error


def require_same_tensors(own: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Raises UserError if saved weights do not fit a model; names the first difference in names or shapes.

    Args:
        own: the model's state dictionary; what is no tensor, such as the extra state of a module, is not compared.
        saved: the checkpoint's.
        where: the checkpoint, for the message.
    """
    own, saved = tensors_of(own), tensors_of(saved)
    for name in sorted({*own, *saved}, key=str):
        here, there = (tuple(w[name].shape) if name in w else "absent" for w in (own, saved))
        if here != there:
            raise UserError(
                f"checkpoint {where} is of another model or data set: {name} is {there} in it and {here} in the "
                "model"
            )


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model's state dictionary."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def rank_state(cluster: Cluster, loss: tuple[float, float]) -> dict[str, Any]:
    """Returns this rank's entry of `TrainingState.ranks`; `loss` is `RunningMean.state()`."""
    return {**random_state(cluster.device), "loss": list(loss)}


def copy_to_cpu(value: Any, over: Any = None) -> Any:
    """Returns a deep copy of nested containers with all tensors on the CPU.

    Args:
        value: dictionaries, lists, tuples, tensors and immutable values.
        over: an older copy. Its tensors are overwritten and used again where shape and dtype agree, because
            allocating new memory takes longer.
    """
    if isinstance(value, torch.Tensor):
        fits = isinstance(over, torch.Tensor) and (over.shape, over.dtype) == (value.shape, value.dtype)
        return over.copy_(value.detach()) if fits else value.detach().to("cpu", copy=True)
    if isinstance(value, Counter | set):  # of immutable values
        return type(value)(value)
    if isinstance(value, Mapping):
        older = over if isinstance(over, Mapping) else {}
        return with_versions(value, {key: copy_to_cpu(item, older.get(key)) for key, item in value.items()})
    if isinstance(value, list | tuple):
        fits = isinstance(over, list | tuple) and len(over) == len(value)
        return type(value)(map(copy_to_cpu, value, over if fits else [None] * len(value)))
    return value
