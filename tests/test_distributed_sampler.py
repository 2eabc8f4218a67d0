"""`StatefulDistributedSampler`: each rank's share of a global batch, and where a loop of one's own resumes.

Hazards: a global batch that depends on the number of ranks; unequal numbers of batches; a state that counts what
workers of a DataLoader have read ahead instead of what the loop has taken; an update that resumes in its middle;
an epoch whose last batch or whose end is repeated or lost; ranks that part after one has looked at a batch; the
state of another run; a seed of PyTorch that a loader uses up; ranks that have split the data differently.
"""

from itertools import chain

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from hvd_adam.data import StatefulDistributedSampler, evaluation_share, sampling
from hvd_adam.errors import CollectiveError, UserError

SAMPLES, GLOBAL_BATCH, STEPS = 51, 12, 4
DATA = TensorDataset(torch.arange(SAMPLES))


def make(size=1, rank=0, **options):
    options = {"global_batch_size": GLOBAL_BATCH, **options}
    return StatefulDistributedSampler(DATA, rank=rank, size=size, **options)


def taken(batches):
    return [batch.tolist() for (batch,) in batches]


def updates(size, accumulate, state=None, epoch=0, **options):
    """Returns the samples of each global batch, joined over the ranks and their accumulated batches."""
    of_ranks = []
    for rank in range(size):
        sampler = make(size, rank, accumulate=accumulate, **options)
        sampler.load_state_dict(state) if state else sampler.set_epoch(epoch)
        of_ranks.append(list(sampler))
    assert len({len(batches) for batches in of_ranks}) == 1
    steps = range(0, len(of_ranks[0]), accumulate)
    return [list(chain(*chain(*(batches[t : t + accumulate] for batches in of_ranks)))) for t in steps]


@given(
    parts=st.sampled_from([(1, 1), (2, 1), (3, 1), (3, 2), (4, 3)]),
    epoch=st.integers(0, 99),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_global_batch_is_the_same_at_any_number_of_ranks(parts, epoch, seed, shuffle):
    found = updates(*parts, epoch=epoch, seed=seed, shuffle=shuffle)
    order = sampling.epoch_order(SAMPLES, seed, epoch) if shuffle else np.arange(SAMPLES)
    assert found == [order[t : t + GLOBAL_BATCH].tolist() for t in range(0, STEPS * GLOBAL_BATCH, GLOBAL_BATCH)]


def test_batch_size_is_that_of_one_rank_and_batch():
    sampler = StatefulDistributedSampler(SAMPLES, 3, rank=1, size=2, accumulate=2)
    assert (sampler.global_batch_size, sampler.batch_size, len(sampler)) == (12, 3, STEPS * 2)
    assert {len(batch) for batch in sampler} == {3}


STAYS = {"num_workers": 1, "persistent_workers": True}
SLOW = pytest.mark.multirank  # the worker imports torch
WORKERS = [
    pytest.param({}, id="no workers"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "fork"}, id="fork"),
    pytest.param({**STAYS, "multiprocessing_context": "forkserver"}, id="forkserver", marks=SLOW),
    pytest.param({**STAYS, "multiprocessing_context": "spawn", "prefetch_factor": 4}, id="spawn", marks=SLOW),
]


@pytest.mark.parametrize("options", WORKERS)
def test_the_state_counts_what_the_loop_has_taken(options):
    sampler = make()
    loader, seen, states = sampler.loader(**options), [], []
    for epoch in range(2):
        assert sampler.epoch == epoch
        for (batch,) in loader:
            seen.append(batch.tolist())
            states.append(sampler.state_dict())
    assert len(seen) == 2 * STEPS and seen[:STEPS] != seen[STEPS:]
    resumed = make()
    resumed.load_state_dict(states[STEPS + 1])  # after two batches of the second epoch
    loader = resumed.loader(**options)
    assert taken(loader) == seen[STEPS + 2 :]
    assert (resumed.epoch, len(taken(loader))) == (2, STEPS)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumes_at_the_next_global_batch_on_another_number_of_ranks(size, accumulate):
    sampler = make(2, 1, accumulate=2)
    for number, _ in enumerate(sampler.loader(), 1):
        if number == 5:  # in the third update, which starts again
            state = sampler.state_dict()
    assert (state["epoch"], state["step"]) == (0, 2)
    assert updates(size, accumulate, state=state) == updates(1, 1)[2:]


