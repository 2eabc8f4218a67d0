"""Kills training at random, again and again, and sees whether every run ends where an undisturbed one ends.

python tests/crash_matrix.py --trials 100 --seed 0 --jobs 2

A trial is a run that is killed one to three times, by SIGKILL to a random rank or to the launcher, and started
again by the same command each time: at once, while orphans still write, or when nothing of it is left. Half of
the kills fall into the writing of a checkpoint, which is slowed down, the others anywhere in the training. After a
kill the newest whole checkpoint must be at least as new as `latest` named before it; at the end weights and
metrics must be those of an undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar_files import write_cifar10

from hvd_adam.bench.processes import marked, send
from hvd_adam.checkpoint import storage

ROOT = Path(__file__).parents[1]
MARK = "HVD_ADAM_CRASH_TRIAL"
ORPHAN_SECONDS = 30.0  # until ranks notice that their launcher is gone
LAUNCH_SECONDS = 200.0  # for a run from start to end, on a busy machine

# A small model, and a disk that takes a while to flush: a checkpoint takes a fifth of a second and more.
FLUSH_SECONDS = 0.04
MODEL = f"""
import time
import torch
from hvd_adam.checkpoint import files, storage

flush = files.fsync

def slowly(path):
    time.sleep({FLUSH_SECONDS})
    flush(path)

files.fsync = storage.fsync = slowly

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    first, last = torch.nn.Linear(inputs, 32), torch.nn.Linear(32, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.GELU(), torch.nn.Dropout(0.5), last)
"""

OPTIONS = "--dataset cifar10 --model slow:build --epochs 4 --batch-size 10 --log-every 3".split()
OFTEN = "--checkpoint-every 2 --eval-every 2".split()


@dataclass(frozen=True)
class Case:
    """How a run is started."""

    controller: str
    strategy: str

    @classmethod
    def drawn(cls, rng: random.Random) -> "Case":
        """One of all."""
        return cls(rng.choice(("mpi", "gloo")), rng.choice(("allreduce", "sharded")))

    def command(self, place: Path, folder: Path) -> list[str]:
        """The same each time."""
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", "2", f"--{self.controller}"]
        data = ["--data-dir", str(place / "data"), "--output-dir", str(folder), "--strategy", self.strategy]
        return [*launcher, sys.executable, "-m", "hvd_adam.train", *OPTIONS, *OFTEN, *data]


@dataclass(frozen=True)
class End:
    """What a run comes to."""

    weights: dict[str, torch.Tensor]
    metrics: list[dict[str, object]]
    seconds: float  # of training, without the start

    @classmethod
    def of(cls, folder: Path) -> "End":
        """Reads it."""
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert events[-1]["event"] == "end"
        assert pointed_to(folder) == events[-1]["step"]
        timeless = [
            {name: value for name, value in event.items() if name not in ("time", "images_per_second")}
            for event in events
            if event["event"] in ("step", "eval")
        ]
        return cls(storage.load(folder)["model"], timeless, events[-1]["time"] - events[0]["time"])


def start(case: Case, place: Path, folder: Path) -> subprocess.Popen:
    """Starts the run, or goes on with it; everything it starts is marked with its folder."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": paths, "PYTHONPATH": f"{place}:{ROOT}", MARK: str(folder)}
    environ |= {"HOROVOD_GLOO_TIMEOUT_SECONDS": "20", "OMP_NUM_THREADS": "1"}
    with (place / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            case.command(place, folder), env=environ, stdout=log, stderr=log, start_new_session=True
        )


