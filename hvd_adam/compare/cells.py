"""`Cell`: one training run of a comparison, and the files in which finished ones are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvd_adam.checkpoint.files import write_atomically

Result = dict[str, Any]

# What `runner.train` returns, and the table is made of.
RESULT_KEYS = frozenset(
    "validation_accuracy validation_loss test_accuracy test_loss updates seconds diverged curve "
    "gradient_norms".split()
)


@dataclass(frozen=True)
class Cell:
    """One training run. Equal cells are the same run, whichever rows of the table they belong to.

    Attributes:
        network: "" for --model, or a network of `networks.DEEP`.
        initialization: of `networks.INITIALIZATIONS`.
        optimizer: of `config.OPTIMIZERS`.
        lr: learning rate before its decay.
        betas: β₁ and β₂.
        eps: ε.
        batch_size: images per update.
        seed: of the weights and of the order of the images.
    """

    network: str
    initialization: str
    optimizer: str
    lr: float
    betas: tuple[float, float]
    eps: float
    batch_size: int
    seed: int


class CellStore:
    """The finished runs of a folder, one JSON file each, written atomically.

    A file's name has a checksum of everything that decides the result, so a result is used for the same run only.

    Args:
        folder: is created when the first result is written.
        settings: what decides a result besides the cell: JSON values by name.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)

    def _key(self, cell: Cell) -> str:
        return json.dumps({**self.settings, **asdict(cell)}, sort_keys=True)

    def path(self, cell: Cell) -> Path:
        """Returns the file of a cell."""
        checksum = hashlib.sha256(self._key(cell).encode()).hexdigest()[:16]
        return self.folder / f"{cell.optimizer}-lr{cell.lr:g}-seed{cell.seed}-{checksum}.json"

    def read(self, cell: Cell) -> Result | None:
        """Returns the result of a cell; None if it is not finished, or its file is damaged."""
        try:
            stored = json.loads(self.path(cell).read_text())
            is_whole = stored["run"] == json.loads(self._key(cell)) and stored["result"].keys() >= RESULT_KEYS
            return stored["result"] if is_whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, cell: Cell, result: Result) -> None:
        """Writes the result of a cell.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"run": json.loads(self._key(cell)), "result": result}, indent=1, allow_nan=False)
        write_atomically(self.path(cell), text + "\n")
