"""What the doctor prints: a table, or one JSON object."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from hvd_adam.doctor.checks import OK, STATUSES, Check, worst
from hvd_adam.doctor.follow import Findings

WIDTH = 115
NAME_WIDTH = 15


def table(title: str, checks: Sequence[Check]) -> str:
    """A line for each check, longer ones over several, with the remedy below."""
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
    """One object: status, checks as the table has them, what each rank has found, and what was measured."""
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
