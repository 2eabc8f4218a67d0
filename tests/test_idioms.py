"""Training loops as people write them: N ranks end where one process with PyTorch's own Adam ends.

Hazards: gradients that are read or changed before they are averaged, or averaged twice; hooks that fire more or
less often than once per step; parameters, optimizers and states that are replaced while training runs.
"""

import inspect
from functools import cache
from itertools import product

import pytest
import torch
from helpers import (
    idiom_loops_accumulation,
    idiom_loops_gradients,
    idiom_loops_models,
    idiom_loops_schedules,
)
from helpers.idioms import Setup, largest_difference, run
from helpers.on_ranks import on_ranks
from helpers.small_training import digest, same_everywhere
from helpers.strategies import each_strategy

from hvd_adam.distributed.api import STRATEGIES

THEMES = (idiom_loops_gradients, idiom_loops_accumulation, idiom_loops_models, idiom_loops_schedules)
LOOPS = {
    name: function
    for theme in THEMES
    for name, function in vars(theme).items()
    if inspect.isfunction(function) and function.__module__ == theme.__name__ and not name.startswith("_")
    if "scaler" not in name or hasattr(torch.amp, "GradScaler")  # PyTorch before 2.3 has none for CPUs
}
each_loop = pytest.mark.parametrize("loop", list(LOOPS))

# Sums of gradients in another order differ by some 1e-15 of their size. Adam divides a gradient by at least ε =
# 1e-2 (`Setup.adam`), so that an update differs by less than 1e-13, and eight steps by less than 1e-12.
TOLERANCE = 1e-9


@cache
def in_one_process(loop):
    return run(LOOPS[loop], Setup())


def check_a_loop(cluster, loop, strategy):
    found = run(LOOPS[loop], Setup(cluster.rank, cluster.size, strategy))
    assert largest_difference(found, in_one_process(loop)) < TOLERANCE
    assert same_everywhere(digest(found))


@on_ranks(1)
@each_strategy
@each_loop
def test_a_loop_on_one_rank_ends_where_it_ends_in_one_process(cluster, strategy, loop):
    check_a_loop(cluster, loop, strategy)


def crossed(turn):
    """Parametrizes by half of the pairs of a loop and a strategy: those of turn 1 are not those of turn 0.

    Both turns together have every pair once, and each turn has every loop and every strategy.
    """
    pairs = product(enumerate(LOOPS), enumerate(STRATEGIES))
    cases = [(loop, strategy) for (number, loop), (place, strategy) in pairs if (number + place + turn) % 2 == 0]
    return pytest.mark.parametrize(("loop", "strategy"), cases)


@on_ranks(2)
@crossed(0)
def test_a_loop_on_two_ranks_ends_where_it_ends_in_one_process(cluster, loop, strategy):
    check_a_loop(cluster, loop, strategy)


@on_ranks(3)
@crossed(1)
def test_a_loop_on_three_ranks_ends_where_it_ends_in_one_process(cluster, loop, strategy):
    check_a_loop(cluster, loop, strategy)


@each_loop
def test_a_loop_that_averages_no_gradients_ends_elsewhere(loop):
    """Each loop detects gradients of one rank in place of the mean: in one process, with a half of each batch."""
    found = run(LOOPS[loop], Setup(rank=0, size=2))
    assert largest_difference(found, in_one_process(loop)) > 1000 * TOLERANCE
