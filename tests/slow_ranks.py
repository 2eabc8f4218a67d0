"""Slows ranks of a real training down, and counts how often the training names the right rank, host and cause.

    python tests/slow_ranks.py [--times 10] [CAUSE ...]
    python tests/slow_ranks.py --times 0 --undisturbed 100

One rank each on two hosts in network namespaces, each pinned to a core. A cause acts for 20 updates, on one rank
and then on the other, with a random strength of at least 15 %. Needs root and two cores. `--undisturbed` counts
stretches of 60 updates in which nothing is slowed down on purpose; `--busy` makes other processes come and go on
all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from hvd_adam.bench.interleave import Plan
from hvd_adam.bench.link import HOSTS, INTERFACE, Link, limited_link

ROOT = Path(__file__).parents[1]
WITHIN, STRETCH, RECOVERY = 20, 60, 24  # updates
PATIENCE = 180.0  # seconds for whatever is waited for
FAST_LINK = 10_000_000_000
SPIN = "while True: pass"

# An update takes about 0.13 s. Seconds in the file `sleep-RANK` slow the loader, and those in `fsync` the disk.
MODULE = """
import os, time
from pathlib import Path
import horovod.torch as hvd
import torch
from torch.utils.data import Dataset
from hvd_adam.data import Datasets

FLAGS = Path(__file__).parent
CLASSES = tuple("0123456789")

def pause(name):
    try:
        time.sleep(float((FLAGS / name).read_text()))
    except (FileNotFoundError, ValueError):
        pass

class Rows(Dataset):
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        pause(f"sleep-{hvd.rank()}")
        return torch.full((64,), index / self.count), index % len(CLASSES)

def data():
    return Datasets(Rows(32 * 100_000), Rows(64), CLASSES, name="rows")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = torch.nn.Linear(64, 512), torch.nn.Linear(512, 512)
        self.last = torch.nn.Linear(512, len(CLASSES))
    def forward(self, rows):
        hidden = self.first(rows)
        for _ in range(int(os.environ["REPEATS"])):
            hidden = hidden + 0.01 * torch.tanh(self.inner(hidden))
        return self.last(hidden)

def build():
    if os.environ["PIN"] == "1":
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {hvd.rank() % os.cpu_count()})
    (FLAGS / f"pid-{hvd.rank()}").write_text(str(os.getpid()))
    flush = os.fsync
    def fsync(descriptor):
        pause("fsync")
        flush(descriptor)
    os.fsync = fsync
    return Net()
"""


@dataclass
class Job:
    """A running training of two ranks.

    Attributes:
        link: between their hosts.
        folder: its own.
    """

    link: Link
    folder: Path

    def start(self, *argv: str, pin: bool = True, repeats: int = 55) -> None:
        """Starts it, and waits for the first updates."""
        (self.folder / "slowed.py").write_text(MODULE)
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        options = "--dataset slowed:data --model slowed:build --global-batch-size 64 --log-every 1 --workers 0"
        command = (launcher, "-np", "2", "--gloo", sys.executable, "-m", "hvd_adam.train", *options.split())
        plan = self.link.over(Plan("training", {}, (*command, "--output-dir", str(self.folder / "run"), *argv)))
        environ = {"PYTHONPATH": f"{self.folder}:{ROOT}", "PIN": str(int(pin)), "REPEATS": str(repeats)}
        environ |= {"OMP_NUM_THREADS": "1", **plan.environ}
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(plan.command, env=os.environ | environ, stdout=log, stderr=log)
        self._lines = self._read()
        self._events: list[dict] = []
        self.wait(3)

    def _read(self) -> Iterator[dict | None]:
        path = self.folder / "run" / "metrics.jsonl"
        while not path.exists():
            yield None
        with path.open() as file:
            text = ""
            while True:
                text += file.readline()
                if text.endswith("\n"):
                    yield json.loads(text)
                    text = ""
                else:
                    yield None

    def events(self) -> list[dict]:
        """Returns all events so far."""
        while (event := next(self._lines)) is not None:
            self._events.append(event)
        return self._events

    def step(self) -> int:
        """Returns the number of updates so far."""
        return max((event["step"] for event in self.events()), default=0)

    def wait(self, updates: int) -> None:
        """Waits for updates.

        Raises:
            AssertionError: the job has ended, or it takes too long.
        """
        end = self.step() + updates
        self.until(lambda step: step >= end)

    def until(self, condition: Callable[[int], bool]) -> None:
        """Waits until the condition holds for the number of updates; raises as `wait`."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self.step()):
            running = self._process.poll() is None and time.monotonic() < deadline
            assert running, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.01)

    def named(self, since: int) -> list[dict]:
        """Returns what was named after a number of updates."""
        return [event for event in self.events() if event["event"] == "slow_rank" and event["step"] > since]

    def is_quiet(self) -> bool:
        """Whether nothing is named at present."""
        kinds = [event["event"] for event in self.events()]
        return kinds.count("slow_rank") == kinds.count("slow_rank_end")

    def pid(self, rank: int) -> int:
        """Returns the process of a rank."""
        return int((self.folder / f"pid-{rank}").read_text())

    def limit(self, rank: int, rate: int) -> None:
        """Limits what the host of a rank sends, in bit/s."""
        limiter = f"tc qdisc replace dev {INTERFACE} root tbf rate {rate}bit burst {max(131072, rate // 4000)}b"
        enter = ["nsenter", "-t", str(self.link.pids[rank]), "--net"]
        subprocess.run([*enter, *limiter.split(), "latency", "50ms"], check=True)

    def stop(self) -> None:
        """Ends the job."""
        for rank in (0, 1):
            os.kill(self.pid(rank), signal.SIGKILL)
        self._process.wait()


