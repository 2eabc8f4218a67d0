"""The output of the doctor: a table, or one JSON object."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from hvd_adam.doctor.report import OK, STATUSES, Check, worst
from hvd_adam.doctor.worker_process import Findings

WIDTH = 115
NAME_WIDTH = 15


def table(title: str, checks: Sequence[Check]) -> str:
    """Formats one line per check, wrapped to `WIDTH` columns, with the remedy of a warning or failure below it."""
    lines = [title, ""]
    indent = " " * (NAME_WIDTH + 7)
    for check in checks:
        start = f"{check.status:<5} {check.name:<{NAME_WIDTH}} "
        lines += textwrap.wrap(check.found, WIDTH, initial_indent=start, subsequent_indent=indent)
        if check.status != OK:
            remedy = f"{indent}→ "
            lines += textwrap.wrap(check.remedy, WIDTH, initial_indent=remedy, subsequent_indent=f"{indent}  ")
    counts = [f"{sum(check.status == status for check in checks)} {status}" for status in STATUSES]
    return "\n".join([*lines, "", ", ".join(counts)])


def as_json(title: str, checks: Sequence[Check], findings: Findings) -> str:
    """Formats one JSON object: status, the checks of the table, the report of each rank, and the measurements."""
    return json.dumps(
        {
            "title": title,
            "status": worst(check.status for check in checks),
            "checks": [asdict(check) for check in checks],
            "ranks": [
                {"rank": report.rank, "host": report.host, "versions": report.versions}
                | {"checks": [asdict(check) for check in report.checks]}
                for report in findings.reports
            ],
            "links": findings.links or [],
            "speeds": findings.speeds,
        }
    )
