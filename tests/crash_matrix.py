"""Kills training runs at random and checks that every run ends with the result of an uninterrupted run.

python tests/crash_matrix.py --trials 100 --seed 0 --jobs 2

In a trial, a run is killed one to three times by SIGKILL to a random rank or to the launcher. Each time it is
restarted by the same command, either at once, while orphaned ranks may still write, or after all its processes
have ended. Half of the kills happen while a checkpoint is written, which is slowed down; the others at any time.
After a kill, the newest intact checkpoint must be at least as new as the one that `latest` named before. At the
end, weights and metrics must equal those of an uninterrupted run.
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
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from helpers.cifar_files import write_cifar10

from hvd_adam.bench.processes import marked, send
from hvd_adam.checkpoint import storage

ROOT = Path(__file__).parents[1]
HOROVODRUN = ROOT / "tests" / "helpers" / "horovodrun.py"
MARK = "HVD_ADAM_CRASH_TRIAL"
ORPHAN_SECONDS = 60.0  # after which ranks have detected that their launcher is gone
LAUNCH_SECONDS = 250.0  # upper bound of a whole run on a busy machine

# A small model with a slowed-down fsync: writing a checkpoint takes at least 0.2 s.
FLUSH_SECONDS = 0.04
MODEL = f"""
import time
import torch
from hvd_adam.checkpoint import files, storage

flush = files.fsync

def slow_fsync(path):
    time.sleep({FLUSH_SECONDS})
    flush(path)

files.fsync = storage.fsync = slow_fsync

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    first, last = torch.nn.Linear(inputs, 32), torch.nn.Linear(32, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.GELU(), torch.nn.Dropout(0.5), last)
"""

OPTIONS = "--dataset cifar10 --model slow:build --epochs 4 --batch-size 10 --log-every 3".split()
OFTEN = "--checkpoint-every 2 --eval-every 2".split()


@dataclass(frozen=True)
class Case:
    """The launch options of a run."""

    controller: str
    strategy: str
    state_format: str = "float32"
    compression: str = "none"

    @classmethod
    def draw(cls, rng: random.Random) -> "Case":
        """Draws a case."""
        controller, strategy = rng.choice(("mpi", "gloo")), rng.choice(("allreduce", "sharded"))
        held = rng.choice(("float32", "bfloat16", "8bit"))
        return cls(controller, strategy, held, rng.choice(("none", "int8", "int4")))

    def command(self, python: str, place: Path, folder: Path) -> list[str]:
        """Returns the command that starts and resumes the run, whose ranks run this program as Python."""
        launcher = [sys.executable, str(HOROVODRUN), "-np", "2", f"--{self.controller}"]
        data = ["--data-dir", str(place / "data"), "--output-dir", str(folder), "--strategy", self.strategy]
        held = ["--state-format", self.state_format, "--compression", self.compression]
        return [*launcher, python, "-m", "hvd_adam.train", *OPTIONS, *OFTEN, *data, *held]


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    weights: dict[str, torch.Tensor]
    metrics: list[dict[str, object]]
    seconds: float  # from the first to the last event

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """Reads the result from a run folder."""
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert events[-1]["event"] == "end"
        assert latest_step(folder) == events[-1]["step"]
        timeless = [
            {name: value for name, value in event.items() if name not in ("time", "images_per_second")}
            for event in events
            if event["event"] in ("step", "eval")
        ]
        return cls(storage.load(folder)["model"], timeless, events[-1]["time"] - events[0]["time"])


def start(python: str, case: Case, place: Path, folder: Path) -> subprocess.Popen:
    """Starts or resumes the run; marks all its processes with its folder in the environment."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": paths, "PYTHONPATH": f"{place}:{ROOT}", MARK: str(folder)}
    environ |= {"HOROVOD_GLOO_TIMEOUT_SECONDS": "20", "OMP_NUM_THREADS": "1"}
    with (place / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            case.command(python, place, folder), env=environ, stdout=log, stderr=log, start_new_session=True
        )


