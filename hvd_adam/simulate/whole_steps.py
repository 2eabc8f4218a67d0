"""Whole steps on the ranks at hand, and what the model does not explain of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from torch.nn import functional as F

from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.optim.adam import Adam
from hvd_adam.simulate.config import CalibrateConfig
from hvd_adam.simulate.machine import Machine
from hvd_adam.simulate.profile import backward, random_batch, seconds_of
from hvd_adam.simulate.step import CODED, STRATEGIES, WIRE_BYTES, Setting, simulate
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.simulate.workload import Workload

LEARNING_RATE = 1e-6  # so that weights hardly change, and no gradient becomes denormal, which is slow
ROUNDS = 3  # over all settings: a model that is built again has other memory, and so another speed


def with_unexplained(
    cluster: Cluster, machine: Machine, model: torch.nn.Module, workload: Workload, config: CalibrateConfig
) -> Workload:
    """Returns a workload with the seconds of a step that the model does not explain. Every rank calls it.

    A prediction is then a measured step, plus what another network and other ranks change in the model.

    Args:
        cluster: this process.
        machine: all that has been measured.
        model: the model.
        workload: its profile.
        config: batch and repeats.
    """
    ranks = Ranks(cluster.size, cluster.local_size)
    settings = [
        Setting(ranks, strategy, compression)
        for strategy, compression in product(STRATEGIES, WIRE_BYTES)
        # Inside a host sharded ranks broadcast without codes, and do not gather.
        if strategy == "allreduce" or compression in CODED or ranks.several_hosts
    ]
    differences: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for _ in range(ROUNDS):
        for setting, found in differences.items():
            found += _beyond_computing(cluster, model, setting, config, -(-config.repeats // ROUNDS))
    unexplained = {}
    for setting, found in differences.items():
        step = simulate(workload, setting, machine)
        rest = median(found) - (step.seconds - workload.forward - workload.backward)
        unexplained[f"{setting.strategy}-{setting.compression}"] = rest
    return replace(workload, unexplained=unexplained)


def _beyond_computing(
    cluster: Cluster, model: torch.nn.Module, setting: Setting, config: CalibrateConfig, repeats: int
) -> list[float]:
    """Returns the seconds by which steps are longer than computing alone, the mean of all ranks.

    Both are measured in turns, since the speed of a virtual machine changes; each after one that is not timed, as
    in a training, where caches hold what the step before has used.
    """
    plain, model = deepcopy(model), deepcopy(model)
    optimizer = distribute(
        Adam(model.parameters(), lr=LEARNING_RATE),
        model,
        strategy=setting.strategy,
        compression=setting.compression,
        defer_averaging=True,
    )
    images, labels = random_batch(cluster, config)

    def compute(net: torch.nn.Module) -> None:
        backward(F.cross_entropy(net(images).float(), labels))

    def step() -> None:
        optimizer.zero_grad()
        compute(model)
        optimizer.step()

    def alone() -> None:
        plain.zero_grad()
        compute(plain)

    differences = []
    for _ in range(1 + repeats):
        seconds = []
        for run in (step, alone):
            cluster.barrier()
            run()
            seconds.append(seconds_of(run, cluster))
        differences.append(seconds[0] - seconds[1])
    del differences[0]
    of_ranks: list[float] = cluster.mean(torch.tensor(differences, dtype=torch.float64)).tolist()
    return of_ranks
