"""`write_report`: from run folders to the page."""

from __future__ import annotations

from pathlib import Path

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.config import ReportConfig
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.log import logger, write_result
from hvd_adam.report.page import render
from hvd_adam.report.runs import load_runs
from hvd_adam.training.outputs import require_outputs


def write_report(config: ReportConfig) -> None:
    """Writes the page, and its path and size to stdout.

    Raises:
        UserError: a launcher started several ranks, a run folder has no metrics or its files are damaged, the runs
            have different classes, or the page cannot be written.
    """
    require_no_launcher()
    path = Path(config.output)
    require_outputs({"--output": config.output}, replace=config.force)
    runs = load_runs(config.runs)
    for run in runs:
        if run.damaged_lines:
            logger.warning(f"{run.folder}: {run.damaged_lines} damaged line(s) of metrics.jsonl are left out")
    page = render(runs)
    with whole_file("--output", path) as draft:
        # A name that is not UTF-8, as of a folder, has characters that cannot be encoded.
        draft.write_bytes(page.encode(errors="backslashreplace"))
    size = path.stat().st_size / 1000
    write_result(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}, {size:,.0f} kB\n")
