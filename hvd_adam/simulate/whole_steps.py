"""Whole steps on the ranks at hand, and what the model does not explain of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import product

import torch
from torch.nn import functional as F

from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.optim.adam import Adam
from hvd_adam.simulate.config import CalibrateConfig
from hvd_adam.simulate.machine import Machine
from hvd_adam.simulate.profile import backward, random_batch, timed
from hvd_adam.simulate.step import CODED, STRATEGIES, WIRE_BYTES, Setting, simulate
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.simulate.workload import Workload

LEARNING_RATE = 1e-6  # so that weights hardly change, and no gradient becomes denormal, which is slow


def with_unexplained(
    cluster: Cluster, machine: Machine, model: torch.nn.Module, workload: Workload, config: CalibrateConfig
) -> Workload:
    """Returns a workload with the seconds of a step that the model does not explain. Every rank calls it.

    A prediction is then a measured step, plus what the model says of another network and other ranks.

    Args:
        cluster: this process.
        machine: all that has been measured.
        model: the model.
        workload: its profile.
        config: batch and repeats.
    """
    ranks = Ranks(cluster.size, cluster.local_size)
    unexplained = {}
    for strategy, compression in product(STRATEGIES, WIRE_BYTES):
        if strategy == "sharded" and compression not in CODED and not ranks.several_hosts:
            continue  # inside a host it broadcasts, and does not gather
        seconds = _step(cluster, deepcopy(model), strategy, compression, config)
        explained = simulate(workload, Setting(ranks, strategy, compression), machine).seconds
        unexplained[f"{strategy}-{compression}"] = seconds - explained
    return replace(workload, unexplained=unexplained)


def _step(
    cluster: Cluster, model: torch.nn.Module, strategy: str, compression: str, config: CalibrateConfig
) -> float:
    """Returns the median seconds of a step."""
    optimizer = distribute(
        Adam(model.parameters(), lr=LEARNING_RATE),
        model,
        strategy=strategy,
        compression=compression,
        defer_averaging=True,
    )
    images, labels = random_batch(cluster, config.batch_size, (3, config.image_size, config.image_size))

    def step() -> None:
        optimizer.zero_grad()
        backward(F.cross_entropy(model(images).float(), labels))
        optimizer.step()

    return float(cluster.mean(timed(step, cluster, config.repeats)))
