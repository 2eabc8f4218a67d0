"""Kills training at random, again and again, and sees whether every run ends where an undisturbed one ends.

python tests/crash_matrix.py --trials 100 --seed 0

A trial is a run that is killed one to three times, by SIGKILL to a random rank or to the launcher at a random
moment, and started again by the same command each time. Writing a checkpoint is slowed down, so that many moments
fall into it. After each kill the newest whole checkpoint must be at least as new as `latest` named before it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar_files import write_cifar10

from hvd_adam import checkpoint
from hvd_adam.bench.processes import marked, send

ROOT = Path(__file__).parents[1]
MARK = "HVD_ADAM_CRASH_TRIAL"
ORPHAN_SECONDS = 30.0  # until ranks notice that their launcher is gone

# A small model, and a disk that takes a while to flush.
MODEL = """
import time
import torch
from hvd_adam import checkpoint

flush = checkpoint._flush

def slowly(path):
    time.sleep(0.05)
    flush(path)

checkpoint._flush = slowly

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    first, last = torch.nn.Linear(inputs, 32), torch.nn.Linear(32, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.GELU(), torch.nn.Dropout(0.5), last)
"""

OPTIONS = "--dataset cifar10 --model slow:build --epochs 8 --batch-size 10 --checkpoint-every 2 --eval-every 4"


@dataclass
class Case:
    """How a run is started."""

    controller: str
    strategy: str

    def command(self, place: Path, folder: Path) -> list[str]:
        """The same each time."""
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", "2", f"--{self.controller}"]
        data = ["--data-dir", str(place / "data"), "--output-dir", str(folder), "--strategy", self.strategy]
        return [*launcher, sys.executable, "-m", "hvd_adam.train", *OPTIONS.split(), *data]


def start(case: Case, place: Path, folder: Path) -> subprocess.Popen:
    """Starts the run, or goes on with it; everything it starts is marked with its folder."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": paths, "PYTHONPATH": f"{place}:{ROOT}", MARK: str(folder)}
    environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "20"
    with (place / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            case.command(place, folder), env=environ, stdout=log, stderr=log, start_new_session=True
        )


def kill_one(running: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """SIGKILL to the launcher or to one of the ranks; says to whom."""
    ranks = [pid for pid in marked(f"{MARK}={folder}") if is_rank(pid)]
    victim = rng.choice([running.pid, *ranks])
    send(victim, signal.SIGKILL)
    return "launcher" if victim == running.pid else "rank"


def is_rank(pid: int) -> bool:
    """Whether a process is one that trains."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"python" in Path(command[0].decode()).name.encode() and b"hvd_adam.train" in command[:3]


def await_end(running: subprocess.Popen, folder: Path) -> None:
    """Until nothing of the run is left; a job that has lost a process must end by itself."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while marked(f"{MARK}={folder}"):
        running.poll()
        if time.monotonic() > deadline:
            raise AssertionError(f"processes of {folder} are left after {ORPHAN_SECONDS:g} s")
        time.sleep(0.1)
    running.wait()


def newest_step(folder: Path) -> int:
    """Updates in the newest whole checkpoint; 0 without one."""
    path, state, _ = checkpoint.newest(folder / "checkpoints")
    return state["progress"]["step"] if path else 0


def pointed_to(folder: Path) -> int:
    """Updates in the checkpoint that `latest` names; 0 without one."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def undisturbed(case: Case, place: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The weights at the end of a run that nobody kills, and the seconds it takes."""
    folder = place / f"undisturbed-{case.controller}-{case.strategy}"
    begun = time.monotonic()
    assert start(case, place, folder).wait() == 0
    return checkpoint.load(folder)["model"], time.monotonic() - begun


def trial(case: Case, place: Path, number: int, rng: random.Random, seconds: float) -> str:
    """One run with one to three kills; says what was killed after how many updates."""
    folder, story = place / f"trial-{number}", []
    for _ in range(rng.randint(1, 3)):
        running = start(case, place, folder)
        try:
            running.wait(timeout=rng.uniform(0.3, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            before = pointed_to(folder)
            victim = kill_one(running, folder, rng)
            await_end(running, folder)
            after = newest_step(folder)
            story.append(f"{victim} at {after}")
            assert after >= before, f"the checkpoint of update {before} is lost: the newest is of {after}"
    assert start(case, place, folder).wait() == 0, f"{folder} does not end: see {place / folder.name}.log"
    return ", ".join(story) or "not killed in time"


def run(trials: int, seed: int, place: Path) -> None:
    """All trials; the first that fails ends it."""
    write_cifar10(place / "data")
    (place / "slow.py").write_text(MODEL)
    rng = random.Random(seed)
    expected: dict[tuple[str, str], tuple[dict[str, torch.Tensor], float]] = {}
    for number in range(1, trials + 1):
        case = Case(rng.choice(("mpi", "gloo")), rng.choice(("allreduce", "sharded")))
        key = (case.controller, case.strategy)
        if key not in expected:
            expected[key] = undisturbed(case, place)
        weights, seconds = expected[key]
        story = trial(case, place, number, rng, seconds)
        made = checkpoint.load(place / f"trial-{number}")["model"]
        assert all(torch.equal(weight, made[name]) for name, weight in weights.items()), "other weights"
        print(f"trial {number} of {trials}: {case.controller}, {case.strategy}: killed {story}; right", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="decides whom and when")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hvd_adam-crash-") as name:
        run(given.trials, given.seed, Path(name))
