"""`bench checkpoint`: the cost of writing checkpoints during training, in whole runs of `hvd_adam.train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_adam.bench import launchers
from hvd_adam.bench.config import CheckpointConfig
from hvd_adam.bench.report import TIMES, Column, Result, bars
from hvd_adam.bench.stats import Row, add_ratio, timing
from hvd_adam.bench.step_worker import IMAGE
from hvd_adam.checkpoint import storage
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITHOUT, WITH = "without", "with"

COLUMNS = (
    Column("model", "model"),
    Column("checkpoints", "variant"),
    Column("MB each", "megabytes", ".1f"),
    *TIMES,
    Column("/ without", "to_without", ".3f"),
)


def measure(config: CheckpointConfig) -> Result:
    """Trains every model with and without checkpoints, interleaved.

    Raises:
        UserError: fewer GPUs than ranks, or no Horovod.
    """
    device = launchers.device(config, config.np)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hvd_adam-bench-", dir=config.folder) as folder:
        for model in config.model_names():
            runs: dict[str, list[Row]] = {WITHOUT: [], WITH: []}
            for number in range(config.repeats):
                for variant, done in runs.items():
                    logger.info(f"model {model}, round {number + 1} of {config.repeats}, {variant} checkpoints")
                    done.append(
                        _train(config, device, model, variant, Path(folder, f"{model}-{variant}-{number}"))
                    )
            rows += summarize(model, runs)
    notes = [
        f"{launchers.description(config.np, config.launcher)}, on {device}, {launchers.threads(config.np)} "
        f"threads and {config.batch_size} images of {'x'.join(map(str, IMAGE))} per rank",
        f"time per update, as the mean of {config.every}: medians and quartiles of {config.repeats} interleaved "
        f"runs of {config.steps} updates each; the first {config.every} updates of a run are not counted",
        f"with: --checkpoint-every {config.every}, written to {config.folder or tempfile.gettempdir()}",
    ]

    def draw(figure: Figure) -> None:
        panels = {name: [row for row in rows if row["model"] == name] for name in config.model_names()}
        bars(figure, panels, "variant")

    return Result(rows, COLUMNS, notes, draw)


def _train(config: CheckpointConfig, device: str, model: str, variant: str, folder: Path) -> Row:
    """Runs one training.

    Returns:
        "seconds" per update in each interval except the first, and "megabytes" of the last checkpoint; or "error".
    """
    options = {
        "dataset": "synthetic",
        "synthetic-shape": "x".join(map(str, IMAGE)),
        "synthetic-samples": config.np * config.batch_size * config.steps,
        "model": model,
        "device": device,
        "batch-size": config.batch_size,
        "epochs": 1,
        "max-steps": config.steps,
        "log-every": config.every,
        "output-dir": folder,
    }
    if variant == WITH:
        options["checkpoint-every"] = config.every
    arguments = [f"--{name}={value}" for name, value in options.items()]
    plan = launchers.horovodrun(variant, {}, config.np, config.launcher)
    command = [*plan.command[: -len(launchers.WORKER)], sys.executable, "-m", "hvd_adam.train", *arguments]
    try:
        done = subprocess.run(
            command, env={**os.environ, **plan.environ}, capture_output=True, text=True, timeout=config.timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{model} {variant} checkpoints did not end within {config.timeout:g} seconds"}
    if done.returncode:
        return {
            "error": f"{model} {variant} checkpoints ended with code {done.returncode}:\n{done.stderr.strip()}"
        }
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    # Of whole intervals: the last one may be shorter. The first one is not counted.
    whole = config.steps // config.every
    rates = [event["images_per_second"] for event in events if event["event"] == "step"][1:whole]
    images = config.np * config.batch_size
    state = storage.checkpoint_path(folder / "checkpoints", config.steps) / storage.STATE
    return {"seconds": [images / rate for rate in rates], "megabytes": state.stat().st_size / 1e6}


def summarize(model: str, runs: dict[str, list[Row]]) -> list[Row]:
    """Returns one row per variant; if a run of it failed, with its first error."""
    rows: list[Row] = []
    for variant, done in runs.items():
        row: Row = {"model": model, "variant": variant}
        errors = [run["error"] for run in done if "error" in run]
        if errors:
            row["error"] = errors[0]
        else:
            row |= timing([seconds for run in done for seconds in run["seconds"]])
            row["megabytes"] = done[0]["megabytes"]
        rows.append(row)
    add_ratio(rows, "to_without", rows[0])
    return rows
