"""`bench data`: images per second and memory of one rank that reads a folder of images in several ways."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hvd_adam.bench import launchers
from hvd_adam.bench.config import DataConfig
from hvd_adam.bench.interleave import Outcome, Plan, take_turns
from hvd_adam.bench.report import Column, Result
from hvd_adam.bench.stats import Row, quartiles, ratio
from hvd_adam.data.image_folder.load import load_packed
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TORCH = "torch DataLoader"
VARIANTS = {TORCH: "torch", "imagefolder": "files", "imagefolder --cache": "cache"}
CLASSES = 4
PIXELS = (400, 300)  # of the generated images

COLUMNS = (
    Column("images", "images", "d"),
    Column("variant", "variant"),
    Column("images/s", "rate", ".0f"),
    Column("25 %", "low", ".0f"),
    Column("75 %", "high", ".0f"),
    Column("/ torch", "to_torch", ".2f"),
    Column("MB", "megabytes", ".0f"),
)


def measure(config: DataConfig) -> Result:
    """Reads generated JPEG files with every variant, interleaved."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hvd_adam-bench-") as folder:
        for count in config.image_counts():
            photos = Path(folder, str(count))
            logger.info(f"writing {count} images")
            write_photos(photos, count)
            cache = Path(folder, "cache")
            # Here, so that what a rank holds in memory is not what the decoding left there.
            load_packed(photos, cache, image_size=config.image_size, workers=config.workers)
            task = {
                "kind": "data",
                "folder": str(photos),
                "cache": str(cache),
                "image_size": config.image_size,
                "workers": config.workers,
                "batch_size": config.batch_size,
                "batches": config.batches,
            }
            plans = [Plan(name, task | {"variant": kind}, launchers.WORKER) for name, kind in VARIANTS.items()]
            outcomes = take_turns(plans, ranks=1, rounds=config.repeats, timeout=config.timeout, log=logger.info)
            rows += summarize(count, outcomes, config.batch_size * config.batches)
    notes = [
        f"JPEG files of {PIXELS[0]}x{PIXELS[1]} pixels into normalized float32 batches of {config.batch_size} x 3 "
        f"x {config.image_size} x {config.image_size} on the CPU; one rank, {config.workers} workers",
        f"medians and quartiles of {config.repeats} interleaved turns of {config.batches} batches each",
        f"{TORCH}: torchvision's ImageFolder and transforms v2 in a plain loop, as many workers",
        "MB: resident memory of the rank itself, without workers, after the last turn",
    ]
    return Result(rows, COLUMNS, notes, partial(_draw, rows))


def write_photos(folder: Path, count: int) -> None:
    """Writes JPEG files in torchvision's layout; every tenth is a test image."""
    generator = np.random.default_rng(0)
    for number in range(count):
        part = "val" if number // CLASSES % 10 == 9 else "train"
        path = folder / part / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize(PIXELS, Image.Resampling.BICUBIC).save(path, quality=90)


def summarize(count: int, outcomes: dict[str, Outcome], images: int) -> list[Row]:
    """Returns one row per variant.

    Args:
        count: number of images in the folder.
        outcomes: "seconds" and "megabytes" of each turn, or an error.
        images: read in each turn.
    """
    rows: list[Row] = []
    for variant, outcome in outcomes.items():
        row: Row = {"images": count, "variant": variant}
        if outcome.error is not None:
            row["error"] = outcome.error
        else:
            slow, median, fast = quartiles(outcome.times["seconds"])
            row |= {"rate": images / median, "low": images / fast, "high": images / slow}
            row["megabytes"] = outcome.times["megabytes"][-1]
        rows.append(row)
    for row in rows:
        row["to_torch"] = ratio(row.get("rate"), rows[0].get("rate"))
    return rows


def _draw(rows: list[Row], figure: Figure) -> None:
    axis = figure.subplots()
    measured = [row for row in rows if "error" not in row]
    axis.bar([f"{row['variant']}, {row['images']}" for row in measured], [row["rate"] for row in measured])
    axis.set(ylabel="images per second")
    axis.tick_params(axis="x", rotation=20)