def kill_one(running: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """Sends SIGKILL to the launcher or to one rank; returns which of the two it was."""
    left = marked(f"{MARK}={folder}")
    # horovodrun becomes a shell that waits for mpirun. Without that shell the run would continue: kill mpirun.
    launcher = next((pid for pid in left if arguments(pid)[0] == b"mpirun"), running.pid)
    victim = rng.choice([launcher, *filter(is_rank, left)])
    send(victim, signal.SIGKILL)
    return "launcher" if victim == launcher else "rank"


def is_rank(pid: int) -> bool:
    """Returns whether a process is a rank of the training, or the client of a fork that is one."""
    program, *rest = arguments(pid)
    return b"python" in program.rpartition(b"/")[2] and b"hvd_adam.train" in rest[:4]


def arguments(pid: int) -> list[bytes]:
    """Returns a process's program and arguments; `[b""]` if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def await_end(running: subprocess.Popen, folder: Path) -> None:
    """Waits until all processes of the run have ended; a job that lost a process must end by itself."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := marked(f"{MARK}={folder}"):
        running.poll()
        if time.monotonic() > deadline:
            lines = [f"{pid} {b' '.join(arguments(pid)).decode()[:150]}" for pid in left]
            raise AssertionError(f"left after {ORPHAN_SECONDS:g} s: {lines}")
        time.sleep(0.1)
    running.wait()


def newest_step(folder: Path) -> int:
    """Returns the step of the newest intact checkpoint; 0 without one."""
    path, state, _ = storage.load_newest(folder / "checkpoints")
    return state["progress"]["step"] if path else 0


def latest_step(folder: Path) -> int:
    """Returns the step of the checkpoint that `latest` names; 0 without one."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def is_writing(folder: Path) -> bool:
    """Returns whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step-*"))


def has_grown(path: Path, since: float) -> bool:
    """Returns whether a file was written to after `since`, in seconds since the epoch."""
    return path.exists() and path.stat().st_size > 0 and path.stat().st_mtime > since


def await_moment(running: subprocess.Popen, folder: Path, rng: random.Random, seconds: float) -> bool:
    """Waits for a random moment of a run of this duration; returns whether the run has not ended by then."""
    writing, started = rng.random() < 0.5, time.time()
    # In a resumed run an orphaned rank may be the one that writes: then the run is killed while it starts.
    await_true(running, lambda: has_grown(folder / "metrics.jsonl", started))
    time.sleep(rng.uniform(0, 0.8 * seconds))
    if writing:
        await_true(running, lambda: is_writing(folder))
        time.sleep(rng.uniform(0, 6 * FLUSH_SECONDS))
    return running.poll() is None


def await_true(running: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Waits until the condition is true or the run has ended."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    while running.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)


def uninterrupted(python: str, case: Case, place: Path) -> Result:
    """Returns the result of a run that is not killed."""
    folder = place / f"uninterrupted-{'-'.join(astuple(case))}"
    assert start(python, case, place, folder).wait(timeout=LAUNCH_SECONDS) == 0, f"see {folder}.log"
    return Result.read(folder)


def trial(python: str, case: Case, place: Path, number: int, rng: random.Random, expected: Result) -> str:
    """Makes a run with one to three kills; returns what was killed, and after how many updates."""
    folder, story = place / f"trial-{number}", []
    for _ in range(rng.randint(1, 3)):
        running = start(python, case, place, folder)
        if not await_moment(running, folder, rng, expected.seconds):
            assert running.returncode == 0, f"the run exits with {running.returncode}"
            break
        before = latest_step(folder)
        victim = kill_one(running, folder, rng)
        if rng.random() < 0.3:
            story.append(f"{victim} after {before}, restarted at once")
            continue
        await_end(running, folder)
        after = newest_step(folder)
        story.append(f"{victim} at {after}")
        assert after >= before, f"the checkpoint of update {before} is lost: the newest is of update {after}"
    code = start(python, case, place, folder).wait(timeout=LAUNCH_SECONDS)
    assert code == 0, f"the run exits with {code}"
    result = Result.read(folder)
    assert all(torch.equal(weight, result.weights[name]) for name, weight in expected.weights.items()), (
        "other weights"
    )
    assert result.metrics == expected.metrics, "other metrics"
    return ", ".join(story) or "not killed in time"


def run(trials: int, seed: int, jobs: int, place: Path, python: str = sys.executable) -> int:
    """Runs all trials, `jobs` of them at a time, with ranks of a Python; returns how many failed."""
    write_cifar10(place / "data")
    (place / "slow.py").write_text(MODEL)
    rngs = [random.Random(f"{seed}-{number}") for number in range(trials)]
    cases = [Case.draw(rng) for rng in rngs]
    distinct = list(dict.fromkeys(cases))

    def attempt(number: int) -> bool:
        case, rng = cases[number], rngs[number]
        title = f"trial {number + 1} of {trials}: {', '.join(astuple(case))}: killed"
        try:
            print(title, trial(python, case, place, number + 1, rng, expected[case]) + "; ok", flush=True)
        except Exception as error:
            print(title, f"FAILED: {error!r}: see {place}/trial-{number + 1}*", flush=True)
            return False
        shutil.rmtree(place / f"trial-{number + 1}")
        return True

    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda case: uninterrupted(python, case, place), distinct)
        expected = dict(zip(distinct, results, strict=True))
        return trials - sum(pool.map(attempt, range(trials)))


def main() -> int:
    """Runs the command; keeps the folder of the trials if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the launch options, victims and times")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="hvd_adam-crash-"))
    started = time.monotonic()
    failed = run(given.trials, given.seed, given.jobs, place)
    print(f"{failed} of {given.trials} trials failed, in {time.monotonic() - started:.0f} s")
    if not failed:
        shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
