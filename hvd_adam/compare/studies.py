"""The rows of each study: which runs each one consists of, and which other row it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_adam.compare.cells import Cell
from hvd_adam.compare.config import BETAS, EPS, SCALING_RULES, CompareConfig
from hvd_adam.compare.networks import DEEP, INITIALIZATIONS
from hvd_adam.schedule import scale


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: of the row; unique.
        optimizer: of `config.OPTIMIZERS`.
        baseline: the row that this one is compared with; None for one that others are compared with.
        cells: the runs with each learning rate of the grid, in the order of the seeds.
        batch_size: images per update.
        rule: the rule that scales the learning rate; "" in other studies.
    """

    name: str
    optimizer: str
    baseline: str | None
    cells: dict[float, list[Cell]]
    batch_size: int
    rule: str = ""


def arms(config: CompareConfig) -> list[Arm]:
    """Returns the rows of --study, in the order of the table."""
    if config.study == "optimizers":
        names = config.optimizer_names()
        baselines = {name: "adam" if name != "adam" and "adam" in names else None for name in names}
        return [_arm(config, name, name, baselines[name], initialization=config.initialization) for name in names]
    if config.study == "initialization":
        return _variants(config, {name: {"initialization": name} for name in INITIALIZATIONS}, "default")
    if config.study == "vanishing":
        return _variants(config, {name: {"network": name} for name in DEEP}, "gelu, norm, residual")
    return _batch_sizes(config)


def _arm(
    config: CompareConfig,
    name: str,
    optimizer: str,
    baseline: str | None,
    *,
    network: str = "",
    initialization: str = "default",
) -> Arm:
    """Returns a row with every learning rate of the optimizer's grid."""
    cells = {
        lr: [
            Cell(network, initialization, optimizer, lr, BETAS, EPS, config.batch_size, seed)
            for seed in config.seed_list()
        ]
        for lr in config.grids()[optimizer]
    }
    return Arm(name, optimizer, baseline, cells, config.batch_size)


def _variants(config: CompareConfig, variants: dict[str, dict[str, str]], baseline: str) -> list[Arm]:
    """Returns a row for each optimizer and variant; each is compared with one variant under the same optimizer."""
    return [
        _arm(
            config,
            f"{optimizer}: {name}",
            optimizer,
            None if name == baseline else f"{optimizer}: {baseline}",
            **changes,
        )
        for optimizer in config.optimizer_names()
        for name, changes in variants.items()
    ]


def _batch_sizes(config: CompareConfig) -> list[Arm]:
    """Returns a row for each optimizer, batch size and rule; with --batch-size itself all rules are the same."""
    found = []
    for optimizer, (lr,) in config.grids().items():
        baseline = f"{optimizer}: batch {config.batch_size}"
        for size in config.batch_size_list():
            for rule in SCALING_RULES if size != config.batch_size else ("none",):
                scaled = scale(size / config.batch_size, rule, lr=lr, betas=BETAS, eps=EPS)
                cells = [
                    Cell("", config.initialization, optimizer, scaled.lr, scaled.betas, scaled.eps, size, seed)
                    for seed in config.seed_list()
                ]
                own = size == config.batch_size
                name = baseline if own else f"{optimizer}: batch {size}, {rule}"
                found.append(Arm(name, optimizer, None if own else baseline, {scaled.lr: cells}, size, rule))
    return found
