"""Measures how long an elastic training takes to continue after ranks, hosts or links are lost or hosts added.

    python tests/recovery.py [--slots 2] [--train ARGUMENTS] [SCENARIO ...]

Every scenario is one job on hosts in network namespaces (`helpers/cluster/hosts.py`). Prints for each the seconds
from the fault to the first update after it, and the final accuracy, next to that of an undisturbed job.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.cluster.hosts import HEAD, Hosts

ROOT = Path(__file__).parents[1]
RANK = r"^[^ ]*python[^ ]*( -IS [^ ]*)? -m hvd_adam.train"  # of a fork: its client (see helpers.forked_python)
PATIENCE = 120.0  # seconds for whatever is waited for

# Without dropout, so that the result does not depend on the number of ranks; slow, to leave time for faults.
# PAUSE is the seconds of an update, or a file: updates take 0.25 seconds as long as it exists.
MODEL = """
import os, time
import torch

def pause():
    value = os.environ.get("PAUSE", "0.05")
    return 0.25 * os.path.exists(value) if "/" in value else float(value)

class Paced(torch.nn.Sequential):
    def forward(self, images):
        time.sleep(self.training * pause())
        return super().forward(images)

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    first, last = torch.nn.Linear(inputs, 64), torch.nn.Linear(64, num_classes)
    return Paced(torch.nn.Flatten(), first, torch.nn.GELU(), last)