def test_an_epoch_that_is_taken_but_not_ended_resumes_at_its_end():
    sampler = make()
    for _ in sampler.loader():
        state = sampler.state_dict()  # the last one before the loop's end, which an evaluation may follow
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # as loops do that count epochs
    assert resumed.epoch == 0 and taken(resumed.loader()) == []
    assert resumed.epoch == sampler.epoch == 1
    assert resumed.state_dict() == sampler.state_dict() == {**state, "epoch": 1, "step": 0}


def test_a_loader_that_reads_ahead_uncounted_has_no_state():
    sampler = make()
    loader = DataLoader(DATA, batch_sampler=sampler)
    assert sampler.state_dict()["step"] == 0
    next(iter(loader))
    with pytest.raises(UserError, match="track"):
        sampler.state_dict()
    seen = []
    for (batch,) in sampler.track(loader):
        seen.append(batch.tolist())
        assert sampler.state_dict()["step"] == len(seen)
    list(loader)
    sampler.set_epoch(2)
    assert sampler.state_dict()["epoch"] == 2
    assert seen == updates(1, 1)


def test_a_look_at_a_batch_changes_nothing_and_a_repeated_epoch_is_reported(recwarn):
    sampler = make()
    loader = sampler.loader()
    first = next(iter(loader))[0].tolist()  # on one rank only, this must not shift its batches
    for (batch,), _ in zip(loader, range(2), strict=False):
        first, previous = batch.tolist(), first
    assert previous == updates(1, 1)[0] and not recwarn
    with pytest.warns(RuntimeWarning, match="epoch 0 starts again .* set_epoch"):
        iter(loader)
    sampler.set_epoch(0)
    assert taken(loader) == updates(1, 1)
    unshuffled = make(shuffle=False)
    list(unshuffled)
    with pytest.warns(RuntimeWarning, match="set_epoch"):
        list(unshuffled)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "snapshot_every_n_steps": 3}])
def test_torchdatas_stateful_loader_resumes(options):
    reason = "torchdata is missing: `bash launch/setup.sh --dev` installs it"
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason=reason)

    def start():
        sampler = make(2, 1, accumulate=2)
        return sampler, torchdata.StatefulDataLoader(DATA, batch_sampler=sampler, **options)

    sampler, loader = start()
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (batch,) in loader:
            seen.append(batch.tolist())
            if len(seen) == 2 * STEPS + 5:
                state = loader.state_dict()
    assert len(seen) == 2 * 2 * STEPS
    resumed, loader = start()
    loader.load_state_dict(state)
    resumed.set_epoch(1)
    assert taken(loader) == seen[2 * STEPS + 5 :]
    resumed.set_epoch(2)
    assert len(taken(loader)) == 2 * STEPS


def test_a_loader_leaves_pytorchs_generator_alone():
    before = torch.get_rng_state()
    loader = make().loader()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_of_ones_own_draws_its_seed_once_in_an_epoch_that_resumes():
    sampler, drawn = make(), []
    for number, _ in enumerate(sampler.track(DataLoader(DATA, batch_sampler=sampler))):
        drawn.append(torch.rand(()))  # dropout
        if number == 1:
            state, generator = sampler.state_dict(), torch.get_rng_state()
    resumed = make()
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    loader = DataLoader(DATA, batch_sampler=resumed)
    assert [torch.rand(()) for _ in resumed.track(loader)] == drawn[2:]
    torch.set_rng_state(generator)
    list(resumed.track(loader))
    assert not torch.equal(torch.get_rng_state(), generator)  # an epoch from its start draws, as ever