def kill_one(running: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """SIGKILL to the launcher or to one of the ranks; says to whom."""
    left = marked(f"{MARK}={folder}")
    # horovodrun becomes a shell that waits for mpirun: without that shell the run simply goes on.
    launcher = next((pid for pid in left if arguments(pid)[0] == b"mpirun"), running.pid)
    victim = rng.choice([launcher, *filter(is_rank, left)])
    send(victim, signal.SIGKILL)
    return "launcher" if victim == launcher else "rank"


def is_rank(pid: int) -> bool:
    """Whether a process is one that trains."""
    program, *rest = arguments(pid)
    return b"python" in program.rpartition(b"/")[2] and b"hvd_adam.train" in rest[:2]


def arguments(pid: int) -> list[bytes]:
    """A process's program and arguments; an empty one if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def await_end(running: subprocess.Popen, folder: Path) -> None:
    """Until nothing of the run is left; a job that has lost a process must end by itself."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := marked(f"{MARK}={folder}"):
        running.poll()
        if time.monotonic() > deadline:
            lines = [f"{pid} {b' '.join(arguments(pid)).decode()[:150]}" for pid in left]
            raise AssertionError(f"left after {ORPHAN_SECONDS:g} s: {lines}")
        time.sleep(0.1)
    running.wait()


def newest_step(folder: Path) -> int:
    """Updates in the newest whole checkpoint; 0 without one."""
    path, state, _ = storage.load_newest(folder / "checkpoints")
    return state["progress"]["step"] if path else 0


def pointed_to(folder: Path) -> int:
    """Updates in the checkpoint that `latest` names; 0 without one."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step-*"))


def has_grown(path: Path, since: float) -> bool:
    """Whether anything was written to a file since then, in seconds since the epoch."""
    return path.exists() and path.stat().st_size > 0 and path.stat().st_mtime > since


def await_moment(running: subprocess.Popen, folder: Path, rng: random.Random, seconds: float) -> bool:
    """Until a random moment of a training that takes so long; whether the run still lasts then."""
    writing, begun = rng.random() < 0.5, time.time()
    # In a run that goes on it may be an orphan that writes: it is killed in its start then.
    await_true(running, lambda: has_grown(folder / "metrics.jsonl", begun))
    time.sleep(rng.uniform(0, 0.8 * seconds))
    if writing:
        await_true(running, lambda: is_writing(folder))
        time.sleep(rng.uniform(0, 6 * FLUSH_SECONDS))
    return running.poll() is None


def await_true(running: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Until it holds, or the run has ended."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    while running.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.01)


def undisturbed(case: Case, place: Path) -> End:
    """What a run comes to that nobody kills."""
    folder = place / f"undisturbed-{case.controller}-{case.strategy}"
    assert start(case, place, folder).wait(timeout=LAUNCH_SECONDS) == 0, f"see {folder}.log"
    return End.of(folder)


def trial(case: Case, place: Path, number: int, rng: random.Random, expected: End) -> str:
    """One run with one to three kills; says what was killed after how many updates."""
    folder, story = place / f"trial-{number}", []
    for _ in range(rng.randint(1, 3)):
        running = start(case, place, folder)
        if not await_moment(running, folder, rng, expected.seconds):
            assert running.returncode == 0, f"it ends with {running.returncode}"
            break
        before = pointed_to(folder)
        victim = kill_one(running, folder, rng)
        if rng.random() < 0.3:
            story.append(f"{victim} after {before}, at once started again")
            continue
        await_end(running, folder)
        after = newest_step(folder)
        story.append(f"{victim} at {after}")
        assert after >= before, f"the checkpoint of update {before} is lost: the newest is of {after}"
    code = start(case, place, folder).wait(timeout=LAUNCH_SECONDS)
    assert code == 0, f"it ends with {code}"
    end = End.of(folder)
    assert all(torch.equal(weight, end.weights[name]) for name, weight in expected.weights.items()), (
        "other weights"
    )
    assert end.metrics == expected.metrics, "other metrics"
    return ", ".join(story) or "not killed in time"


def run(trials: int, seed: int, jobs: int, place: Path) -> int:
    """All trials, so many side by side; returns how many have failed."""
    write_cifar10(place / "data")
    (place / "slow.py").write_text(MODEL)
    rngs = [random.Random(f"{seed}-{number}") for number in range(trials)]
    cases = [Case.drawn(rng) for rng in rngs]
    distinct = list(dict.fromkeys(cases))

    def attempt(number: int) -> bool:
        case, rng = cases[number], rngs[number]
        title = f"trial {number + 1} of {trials}: {case.controller}, {case.strategy}: killed"
        try:
            print(title, trial(case, place, number + 1, rng, expected[case]) + "; right", flush=True)
        except Exception as error:
            print(title, f"WRONG: {error!r}: see {place}/trial-{number + 1}*", flush=True)
            return False
        shutil.rmtree(place / f"trial-{number + 1}")
        return True

    with ThreadPoolExecutor(jobs) as pool:
        expected = dict(zip(distinct, pool.map(lambda case: undisturbed(case, place), distinct), strict=True))
        return trials - sum(pool.map(attempt, range(trials)))


def main() -> int:
    """The command; keeps its folder if a trial has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="decides whom and when")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="hvd_adam-crash-"))
    begun = time.monotonic()
    failed = run(given.trials, given.seed, given.jobs, place)
    print(f"{failed} of {given.trials} trials failed, in {time.monotonic() - begun:.0f} s")
    if not failed:
        shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
