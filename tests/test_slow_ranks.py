"""Slow ranks: what is measured, what is decided from it, and what a run records.

Hazards: a rank that is named because of noise, because its updates are interrupted now and then, or because the
whole machine is slow; a slow rank that is not named, is named for the wrong cause, or again with every window; a
wait for other ranks that counts as work; data that arrive in bursts.
"""

import os
import random
import subprocess
import sys
from statistics import fmean

import pytest
from helpers.on_ranks import on_ranks
from helpers.training_runs import events, succeeded, train
from hypothesis import given
from hypothesis import strategies as st

from hvd_adam.distributed.collectives.background_gather import BackgroundGather
from hvd_adam.distributed.collectives.waiting import seconds_waited
from hvd_adam.report.runs import load_runs
from hvd_adam.report.summary import happenings
from hvd_adam.training.slow_ranks.detector import (
    CHECKPOINTS,
    OWN_WINDOWS,
    WINDOWS,
    Slow,
    SlowCheckpoints,
    SlowRankDetector,
)
from hvd_adam.training.slow_ranks.messages import ended_line, slow_line
from hvd_adam.training.slow_ranks.times import UpdateTimes, WindowTimes

UPDATES = 3  # in a window of the simulation
WITHIN = 20  # updates in which a slow rank must be named
HOSTS = ["a", "b", "c", "d"]


class Simulation:
    """Updates of several ranks that wait for each other, on a clock of their own.

    Args:
        seed: of the noise.
        ranks: in the job.
        noise: standard deviation of the logarithm of each time.
        interrupted: probability that an update of a rank takes up to four times as long.
    """

    def __init__(self, seed, ranks=2, noise=0.04, interrupted=0.05):
        self.random, self.ranks, self.noise, self.interrupted = random.Random(seed), ranks, noise, interrupted
        self.detector = SlowRankDetector()
        self.now, self.waited, self.preempted = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
        self.times = [
            UpdateTimes(
                lambda rank=rank: self.waited[rank],
                lambda rank=rank: self.now[rank],
                lambda rank=rank: self.take_preempted(rank),
            )
            for rank in range(ranks)
        ]
        self.updates = 0

    def take_preempted(self, rank):
        taken, self.preempted[rank] = self.preempted[rank], 0.0
        return taken

    def noisy(self, seconds):
        factor = self.random.lognormvariate(0.0, self.noise)
        return seconds * factor * (self.random.uniform(1, 4) if self.random.random() < self.interrupted else 1)

    def update(self, data, compute, transfer, preempted):
        """Makes an update; times of each rank in seconds. Returns what starts and ends."""
        for rank, times in enumerate(self.times):
            arriving = self.arriving(rank, self.noisy(data[rank]))
            next(times.timed(arriving))
            without = self.noisy(preempted[rank])
            self.preempted[rank] += without
            self.now[rank] += self.noisy(compute[rank]) + without
        end = max(self.now) + self.noisy(transfer)
        for rank, times in enumerate(self.times):
            self.waited[rank] += end - self.now[rank]
            self.now[rank] = end
            times.update_ended()
        self.updates += 1
        if self.updates % UPDATES:
            return [], []
        return self.detector.add([times.take() for times in self.times])

    def arriving(self, rank, seconds):
        self.now[rank] += seconds
        yield "batch"

    def run(self, updates, rank=0, data=0.0, compute=0.0, transfer=0.0, preempted=0.0, all_ranks=1.0):
        """Makes updates of 1 s, one rank's longer; returns what starts, with the update, and what ends."""
        started, ended, first = [], [], self.updates
        for _ in range(updates):
            longer = [float(other == rank) for other in range(self.ranks)]
            arrivals = [all_ranks * (0.1 + data * slow) for slow in longer]
            computes = [all_ranks * (0.7 + compute * slow) for slow in longer]
            delays = [0.01 * bool(self.noise) + preempted * slow for slow in longer]
            new, over = self.update(arrivals, computes, all_ranks * 0.2 + transfer, delays)
            started += [(slow, self.updates - first) for slow in new]
            ended += over
        return started, ended