"""

OPTIONS = "--model paced:build --precision fp64 --global-batch-size 64 --log-every 1 --lr 3e-3"


@dataclass
class Job:
    """A running training.

    Attributes:
        hosts: where.
        folder: its own.
        slots: ranks a host.
        python: the program that ranks run.
        recovered: seconds to recover from each fault.
    """

    hosts: Hosts
    folder: Path
    slots: int
    python: str
    recovered: list[float] = field(default_factory=list)

    def use(self, *names: str) -> None:
        """Makes these the hosts of the job, as its discovery script reports them."""
        draft = self.folder / "hosts.draft"
        draft.write_text("".join(f"{name} slots={self.slots}\n" for name in names))
        draft.replace(self.folder / "hosts")

    def start(self, *argv: object) -> None:
        """Starts it on the hosts in use."""
        launcher = ["bash", ROOT / "launch" / "elastic.sh", "--hostfile", self.folder / "hosts", "-i", "eth0"]
        environ = {**os.environ, "PYTHONPATH": f"{self.folder}:{ROOT}", "HVD_ADAM_PYTHON": self.python}
        with (self.folder / "log").open("w") as log:
            self._process = self.hosts.popen(
                HEAD,
                [*launcher, "--", *OPTIONS.split(), "--output-dir", self.folder / "run", *argv],
                env=environ,
                stdout=log,
                stderr=log,
            )

    def events(self, kind: str) -> list[dict]:
        """Returns the events that the run has logged so far."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits.

        Raises:
            AssertionError: the job has ended, or it takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = self._process.poll() is not None
            assert not ended and time.monotonic() < deadline, f"no {what}: see {self.folder / 'log'}"
            time.sleep(0.05)

    def fault(self, what: Callable[[], object], ranks: int) -> None:
        """Causes a fault during training and waits until the job continues with this many ranks."""
        before = len(self.events("step"))
        self.until("updates", lambda: len(self.events("step")) >= before + 15)
        resumed, began = len(self.events("resume")), time.time()
        what()
        self.until("restart", lambda: self._continues(resumed, ranks))
        last = self.events("resume")[-1]
        after = [event["time"] for event in self.events("step") if event["step"] > last["step"]]
        self.recovered.append(min(after) - began)

    def _continues(self, resumed: int, ranks: int) -> bool:
        starts = self.events("resume")[resumed:]
        there = bool(starts) and starts[-1]["world_size"] == ranks
        return there and any(event["step"] > starts[-1]["step"] for event in self.events("step"))

    def end(self) -> dict:
        """Waits for the job to succeed and returns its last event."""
        assert self._process.wait(timeout=600) == 0, f"see {self.folder / 'log'}"
        return self.events("end")[-1]

    def stop(self) -> None:
        """Kills the job if it is running."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def kill_rank(self, host: str) -> None:
        """Sends SIGKILL to the newest rank of a host."""
        self.hosts.run(host, ["pkill", "-KILL", "-n", "-f", RANK], check=True)

    def add(self, host: str) -> None:
        """Adds a host while the job runs."""
        self.hosts.start(host)
        self.use("node1", "node2", host)


def rank_killed(job: Job) -> None:
    """A rank is killed: its host is not used for a while, then used again."""
    job.fault(lambda: job.kill_rank("node2"), job.slots)


def host_killed(job: Job) -> None:
    """A host loses power."""
    job.fault(lambda: job.hosts.kill("node2"), job.slots)


def link_cut(job: Job) -> None:
    """A host is disconnected; its ranks continue to run, and must end themselves."""
    job.fault(lambda: job.hosts.cut("node2"), job.slots)


def host_added(job: Job) -> None:
    """A third host is added."""
    job.fault(lambda: job.add("node3"), 3 * job.slots)


def two_in_a_row(job: Job) -> None:
    """A host is added and loses power; another loses power while the remaining ranks restart."""
    job.fault(lambda: job.add("node3"), 3 * job.slots)

    def both() -> None:
        job.hosts.kill("node3")
        time.sleep(2)
        job.hosts.kill("node2")

    job.fault(both, job.slots)


def rank_returns(job: Job) -> None:
    """A rank is killed, and its host is used again after the time in which a failed host is not."""
    job.fault(lambda: job.kill_rank("node2"), job.slots)
    job.until("return", lambda: job.events("resume")[-1]["world_size"] == 2 * job.slots)


def third_host_lost(job: Job) -> None:
    """A third host is added, loses a rank, is used again, and loses power."""
    job.fault(lambda: job.add("node3"), 3 * job.slots)
    job.fault(lambda: job.kill_rank("node3"), 2 * job.slots)
    job.until("return", lambda: job.events("resume")[-1]["world_size"] == 3 * job.slots)
    job.fault(lambda: job.hosts.kill("node3"), 2 * job.slots)


_ALL = (rank_killed, host_killed, link_cut, host_added, two_in_a_row, rank_returns, third_host_lost)
SCENARIOS = {scenario.__name__: scenario for scenario in _ALL}


def run(
    scenario: Callable[[Job], None] | None, folder: Path, slots: int, *argv: object, python: str = sys.executable
) -> tuple[Job, dict]:
    """Runs a job on two hosts with a scenario to its end; returns the job and its last event."""
    folder.mkdir(parents=True)
    (folder / "paced.py").write_text(MODEL)
    with Hosts(folder / "namespaces", ["node1", "node2"], spare=["node3"]) as hosts:
        job = Job(hosts, folder, slots, python)
        job.use("node1", "node2")
        job.start(*argv)
        try:
            if scenario is not None:
                scenario(job)
            return job, job.end()
        finally:
            job.stop()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], help="all by default")
    parser.add_argument("--slots", type=int, default=2, help="ranks a host")
    parser.add_argument("--train", default="", help="more arguments of the training")
    given = parser.parse_args()
    argv = given.train.split()
    with tempfile.TemporaryDirectory(prefix="hvd_adam-recovery-") as name:
        expected = run(None, Path(name, "undisturbed"), given.slots, *argv)[1]["test_accuracy"]
        for scenario in given.scenarios or SCENARIOS:
            job, end = run(SCENARIOS[scenario], Path(name, scenario), given.slots, *argv)
            times = ", ".join(f"{seconds:.1f} s" for seconds in job.recovered)
            accuracy = f"accuracy {end['test_accuracy']:.4f}, {expected:.4f} undisturbed"
            print(f"{scenario}: continues after {times}; {accuracy}", flush=True)


if __name__ == "__main__":
    main()
