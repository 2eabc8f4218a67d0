"""The mistakes of the last evaluation in the run folder: one picture, and a JSON file that describes it.

Imports neither torch nor NumPy at first: the report reads it on login nodes, and other commands need its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from hvd_adam.training.scores.mistakes import Mistake

MISTAKES_FILE = "mistakes.json"
COLUMNS = 8  # pictures in a row

_LARGEST_SPRITE = 2**20  # pixels: of another program's file, which is not decoded

# What json and Pillow raise for damaged files.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError, SyntaxError)


def try_write(folder: Path, step: int, mistakes: Sequence[Mistake], classes: Sequence[str]) -> str | None:
    """Calls `write`; returns None, or why it failed, for example because the disk is full."""
    try:
        write(folder, step, mistakes, classes)
    except OSError as error:
        return f"cannot write {folder / MISTAKES_FILE}: {error.strerror}; training continues"
    return None


def write(folder: Path, step: int, mistakes: Sequence[Mistake], classes: Sequence[str]) -> None:
    """Replaces the mistakes in a run folder.

    The picture has a name of its own for each evaluation, and `mistakes.json` names it: a process that is killed
    leaves the old pair or the new one.

    Args:
        folder: the run folder.
        step: updates made before the evaluation.
        mistakes: at least 0.
        classes: names of the classes.

    Raises:
        OSError: a file cannot be written.
    """
    content: dict[str, Any] = {"step": step, "picture": None, "width": 0, "height": 0, "columns": COLUMNS}
    if mistakes:
        height, width = mistakes[0].picture.shape[1:]
        name = f"mistakes-{step:08d}.png"
        write_atomically(folder / name, _sprite([mistake.picture for mistake in mistakes]))
        content |= {"picture": name, "width": width, "height": height}
    content["mistakes"] = [
        {
            "index": mistake.index,
            "class": classes[mistake.label],
            "predicted": classes[mistake.predicted],
            "probability": mistake.probability,
        }
        for mistake in mistakes
    ]
    write_atomically(folder / MISTAKES_FILE, json.dumps(content, indent=1) + "\n")
    for other in folder.glob("mistakes-*.png"):
        if other.name != content["picture"]:
            other.unlink(missing_ok=True)


def _sprite(pictures: Sequence[np.ndarray]) -> bytes:
    """Returns the pictures, row by row, as one PNG file."""
    # Here: only rank 0 of a training needs them.
    import numpy as np
    from PIL import Image

    channels, height, width = pictures[0].shape
    columns, rows = min(COLUMNS, len(pictures)), -(-len(pictures) // COLUMNS)
    sprite = np.full((height * rows, width * columns, channels), 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = height * (place // COLUMNS), width * (place % COLUMNS)
        sprite[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    file = BytesIO()
    Image.fromarray(sprite[..., 0] if channels == 1 else sprite).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class ShownMistake:
    """A mistake that was read from a run folder.

    Attributes:
        index: of the test sample.
        label: name of its class.
        predicted: name of the class that it was taken for.
        probability: of that class.
        png: the image as a PNG file.
    """

    index: int
    label: str
    predicted: str
    probability: float
    png: bytes


@dataclass(frozen=True)
class ShownMistakes:
    """The mistakes of an evaluation.

    Attributes:
        step: updates made before the evaluation.
        mistakes: the most confident ones, descending.
    """

    step: int
    mistakes: list[ShownMistake]


def read(folder: Path, most: int) -> ShownMistakes | None:
    """Returns the mistakes in a run folder, at most `most`; None if the run has written none.

    Raises:
        UserError: the files are damaged.
    """
    path = folder / MISTAKES_FILE
    try:
        if not path.is_file():
            return None
        content = json.loads(path.read_text(errors="replace"))
        entries = content["mistakes"][:most]
        sprite = _open(folder, content["picture"]) if entries else None
        return ShownMistakes(
            int(content["step"]),
            [_shown(content, sprite, place, entry) for place, entry in enumerate(entries) if sprite],
        )
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        raise UserError(f"{path} or its picture is damaged ({reason})") from None


def _open(folder: Path, name: str) -> Image:
    """Returns the picture; its name must be that of a file in the run folder itself."""
    from PIL import Image  # its import takes a moment

    if Path(name).name != name:
        raise ValueError(f"{name!r} is not in the run folder")
    if not (folder / name).is_file():  # a named pipe would be waited for
        raise ValueError(f"{name!r} is not a file")
    try:
        sprite = Image.open(folder / name, formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if sprite.width * sprite.height > _LARGEST_SPRITE:
        raise ValueError(f"{name} is too large")
    sprite.load()
    return sprite


def _shown(content: dict[str, Any], sprite: Image, place: int, entry: dict[str, Any]) -> ShownMistake:
    width, height, columns = (int(content[key]) for key in ("width", "height", "columns"))
    left, top = width * (place % max(1, columns)), height * (place // max(1, columns))
    if min(width, height, columns) < 1 or left + width > sprite.width or top + height > sprite.height:
        raise ValueError("the picture is smaller than its description says")
    file = BytesIO()
    sprite.crop((left, top, left + width, top + height)).save(file, "PNG")
    return ShownMistake(
        int(entry["index"]),
        str(entry["class"]),
        str(entry["predicted"]),
        float(entry["probability"]),
        file.getvalue(),
    )