def test_workers_have_other_seeds_in_each_epoch_and_rank_and_the_same_ones_again():
    class Seeds(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.initial_seed()

    def seeds(rank, epoch):
        sampler = StatefulDistributedSampler(Seeds(), 2, rank=rank, size=2)
        sampler.set_epoch(epoch)
        (batch,) = sampler.loader(num_workers=1, multiprocessing_context="fork")
        return batch[0].item()

    drawn = [seeds(rank, epoch) for rank in range(2) for epoch in range(2)]
    assert len(set(drawn)) == 4
    assert seeds(1, 1) == drawn[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, "either batch_size"),
        ({"global_batch_size": None}, "either batch_size"),
        ({"global_batch_size": 16, "size": 3}, "16, which cannot be divided .* 3 ranks x 1 .* multiple of 3"),
        ({"global_batch_size": 60}, "60 samples .* larger than the 51"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"global_batch_size": 2.5}, "global_batch_size is 2.5"),
        ({"rank": 3, "size": 3}, "rank is 3 and size is 3"),
        ({"size": None}, "size is None: give both"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_size": 24}, "global_batch_size of the sampler is 12, but 24 in the saved state"),
        ({"samples": 52}, "samples .* 51, but 52"),
        ({"seed": 1}, "seed .* 0, but 1"),
        ({"shuffle": False}, "shuffle .* True, but False"),
        ({"step": None}, "no 'step'"),
        ({"step": -2}, "step -2, but an epoch has"),
        ({"step": 99}, "step 99, but an epoch has"),
    ],
)
def test_the_state_of_another_run_is_refused(change, message):
    state = {name: value for name, value in {**make().state_dict(), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        make().load_state_dict(state)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(UserError, match="create it with the data set"):
        StatefulDistributedSampler(SAMPLES, 4, rank=0, size=1).loader()
    with pytest.raises(UserError, match=r"no length: use .*equal_steps"):
        StatefulDistributedSampler(iter(DATA), 4)
    with pytest.raises(UserError, match="in_order"):
        make().loader(in_order=False)
    for epoch in (-1, 1.5):
        with pytest.raises(UserError, match=f"epoch is {epoch}"):
            make().set_epoch(epoch)


def test_numpys_whole_numbers_are_taken_as_pythons():
    sampler = StatefulDistributedSampler(np.int64(SAMPLES), np.int64(4), accumulate=np.int64(2), rank=0, size=1)
    assert list(sampler) == list(StatefulDistributedSampler(SAMPLES, 4, accumulate=2, rank=0, size=1))
    assert all(type(value) in (int, bool) for value in sampler._arguments().values())


def test_a_process_of_several_that_has_not_called_init_is_refused(monkeypatch):
    assert StatefulDistributedSampler(SAMPLES, 4).size == 1
    monkeypatch.setenv("HOROVOD_RANK", "1")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(UserError, match=r"started 2 ranks, but init\(\)"):
        StatefulDistributedSampler(SAMPLES, 4)
    assert StatefulDistributedSampler(SAMPLES, 4, rank=0, size=1).size == 1


@on_ranks(2)
def test_rank_and_size_are_those_of_the_job(cluster):
    sampler = StatefulDistributedSampler(DATA, global_batch_size=GLOBAL_BATCH)
    assert (sampler.rank, sampler.size) == (cluster.rank, cluster.size)
    with pytest.raises(CollectiveError, match="samples is 51 on rank 0 and 50 on rank 1"):
        StatefulDistributedSampler(SAMPLES - cluster.rank, 4)
    with pytest.raises(CollectiveError, match=r"^rank 1 on \S+: the global batch of 8 samples .* than the 5"):
        StatefulDistributedSampler(5 if cluster.rank else SAMPLES, 4)


@on_ranks(2)
@pytest.mark.parametrize("nested", [False, True])
def test_ranks_that_have_split_the_data_differently_are_refused(cluster, nested):
    def part(seed):
        chosen, _ = random_split(DATA, [40, 11], torch.Generator().manual_seed(seed))
        return Subset(chosen, range(30)) if nested else chosen

    StatefulDistributedSampler(part(0), 4)
    with pytest.raises(CollectiveError, match=r"Sampler: indices of a Subset is '\w+' on rank 0"):
        StatefulDistributedSampler(part(cluster.rank), 4)


@given(samples=st.integers(0, 20), size=st.integers(1, 5))
def test_evaluation_shares_hold_every_sample_once(samples, size):
    shares = [index for rank in range(size) for index in evaluation_share(samples, rank, size)]
    assert shares == list(range(samples))
