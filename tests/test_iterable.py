"""Iterable data on several ranks: `shard`, and `equal_steps` for shards of different lengths.

Hazards: an item that two ranks or workers have, or none; a rank that waits for one that has no more batches, or
whose loader has failed; ranks with different numbers of updates, or with half of one; a batch that a resume loses
or repeats; random numbers that a resume draws twice.
"""

from itertools import chain
from typing import NamedTuple

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.uneven import Numbers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hvd_adam import Adam, distribute
from hvd_adam.data import equal_steps, shard
from hvd_adam.distributed.consistency import require_consistent
from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import CollectiveError, JobError, UserError

CASES, CASES_WITH_WORKERS = 200, 5
SINGLE = Cluster(0, 1, 0, 1, 0, 1, torch.device("cpu"), "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_ranks_and_workers_hold_every_item_once(workers):
    items = range(23)
    shards = [shard(items, rank=rank, size=3) for rank in range(3)]
    parts = [[int(n) for n in DataLoader(part, batch_size=None, num_workers=workers)] for part in shards]
    assert sorted(chain(*parts)) == list(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= max(1, workers)


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_pass_over_a_generator_is_refused(size):
    part = shard((n for n in range(40)), rank=0, size=size)
    loader = DataLoader(part, batch_size=2)
    assert next(iter(loader)).tolist() == [0, size]  # the ranks may have read ahead differently
    with pytest.raises(UserError, match="shard has a generator, which can be read once only"):
        next(iter(loader))
    again = shard(range(4), rank=0, size=size)
    assert list(again) == list(again)


class Case(NamedTuple):
    """The numbers of batches of three ranks, of which the first ones count, and options."""

    lengths: tuple[int, int, int]
    accumulate: int
    until: str
    workers: bool


def drawn_cases(cluster):
    """Returns the same cases on every rank; drawn first, because a rank that shrinks a case would be alone."""
    cases = []
    options = [st.sampled_from([1, 2, 3]), st.sampled_from(["first", "last"]), st.booleans()]

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.builds(Case, st.tuples(*[st.integers(0, 4)] * 3), *options))
    def collect(case):
        cases.append(case)

    collect()
    return horovod().broadcast_object(cases, 0, name="cases")


def expected_steps(case, size):
    """Returns the number of batches that every rank shall yield, None ones included."""
    lengths, accumulate = case.lengths[:size], case.accumulate
    if case.until == "last":
        return -(-max(lengths) // accumulate) * accumulate
    return min(lengths) // accumulate * accumulate


def visit_uneven_shards(cluster, part):
    cases = drawn_cases(cluster)[part::2]
    assert len(cases) == CASES // 2 and {0, 4} < set(chain(*(case.lengths for case in cases)))
    workers_left = CASES_WITH_WORKERS
    for case in cases:
        # Under MPI a worker may not be forked; the start of one that is not takes seconds.
        workers = int(case.workers and workers_left > 0 and not horovod().mpi_enabled())
        workers_left -= workers
        length = case.lengths[cluster.rank]
        loader = DataLoader(Numbers(length), batch_size=None, num_workers=workers)
        steps = equal_steps(loader, cluster, until=case.until, accumulate=case.accumulate)
        seen = [None if batch is None else batch.item() for batch in steps]
        assert seen == [n if n < length else None for n in range(expected_steps(case, cluster.size))], case


@on_ranks(2, 3)
def test_ranks_with_uneven_shards_yield_equally_many_batches(cluster):
    visit_uneven_shards(cluster, 0)


@on_ranks(2, 3, "mpi")
def test_ranks_with_uneven_shards_yield_equally_many_batches_with_mpi(cluster):
    visit_uneven_shards(cluster, 1)


@on_ranks(2, 3)
@pytest.mark.parametrize("until", ["first", "last"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_training_on_uneven_shards_keeps_the_ranks_identical(cluster, strategy, accumulate, until):
    model = torch.nn.Linear(1, 1)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, accumulate=accumulate)
    loader = DataLoader(Numbers(3 + 2 * cluster.rank), batch_size=None)
    steps = 0
    for batch in equal_steps(loader, cluster, until=until, accumulate=accumulate):
        optimizer.zero_grad()
        if batch is not None:
            model(batch).sum().backward()
        optimizer.step()
        steps += 1
    longest = 3 + 2 * (cluster.size - 1)
    assert steps == (3 // accumulate if until == "first" else -(-longest // accumulate)) * accumulate
    require_consistent(cluster, model, optimizer, sharded=strategy == "sharded")


@on_ranks(2, 3)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("until", ["first", "last"])
def test_an_error_of_a_loader_reaches_every_rank(cluster, workers, until):
    last = cluster.size - 1
    for kind in ("UserError", "ValueError"):
        data = Numbers(3, kind if cluster.rank == last else "")
        steps = equal_steps(DataLoader(data, batch_size=None, num_workers=workers), cluster, until=until)
        taken = []
        if kind == "UserError":
            with pytest.raises(CollectiveError, match=rf"^rank {last} on \S+: data.bin is missing: download it$"):
                taken.extend(steps)
        elif cluster.rank == last:
            with pytest.raises(ValueError, match="broken sample"):
                taken.extend(steps)
        else:
            with pytest.raises(JobError, match=rf"rank {last} on \S+ failed: ValueError: broken sample$"):
                taken.extend(steps)
        assert len(taken) == 3
    with pytest.raises(CollectiveError, match="accumulate is 1 on rank 0 and 2 on rank 1"):
        equal_steps([], cluster, accumulate=1 + (cluster.rank == 1))
    with pytest.raises(CollectiveError, match=r"^rank 1 on \S+: accumulate is 0"):
        equal_steps([], cluster, accumulate=int(cluster.rank != 1))


@on_ranks(2)
def test_a_pass_resumes_after_the_batches_of_complete_updates(cluster):
    def steps():
        return equal_steps(range(9 + cluster.rank), cluster, accumulate=2)

    first, states = steps(), []
    for batch in first:
        states.append((batch, first.state_dict()))
        if batch == 4:
            break
    assert [state["batches"] for _, state in states] == [0, 2, 2, 4, 4]
    assert list(first) == list(range(8))  # after `break` a pass starts again
    assert first.state_dict() == {"batches": 0, "ranks": cluster.size}
    second = steps()
    second.load_state_dict(states[-1][1])
    assert list(second) == [4, 5, 6, 7]
    assert list(second) == list(range(8))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_pass_draws_the_random_numbers_of_an_uninterrupted_one(accumulate):
    def steps():
        return equal_steps(DataLoader(range(12)), SINGLE, accumulate=accumulate)  # iter(DataLoader) draws a seed

    drawn, resumed = [], steps()
    first = steps()
    for _ in first:
        drawn.append(torch.rand(()))  # dropout
        if len(drawn) == 4:
            state, generator = first.state_dict(), torch.get_rng_state()
    after = torch.rand(())
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    assert [torch.rand(()) for _ in resumed] == drawn[4:] and torch.rand(()) == after
    torch.set_rng_state(generator)
    assert [torch.rand(()) for _ in resumed][:8] != drawn[4:]  # a pass from the start draws, as ever


@on_ranks(2)
def test_a_block_of_join_is_refused(cluster):
    model = torch.nn.Linear(1, 1)
    optimizer = distribute(Adam(model.parameters()), model)
    steps = equal_steps([1], cluster)
    with optimizer.join(), pytest.raises(RuntimeError, match=r"join\(\)"):
        next(iter(steps))


def test_one_rank_needs_no_other():
    assert list(equal_steps([3, 4, 5], SINGLE, accumulate=2)) == [3, 4]
    assert list(equal_steps([3, 4, 5], SINGLE, accumulate=2, until="last")) == [3, 4, 5, None]
    with pytest.raises(ValueError, match="broken"):
        list(equal_steps(Numbers(2, "ValueError"), SINGLE))
    read = []
    batches = (read.append(n) or n for n in range(9))
    for taken in equal_steps(batches, SINGLE, accumulate=3):
        assert len(read) == taken + 3 + 1  # one update ahead
        if taken == 4:
            break


@pytest.mark.parametrize(
    ("options", "message"), [({"until": "both"}, "until is 'both'"), ({"accumulate": 0}, "is 0")]
)
def test_bad_arguments_of_equal_steps_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        equal_steps([], SINGLE, **options)


@pytest.mark.parametrize("state", [{}, {"batches": -1}, {"batches": "4"}])
def test_another_state_is_refused(state):
    with pytest.raises(UserError, match="state of equal_steps"):
        equal_steps([], SINGLE).load_state_dict(state)


def test_a_state_of_another_number_of_ranks_or_of_more_batches_is_refused():
    steps = equal_steps(range(3), SINGLE)
    with pytest.raises(UserError, match=r"is of 2 ranks, but the job has 1, .*: use 2 ranks"):
        steps.load_state_dict({"batches": 2, "ranks": 2})
    steps.load_state_dict({"batches": 2})  # an older state
    assert list(steps) == [2]
    steps.load_state_dict({"batches": 3, "ranks": 1})  # saved after the last batch
    assert list(steps) == []
    steps.load_state_dict({"batches": 4, "ranks": 1})
    with pytest.raises(UserError, match="the loader has 3 batches, but 4 were taken"):
        list(steps)
    longest = equal_steps(range(3), SINGLE, until="last")  # another rank may have more
    longest.load_state_dict({"batches": 4, "ranks": 1})
    assert list(longest) == []