@pytest.mark.parametrize(
    ("cause", "what", "within"),
    [
        ("data", "data", WITHIN),
        ("compute", "preempted", WITHIN),
        ("compute", "compute", UPDATES * (OWN_WINDOWS + 1)),
        ("network", "transfer", WITHIN),
    ],
)
@pytest.mark.parametrize("slowdown", [0.2, 0.6, 3.0])
def test_a_slowdown_in_noise_with_heavy_tails_is_named_rightly_in_time_in_19_of_20_runs(
    cause, what, within, slowdown
):
    right = 0
    for seed in range(40):
        simulation = Simulation(seed, noise=0.03, interrupted=0.02)
        simulation.run(60 + seed % UPDATES)
        started, _ = simulation.run(within, rank=seed % 2, **{what: slowdown})
        expected = (cause, None if cause == "network" else seed % 2)
        right += [(slow.cause, slow.rank) for slow, _ in started] == [expected]
    assert right >= 38


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_noise_with_heavy_tails_names_nothing(ranks):
    for seed in range(60 // ranks):
        assert Simulation(seed, ranks, noise=0.06, interrupted=0.05).run(300) == ([], [])


def test_a_machine_that_becomes_slow_names_no_rank_and_no_network():
    for seed in range(20):
        simulation = Simulation(seed)
        for percent in range(100, 300, 2):
            assert simulation.run(3, all_ranks=percent / 100) == ([], [])
        assert simulation.run(60, all_ranks=1.0) == ([], [])


def test_a_rank_that_is_interrupted_in_every_tenth_update_is_not_named():
    simulation = Simulation(0, noise=0.02, interrupted=0.0)
    for _ in range(50):
        assert simulation.run(9) == ([], [])
        assert simulation.run(1, rank=1, compute=2.0) == ([], [])


@given(st.integers(2, 9), st.data())
def test_all_slow_ranks_of_a_job_are_named_if_they_are_fewer_than_half(ranks, data):
    slow = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=(ranks - 1) // 2 or 1))
    detector = SlowRankDetector()
    own = [1.5 if rank in slow else 1.0 for rank in range(ranks)]
    window = [WindowTimes(own=s, data=0.1, compute=s - 0.1, least_wait=0.1, update=1.6) for s in own]
    for _ in range(OWN_WINDOWS - 1):
        assert detector.add(window) == ([], [])
    started, ended = detector.add(window)
    assert [found.rank for found in started] == sorted(slow) and ended == []
    assert all(found.cause == "compute" for found in started)


@given(st.lists(st.lists(st.floats(0.0, 1e3), min_size=3, max_size=3), min_size=1, max_size=60), st.integers(1, 5))
def test_whatever_the_times_are_each_rank_is_named_and_ends_in_turns(rows, ranks):
    detector, named = SlowRankDetector(), set()
    for data, compute, wait in rows:
        window = [
            WindowTimes(data * r + compute, data * r, compute, wait / (r + 1), data * r + compute + wait)
            for r in range(ranks + 1)
        ]
        started, ended = detector.add(window)
        assert {slow.rank for slow in ended} <= named
        named -= {slow.rank for slow in ended}
        assert not named & {slow.rank for slow in started}
        named |= {slow.rank for slow in started}


def test_a_slow_rank_is_named_once_with_its_excess_and_ends():
    simulation = Simulation(1, noise=0.0, interrupted=0.0)
    assert simulation.run(60) == ([], [])
    started, ended = simulation.run(90, rank=1, data=0.5)
    assert ended == [] and len(started) == 1
    slow = started[0][0]
    assert (slow.cause, slow.rank) == ("data", 1)
    assert slow.slowdown == pytest.approx(0.5) and slow.seconds == pytest.approx(0.5)
    started, ended = simulation.run(WITHIN)
    assert started == [] and [(slow.cause, slow.rank) for slow in ended] == [("data", 1)]


def test_a_slow_network_is_named_once_and_ends():
    simulation = Simulation(1, noise=0.0, interrupted=0.0)
    simulation.run(60)
    started, ended = simulation.run(90, transfer=0.5)
    assert [(slow.cause, slow.rank) for slow, _ in started] == [("network", None)] and ended == []
    assert started[0][0].seconds == pytest.approx(0.5)
    started, ended = simulation.run(WITHIN)
    assert started == [] and [slow.cause for slow in ended] == ["network"]


def window_of(own, preempted, data=0.1):
    """Returns a window of two ranks, by the times of each."""
    return [WindowTimes(o, data, o - data, 0.1, 1.0, p) for o, p in zip(own, preempted, strict=True)]


def test_a_rank_without_a_processor_is_named_although_noise_hides_its_own_time():
    detector, noise = SlowRankDetector(), random.Random(0)
    for _ in range(20):
        assert detector.add(window_of([noise.uniform(0.6, 1.0), 0.8], [0.01, 0.02])) == ([], [])
    started = []
    for _ in range(WINDOWS):
        started += detector.add(window_of([noise.uniform(0.6, 0.8), 0.81], [0.01, 0.2]))[0]
    assert [(slow.cause, slow.rank) for slow in started] == [("compute", 1)]
    assert started[0].seconds == pytest.approx(0.19)


def test_threads_of_a_rank_that_always_wait_for_each_other_are_not_slow():
    detector = SlowRankDetector()
    for number in range(20):
        assert detector.add(window_of([0.8, 0.81 + 0.01 * (number % 2)], [0.01, 0.15])) == ([], [])
    started = []
    for _ in range(WINDOWS):
        started += detector.add(window_of([0.8, 0.95], [0.01, 0.35]))[0]
    assert [(slow.cause, slow.rank) for slow in started] == [("compute", 1)]


def test_a_rank_without_a_processor_for_which_no_other_waits_is_not_named():
    detector = SlowRankDetector()
    for _ in range(20):
        assert detector.add(window_of([0.8, 0.8], [0.0, 0.0])) == ([], [])
    for _ in range(2 * WINDOWS):
        assert detector.add(window_of([0.85, 0.8], [0.0, 0.3])) == ([], [])


def test_other_compression_makes_transfers_a_new_baseline():
    simulation = Simulation(1, noise=0.0, interrupted=0.0)
    simulation.run(60)
    simulation.detector.restart()
    assert simulation.run(90, transfer=0.5) == ([], [])


# What is measured.


class Clock:
    now = waited = 0.0

    def times(self):
        return UpdateTimes(lambda: self.waited, lambda: self.now)

    def update(self, times, data, compute, wait, micro_batches=1):
        def batches():
            for _ in range(micro_batches):
                self.now += data / micro_batches
                yield 0

        assert [*times.timed(batches())] == [0] * micro_batches
        self.now += compute + wait
        self.waited += wait
        times.update_ended()


def test_the_wait_for_other_ranks_is_not_work_and_micro_batches_add_up():
    clock = Clock()
    times = clock.times()
    for _ in range(4):
        clock.now += 100.0  # an evaluation between updates
        clock.waited += 50.0
        clock.update(times, data=2.0, compute=3.0, wait=4.0, micro_batches=2)
    assert len(times) == 4
    expected = WindowTimes(own=5.0, data=2.0, compute=3.0, least_wait=4.0, update=9.0)
    assert times.take() == expected and len(times) == 0


def test_an_interrupted_update_counts_as_one_and_a_quarter():
    clock = Clock()
    times = clock.times()
    for compute in (1.0, 1.0, 100.0, 1.0):
        clock.update(times, 0.0, compute, 0.0)
    assert times.take().own == pytest.approx(fmean([1.0, 1.0, 1.25, 1.0]))


def test_the_least_wait_is_that_of_updates_for_which_the_rank_was_the_last():
    clock = Clock()
    times = clock.times()
    for wait in (0.9, 0.1, 0.5, 0.2):
        clock.update(times, 0.0, 1.0, wait)
    assert times.take().least_wait == pytest.approx(0.1)


DELAYED = """
import os, subprocess, sys, time
from hvd_adam.training.slow_ranks.preemption import RunDelays

def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return delays.since_last_call()

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.setpriority(os.PRIO_PROCESS, 0, -10)
delays = RunDelays()
time.sleep(0.3)
asleep = delays.since_last_call()
busy = [sys.executable, "-c", "print(flush=True)\\nwhile True: pass"]
other = subprocess.Popen(busy, stdout=subprocess.PIPE)
other.stdout.readline()
delays.since_last_call()
print(asleep, work(0.2))
other.kill()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a priority above that of the other tests")
def test_time_without_a_processor_is_that_which_another_process_takes():
    done = subprocess.run([sys.executable, "-c", DELAYED], check=True, capture_output=True, text=True, timeout=250)
    asleep, shared = map(float, done.stdout.split())
    assert shared > 0.1 > asleep


# Checkpoints.


def test_checkpoints_are_slow_if_each_of_the_last_holds_training_up():
    checkpoints = SlowCheckpoints(least_seconds=2.0)
    for _ in range(CHECKPOINTS - 1):
        assert checkpoints.add(1.0, 0.5) == (None, False)
    slow, ended = checkpoints.add(1.0, 0.5)
    assert slow == Slow("checkpoint", 0, 0.5, 0.5) and not ended
    assert checkpoints.add(1.0, 0.5) == (None, False)
    assert [checkpoints.add(1.0, 0.0)[1] for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize(("between", "held"), [(1.0, 0.09), (0.1, 0.1)])
def test_short_checkpoints_are_not_slow(between, held):
    checkpoints = SlowCheckpoints(least_seconds=2.0)
    assert all(checkpoints.add(between, held) == (None, False) for _ in range(10))


# What a reader sees.


@pytest.mark.parametrize("cause", ["data", "compute", "checkpoint"])
def test_the_line_names_rank_host_slowdown_and_time(cause):
    line = slow_line(Slow(cause, 1, 0.4, 0.123), HOSTS, "cpu")
    assert "rank 1 on b" in line and "40 %" in line and "123 ms" in line
    assert "rank 1 on b" in ended_line(Slow(cause, 1, 0.4, 0.123), HOSTS)


def test_on_gpus_the_line_for_the_network_tells_that_it_may_be_a_gpu():
    slow = Slow("network", None, 0.4, 0.123)
    assert "GPU" in slow_line(slow, HOSTS, "cuda") and "GPU" not in slow_line(slow, HOSTS, "cpu")


SLEEPY = """
import time
import horovod.torch as hvd
import torch
from torch.utils.data import Dataset
from hvd_adam.data import Datasets

class Rows(Dataset):
    def __len__(self):
        return 90
    def __getitem__(self, index):
        if hvd.rank() == 1:
            time.sleep(0.15)
        return torch.zeros(4), index % 2

def data():
    test = torch.utils.data.TensorDataset(torch.zeros(2, 4), torch.arange(2))
    return Datasets(Rows(), test, ("a", "b"), name="r")

def build():
    return torch.nn.Linear(4, 2)
"""


def test_a_run_records_who_is_slow_and_a_report_shows_it(tmp_path):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    options = (
        "--dataset sleepy:data --model sleepy:build --global-batch-size 2 --workers 0 --log-every 100".split()
    )
    folder = tmp_path / "run"
    done = succeeded(train(*options, "--max-steps", 45, "--epochs", 1, ranks=2, folder=folder, cwd=tmp_path))
    slow = events(folder, "slow_rank")[0]
    assert (slow["cause"], slow["rank"]) == ("data", 1) and slow["slowdown"] > 0.1
    assert "rank 1 on" in done.stdout + done.stderr
    lines = "\n".join(happenings(*load_runs([str(folder)])))
    assert f"rank 1 on {slow['host']} is slow: data" in lines


@on_ranks(2)
def test_rows_of_all_ranks_arrive_while_other_collectives_run(cluster):
    gather = BackgroundGather("rows")
    for number in range(20):
        assert not gather.in_flight
        gather.start([cluster.rank, number, 0.1])
        assert gather.in_flight
        assert cluster.sum(1) == 2
        assert gather.take().tolist() == [[0.0, number, 0.1], [1.0, number, 0.1]]


@on_ranks(2)
def test_waiting_for_any_collective_is_counted(cluster):
    before = seconds_waited()
    cluster.barrier()
    assert seconds_waited() > before
