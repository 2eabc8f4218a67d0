"""The page: one HTML file with its data, styles and scripts, and a policy that forbids every request."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from hvd_adam._version import __version__
from hvd_adam.report import evaluation, summary
from hvd_adam.report.curves import chart_data
from hvd_adam.report.runs import Run, data_differences

FILES = Path(__file__).parent
MOST_NUMBERS = 20  # classes of a confusion matrix; with more, the shades alone are readable


def render(runs: Sequence[Run]) -> str:
    """Returns the page. Text from the runs' files is escaped: in tags by Jinja, in the data by `_as_script`."""
    scripts = [_file("uplot/uPlot.iife.min.js"), _file("report.js")]
    style = _file("uplot/uPlot.min.css") + _file("report.css")
    # autoescape for every template: their names do not end in .html.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = [summary.scores(run) for run in runs]
    names = dict.fromkeys(name for each in scores for name in each)
    rows = [(name, [each.get(name, summary.NONE) for each in scores]) for name in names]
    options = summary.options(runs)
    data = chart_data(runs)
    return environment.get_template("page.html.jinja").render(
        title=f"hvd_adam: {runs[0].name}" if len(runs) == 1 else f"hvd_adam: {len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        policy=_policy(scripts, style),
        license=_file("uplot/LICENSE"),
        scripts=scripts,
        style=style,
        data=_as_script(data),
        panels=data["panels"],
        thinned=data["thinned"],
        runs=runs,
        scores=[(name, values) for name, values in rows if set(values) != {summary.NONE}],
        warnings=data_differences(runs),
        options=options,
        differences=[option for option in options if option["different"]],
        matrices=[_matrix(run) for run in runs if run.confusion],
        recalls=evaluation.recalls(runs),
        reliabilities=[evaluation.reliability(run, place) for place, run in enumerate(runs) if run.calibration],
        mistakes=[evaluation.mistakes(run) for run in runs if run.mistakes and run.mistakes.mistakes],
        happenings=[summary.happenings(run) for run in runs],
    )


def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], style: str) -> str:
    """Returns a content security policy: these scripts, this style, pictures in the page, and no request."""
    code = f"script-src {' '.join(map(_source, scripts))}; style-src {_source(style)}"
    return f"default-src 'none'; {code}; img-src data:"


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _as_script(data: Any) -> str:
    """Returns JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _matrix(run: Run) -> dict[str, Any]:
    """Returns a confusion matrix: for each class its name, and counts with their shade, 0 to 10."""
    rows = []
    for name, counts in zip(run.classes, run.confusion, strict=True):
        total = max(1, sum(counts))
        rows.append({"name": name, "cells": [(count, round(10 * count / total)) for count in counts]})
    return {"run": run.name, "step": run.last("eval")["step"], "rows": rows, "numbers": len(rows) <= MOST_NUMBERS}
