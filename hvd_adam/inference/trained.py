"""`Trained`: a checkpoint of `hvd_adam.train`, as evaluation and inference read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import require_same_tensors
from hvd_adam.config import CheckpointConfig, DataConfig
from hvd_adam.errors import UserError
from hvd_adam.import_path import is_reference

# What every version has written; options that an older one did not have are left at their defaults.
_PARTS = {"config": ("dataset", "model", "precision"), "data": ("classes", "mean", "std"), "model": ()}

# Channels, height and width of the images of data sets that checkpoints of earlier versions do not describe.
_SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Trained:
    """What was trained, how, and on which data.

    Attributes:
        path: the checkpoint's folder.
        config: of the training, by option.
        data: classes, mean and standard deviation, as in `checkpoint.state.TrainingState`.
        weights: the model's state dictionary, or its moving average.
    """

    path: Path
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    weights: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path, which: str, weights: str) -> Trained:
        """Reads a checkpoint.

        Args:
            path: as for `storage.load`.
            which: "newest" or "best", as for `storage.resolve`.
            weights: "ema", "model", or "auto": the moving average if there is one.

        Raises:
            UserError: the checkpoint is missing, damaged, or not of `hvd_adam.train`; it has no moving average.
        """
        try:
            folder = storage.resolve(path, which)
        except storage.OneCheckpoint as error:
            raise UserError(f"which {error}") from None
        state = storage.load(folder)
        for part, keys in _PARTS.items():
            value = state.get(part) if isinstance(state, Mapping) else None
            found = value if isinstance(value, Mapping) else {}
            missing = [part] if found is not value else [f"{part}.{key}" for key in keys if found.get(key) is None]
            if missing:
                raise UserError(f"checkpoint {folder} was not written by hvd_adam.train: no {missing[0]!r}")
        config, data, model, averages = state["config"], state["data"], state["model"], state.get("ema")
        if weights == "ema" and averages is None:
            raise UserError(f"weights ema: checkpoint {folder} is of a run without --ema")
        return cls(folder, config, data, model if weights == "model" or averages is None else averages)

    @classmethod
    def of_options(cls, config: CheckpointConfig) -> Trained:
        """Reads the checkpoint that the options of a command name; raises as `read`."""
        try:
            return cls.read(config.checkpoint, config.which, config.weights)
        except UserError as error:
            is_option = str(error).startswith(("which ", "weights "))
            raise UserError(f"--{error}" if is_option else str(error)) from None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if there are none."""
        return tuple(self.data["classes"])

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel, in units where 255 is 1; None without normalization."""
        mean, std = tuple(self.data["mean"]), tuple(self.data["std"])
        return (mean, std) if mean and std else None

    @property
    def parallel(self) -> bool:
        """Whether forward passes may run at the same time: a user's own may store values in attributes."""
        return not is_reference(self.config["model"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if "shape" in self.data:
            return tuple(self.data["shape"])
        dataset, image_size = self.config["dataset"], self._option("image_size")
        if dataset == "synthetic":
            channels, height, width = map(int, self._option("synthetic_shape").lower().split("x"))
            return channels, height, width
        if dataset == "imagefolder":
            return 3, image_size, image_size
        if dataset in _SHAPES:
            return _SHAPES[dataset]
        raise UserError(
            f"checkpoint {self.path} does not hold the shape of the inputs, as an earlier version wrote it: train "
            "for another epoch (--resume auto, more --epochs), which writes a complete one"
        )

    @property
    def resize(self) -> tuple[int, int] | None:
        """Height and width that test images were resized to cover, before the center crop; None if not known."""
        if "resize" in self.data:
            return None if self.data["resize"] is None else tuple(self.data["resize"])
        if self.config["dataset"] == "imagefolder":
            from hvd_adam.data.image_folder.load import resized_side  # imports torchvision

            return (resized_side(self._option("image_size")),) * 2
        return self.shape[1:] if self.config["dataset"] in (*_SHAPES, "synthetic") else None  # type: ignore[return-value]

    def _option(self, name: str) -> Any:
        """Returns an option of the training; its default, where an older version did not have it."""
        return self.config.get(name, getattr(DataConfig, name))

    def load_into(self, model: nn.Module) -> None:
        """Loads the weights into a model.

        Raises:
            UserError: they do not fit.
        """
        own = model.state_dict()
        lazy = {name for name, value in own.items() if is_lazy(value) and name in self.weights}
        own, saved = ({k: v for k, v in state.items() if k not in lazy} for state in (own, self.weights))
        require_same_tensors(own, saved, str(self.path))
        model.load_state_dict(self.weights)
