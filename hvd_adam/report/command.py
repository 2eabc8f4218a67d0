"""`write_report`: from run folders to the page."""

from __future__ import annotations

from pathlib import Path

from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.config import ReportConfig
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.errors import UserError
from hvd_adam.log import logger, write_result
from hvd_adam.report.page import render
from hvd_adam.report.runs import load_runs


def write_report(config: ReportConfig) -> None:
    """Writes the page, and its path and size to stdout.

    Raises:
        UserError: a launcher started several ranks, a run folder has no metrics or its files are damaged, the runs
            have different classes, or the page cannot be written.
    """
    require_no_launcher()
    path = Path(config.output)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}: make it first")
    if path.exists() and not config.force:
        raise UserError(f"--output {path} exists: choose another name, or replace it with --force")
    runs = load_runs(config.runs)
    for run in runs:
        if run.damaged_lines:
            logger.warning(f"{run.folder}: {run.damaged_lines} damaged line(s) of metrics.jsonl are left out")
    page = render(runs)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror})") from None
    size = path.stat().st_size / 1000
    write_result(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}, {size:,.0f} kB\n")