@contextmanager
def busy_process(job: Job, rank: int) -> Iterator[None]:
    """Another process on the rank's core: it gets from a fifth of the time up to half of it."""
    nice = random.choice([0, 2, 4, 6])
    other = subprocess.Popen(["taskset", "-c", str(rank), "nice", "-n", str(nice), sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        other.kill()
        other.wait()


@contextmanager
def cpu_quota(job: Job, rank: int) -> Iterator[None]:
    """A control group whose quota leaves the rank 50 to 75 % of a core."""
    group = Path(f"/sys/fs/cgroup/cpu/hvd_adam-{os.getpid()}-{rank}")
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text("20000")
    (group / "cpu.cfs_quota_us").write_text(str(random.randint(10000, 15000)))
    try:
        (group / "cgroup.procs").write_text(str(job.pid(rank)))
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(job.pid(rank)))
        group.rmdir()


@contextmanager
def _seconds(path: Path, seconds: float) -> Iterator[None]:
    path.write_text(f"{seconds:.5f}")
    try:
        yield
    finally:
        path.unlink()


def sleeping_loader(job: Job, rank: int) -> AbstractContextManager[None]:
    """Batches of the rank take 30 to 120 ms longer."""
    return _seconds(job.folder / f"sleep-{rank}", random.uniform(0.03, 0.12) / 32)


def slow_disk(job: Job, rank: int) -> AbstractContextManager[None]:
    """Each flush of a file to disk takes 0.2 to 0.4 s; a checkpoint has several. Rank 0 writes them all."""
    return _seconds(job.folder / "fsync", random.uniform(0.2, 0.4))


@contextmanager
def limited(job: Job, rank: int) -> Iterator[None]:
    """The link of the rank has 50 to 200 Mbit/s in place of 10 Gbit/s."""
    job.limit(rank, random.randint(50, 200) * 10**6)
    try:
        yield
    finally:
        job.limit(rank, FAST_LINK)


CAUSES = {
    "busy_process": ("compute", busy_process),
    "cpu_quota": ("compute", cpu_quota),
    "sleeping_loader": ("data", sleeping_loader),
    "limited_link": ("network", limited),
    "slow_disk": ("checkpoint", slow_disk),
}


def provoke(job: Job, name: str, rank: int) -> int | None:
    """Slows a rank down for 20 updates; returns after how many it was named rightly, None if it was not."""
    cause, act = CAUSES[name]
    expected = {"network": (None, None), "checkpoint": (0, "node1")}.get(cause, (rank, list(HOSTS)[rank]))
    start = job.step()
    with act(job, rank):
        job.until(lambda step: step >= start + WITHIN or bool(job.named(start)))
    named = job.named(start)
    places = [(event["cause"], (event["rank"], event["host"])) for event in named]
    job.wait(RECOVERY)
    latest = job.step() + 2 * RECOVERY
    job.until(lambda step: job.is_quiet() or step >= latest)
    right = places == [(cause, expected)]
    if not right:
        print(f"  {name} of rank {rank}: named {places}", flush=True)
    return named[0]["step"] - start if right else None


@contextmanager
def busy_machine() -> Iterator[None]:
    """Two processes that work and sleep for random times, on any core."""
    code = "import time, random\nwhile True:\n e=time.time()+random.expovariate(5)\n"
    code += " while time.time()<e: pass\n time.sleep(random.expovariate(2))"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def training(*argv: str, pin: bool = True) -> Iterator[Job]:
    """A job, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="hvd_adam-slow-") as name, limited_link(FAST_LINK) as link:
        job = Job(link, Path(name))
        try:
            job.start(*argv, pin=pin)
            job.wait(STRETCH)  # the times of transfers need a baseline
            yield job
        finally:
            job.stop()


def _provoke_all(names: list[str], times: int) -> None:
    """Prints for each cause how often it was named rightly, in one training."""
    with training(*(["--checkpoint-every", "4"] if "slow_disk" in names else [])) as job:
        for name in names:
            found = [provoke(job, name, turn % 2) for turn in range(times)]
            delays = sorted(delay for delay in found if delay is not None)
            after = f", after {delays[len(delays) // 2]} updates (median), {delays[-1]} at most" if delays else ""
            print(f"{name}: {len(delays)} of {times} named rightly{after}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("causes", nargs="*", choices=[[], *CAUSES], help="all by default")
    parser.add_argument("--times", type=int, default=10, help="slowdowns of each cause")
    parser.add_argument("--undisturbed", type=int, default=0, help="stretches of 60 updates")
    parser.add_argument("--busy", action="store_true", help="undisturbed, on a busy machine")
    given = parser.parse_args()
    names = [*(given.causes or CAUSES)] if given.times else []
    for group in (
        [name for name in names if name != "slow_disk"],
        [name for name in names if name == "slow_disk"],
    ):
        if group:
            _provoke_all(group, given.times)
    if given.undisturbed:
        with training(pin=False) as job, busy_machine() if given.busy else nullcontext():
            wrong = 0
            for _ in range(given.undisturbed):
                start = job.step()
                job.wait(STRETCH)
                wrong += bool(job.named(start))
            print(f"undisturbed: something named in {wrong} of {given.undisturbed} stretches", flush=True)


if __name__ == "__main__":
    main()
