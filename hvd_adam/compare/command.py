"""Runs a comparison: shares its runs over the ranks, gathers their results, and writes table, plot and JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.compare import plots, studies
from hvd_adam.compare.cells import Cell, CellStore, Result
from hvd_adam.compare.config import CompareConfig
from hvd_adam.compare.networks import build
from hvd_adam.compare.runner import Loaders, train
from hvd_adam.compare.summary import Row, summarize
from hvd_adam.compare.table import notes, table
from hvd_adam.data.images import ImageData
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import Cluster, horovod, init
from hvd_adam.errors import UserError
from hvd_adam.log import logger, write_result
from hvd_adam.recovery.watchdog import Watchdog, defer_horovod_stall_shutdown
from hvd_adam.training.builders import load_data, require_no_workers, worker_count
from hvd_adam.versions import installed_version

# A rank that has made its runs waits in a collective for the others, whose runs may take long.
LONGEST_WAIT = 30 * 86400.0  # seconds

STALL_REMEDY = (
    "The same command with --resume and the folder as --output-dir makes the runs that are missing; if the job "
    "was only slow, use a longer --stall-timeout"
)

CELLS, JSON_FILE, PLOT_FILE = "cells", "compare.json", "compare.png"


def compare(config: CompareConfig) -> None:
    """Runs `python -m hvd_adam.compare` on this rank.

    Raises:
        UserError: the data or the model cannot be had, or the output cannot be written; raised on every rank.
    """
    defer_horovod_stall_shutdown(LONGEST_WAIT)
    cluster = init(config.device)
    with closing(Watchdog(cluster, config.stall_timeout, STALL_REMEDY)) as watchdog:
        compare_on(cluster, config, watchdog.beat)


def compare_on(cluster: Cluster, config: CompareConfig, beat: Callable[[str], None] = lambda doing: None) -> None:
    """Runs a comparison on the ranks of a cluster; every rank calls it.

    Args:
        cluster: this process.
        config: the comparison; identical on all ranks.
        beat: called with what this rank does, whenever it makes progress.

    Raises:
        UserError: as `compare`.
    """
    # The order of additions depends on the number of threads, and the table must not depend on that of the ranks.
    torch.set_num_threads(1)
    require_same(cluster, "arguments", asdict(config))
    with raise_on_all_ranks(cluster):
        loaders = Loaders.of(_load_images(config, cluster), cluster.device)
    require_same(cluster, "data", loaders.test.description())
    arms = studies.arms(config)
    cells = list(dict.fromkeys(cell for arm in arms for of_lr in arm.cells.values() for cell in of_lr))
    with raise_on_all_ranks(cluster):
        _try_out(cells, config, loaders)
    folder = _open_folder(config, cluster)
    store = CellStore(folder / CELLS, _settings(config, loaders))
    results = _results(cells, config, loaders, store, cluster, beat)
    with raise_on_all_ranks(cluster):
        if cluster.rank == 0:
            _report(config, folder, summarize(arms, results, config.target))


def _load_images(config: CompareConfig, cluster: Cluster) -> ImageData:
    loaded = load_data(config, workers=worker_count(config.workers, cluster))
    if not isinstance(loaded, ImageData):
        remedy = "give --cache FOLDER" if config.dataset == "imagefolder" else "return hvd_adam.data.ImageData"
        raise UserError(f"--dataset {config.dataset}: a comparison needs its images in memory: {remedy}")
    require_no_workers(config)
    return loaded


def _try_out(cells: Iterable[Cell], config: CompareConfig, loaders: Loaders) -> None:
    """Raises before anything is written what the first run of a model or a batch size would raise."""
    networks = {(cell.network, cell.initialization): cell for cell in cells}
    for cell in networks.values():
        build(cell, config.model, config.depth, loaders.train.data)
    for batch_size in {cell.batch_size for cell in cells}:
        loaders.train.steps_per_epoch(batch_size)


def _settings(config: CompareConfig, loaders: Loaders) -> dict[str, Any]:
    """Returns what decides the result of a run besides its cell."""
    names = ("model", "depth", "epochs", "max_steps", "lr_decay", "eval_every")
    return {"data": loaders.test.description(), **{name: getattr(config, name) for name in names}}


def _open_folder(config: CompareConfig, cluster: Cluster) -> Path:
    """Creates the folder of the results on rank 0, and returns its path on every rank."""
    folder = Path(config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-compare-{config.study}")
    with raise_on_all_ranks(cluster):
        if cluster.rank == 0:
            if (folder / CELLS).exists() and not config.resume:
                raise UserError(
                    f"--output-dir {folder} holds a comparison already: continue it with --resume, or choose "
                    "another folder"
                )
            try:
                (folder / CELLS).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(folder, error) from None
    if cluster.size > 1:
        folder = horovod().broadcast_object(folder, 0, name="hvd_adam.compare.folder")
    return folder


def _results(
    cells: list[Cell],
    config: CompareConfig,
    loaders: Loaders,
    store: CellStore,
    cluster: Cluster,
    beat: Callable[[str], None],
) -> dict[Cell, Result]:
    """Returns the results of all cells on every rank: those in the folder, and new ones for the others."""
    stored = {cell: result for cell in cells if (result := store.read(cell)) is not None} if config.resume else {}
    results = _merged(_gather(stored, cluster, "finished"))
    missing = [cell for cell in cells if cell not in results]
    logger.info(
        f"{loaders.test.data.name}: {len(loaders.train.data.train_labels)} training, "
        f"{len(loaders.train.data.test_labels)} validation and {len(loaders.test.data.test_labels)} test images; "
        f"{len(cells)} runs, {len(cells) - len(missing)} of them finished; folder {store.folder.parent}"
    )
    mine = missing[cluster.rank :: cluster.size]
    made, share = {}, " of rank 0" if cluster.size > 1 else ""
    with raise_on_all_ranks(cluster):
        for number, cell in enumerate(mine, 1):
            made[cell] = train(cell, config, loaders, partial(beat, f"run {number} of {len(mine)}"))
            _write(store, cell, made[cell])
            if number * 10 // len(mine) > (number - 1) * 10 // len(mine):
                logger.info(f"run {number} of {len(mine)}{share}: {_describe(cell, made[cell])}")
    results.update(_merged(_gather(made, cluster, "results")))
    with raise_on_all_ranks(cluster):
        if cluster.rank == 0:  # ranks on other hosts may have written to disks of their own
            for cell in missing:
                if not store.path(cell).exists():
                    _write(store, cell, results[cell])
    return results


def _describe(cell: Cell, result: Result) -> str:
    outcome = f"validation accuracy {result['validation_accuracy']:.4f}"
    if result["diverged"] is not None:
        outcome = f"diverged by update {result['diverged']}"
    variant = " ".join(filter(None, (cell.network, cell.initialization if not cell.network else "")))
    return f"{cell.optimizer} lr {cell.lr:g} batch {cell.batch_size} {variant} seed {cell.seed}: {outcome}"


def _gather(results: dict[Cell, Result], cluster: Cluster, name: str) -> list[dict[Cell, Result]]:
    if cluster.size == 1:
        return [results]
    gathered: list[dict[Cell, Result]] = horovod().allgather_object(results, name=f"hvd_adam.compare.{name}")
    return gathered


def _merged(parts: Iterable[dict[Cell, Result]]) -> dict[Cell, Result]:
    """Returns one dictionary; of two results for a cell the lower rank's, which is the same on all ranks."""
    return {cell: result for part in reversed(list(parts)) for cell, result in part.items()}


def _write(store: CellStore, cell: Cell, result: Result) -> None:
    try:
        store.write(cell, result)
    except OSError as error:
        raise _unwritable(store.folder.parent, error) from None


def _report(config: CompareConfig, folder: Path, rows: list[Row]) -> None:
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    versions = {name: installed_version(name) for name in ("torch", "numpy", "scipy")}
    content = {"study": config.study, "config": values, "versions": versions, "rows": rows}
    text = table(rows, config.target, norms=config.study in ("initialization", "vanishing"))
    write_result("\n".join([text, "", *notes(rows), ""]))  # first: also if the files cannot be written
    try:
        write_atomically(folder / JSON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_atomically(folder / PLOT_FILE, plots.png(config.study, rows))
    except OSError as error:
        raise _unwritable(folder, error) from None
    write_result(f"results {folder / JSON_FILE}\nplot {folder / PLOT_FILE}\n")


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder} ({error.strerror}): choose another --output-dir")
