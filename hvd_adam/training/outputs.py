"""`require_outputs`: checks the files that a command writes before its work. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from hvd_adam.checkpoint.output import require_free
from hvd_adam.errors import UserError
from hvd_adam.training.plots import PLOT_FILE
from hvd_adam.training.run_log import METRICS_FILE
from hvd_adam.training.scores.mistakes_file import MISTAKES_FILE

_CHECKPOINTS = "checkpoints"
_CHECKPOINT_FILES = ("state.pt", "manifest.json")
_RUN_FILES = (METRICS_FILE, "config.yaml", PLOT_FILE, "mistakes*.png", MISTAKES_FILE, "events.out.*", ".lock")


def require_outputs(paths: Mapping[str, str | None], *, replace: bool) -> None:
    """Checks that files may be written: as `require_free`, each at a path of its own, and none is a file of a run.

    Args:
        paths: the files by the option that names them; None: the option is not given.
        replace: whether they may exist.

    Raises:
        UserError: a file may not be written.
    """
    found: dict[Path, str] = {}
    for option, name in paths.items():
        if name is None:
            continue
        path = Path(name)
        require_free(option, path, replace=replace)
        place = path.parent.resolve() / path.name  # a link is itself replaced, not what it leads to
        if place in found:
            raise UserError(f"{option} {path} is also the file of {found[place]}: choose another name")
        found[place] = option
        if owner := _owner(place):
            raise UserError(f"{option} {path} is a file of {owner}: choose another name")


def _owner(path: Path) -> str:
    """Returns what a file belongs to, for the message; empty if no run needs the file."""
    for folder in path.parents:
        if all((folder / name).is_file() for name in _CHECKPOINT_FILES):
            return "the checkpoint itself"
        if folder.name == _CHECKPOINTS and any(folder.glob("step-*/manifest.json")):
            return f"the run's {_CHECKPOINTS} folder"
    is_run = (path.parent / METRICS_FILE).is_file() or (path.parent / _CHECKPOINTS).is_dir()
    return "the run itself" if is_run and any(fnmatchcase(path.name, form) for form in _RUN_FILES) else ""
