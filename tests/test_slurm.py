"""launch/slurm.sh and slurm_container.sh in jobs of a real Slurm, on two nodes out of namespaces.

Hazards: ranks that do not find each other; a launcher that was asked for and another taken; a job that its time
limit, somebody else's job, the administrator or a dead node ends for good, or that is queued anew twice, or begins
anew; one that was cancelled and comes back; a rank's exit code that srun loses among those it kills; tasks of an
array that write into one folder.
"""

import json
import subprocess
import sys
import time

import pytest
import torch
from helpers.cluster.hosts import Hosts
from helpers.cluster.slurm import Slurm, skip_reason
from helpers.training_runs import ROOT, checkpoint, events, train
from recovery import MODEL

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=f"no Slurm of our own: {skip_reason()}")

RANKS = 4
ALIKE = "--model paced:build --precision fp64 --log-every 1 --checkpoint-every 10".split()
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


class Cluster:
    """Two nodes of a Slurm, and what jobs leave."""

    def __init__(self, slurm, folder):
        self.slurm, self.folder = slurm, folder

    def submit(self, options, script, *arguments, **environ):
        environ = {"HVD_ADAM_PYTHON": sys.executable, "PYTHONPATH": f"{self.folder}:{ROOT}", **environ}
        options = [*options, f"--output={self.folder}/%j.log"]
        script = script.split()
        command = [*options, f"launch/{script[0]}", *script[1:], *arguments]
        return self.slurm.submit(*command, environ=environ, folder=ROOT)

    def said(self, job):
        return (self.folder / f"{job}.log").read_text()

    def code(self, job):
        return int(self.slurm.facts(job)["ExitCode"].partition(":")[0])

    def until_trained(self, run, updates):
        """Waits until a run has made so many updates in all."""
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() or len(events(run, "step")) < updates:
            assert time.monotonic() < deadline, f"no {updates} updates in {run}"
            time.sleep(0.1)

    def until_started_again(self, job, restarts):
        deadline = time.monotonic() + 100
        while int(self.slurm.facts(job)["Restarts"]) < restarts or self.slurm.state(job) != "RUNNING":
            assert time.monotonic() < deadline, self.slurm.facts(job)
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "paced.py").write_text(MODEL)
    with Hosts(folder / "hosts", ["node1", "node2"]) as hosts, Slurm(hosts, folder / "slurm") as slurm:
        yield Cluster(slurm, folder)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The checkpoint that 4 ranks leave on this machine after 2 epochs, undisturbed."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "paced.py").write_text(MODEL)
    environ = {"PYTHONPATH": f"{folder}:{ROOT}", "PAUSE": "0"}
    done = train(*ALIKE, "--epochs", 2, ranks=RANKS, folder=folder / "run", env=environ)
    assert done.returncode == 0, done.stderr
    return checkpoint(folder / "run")["model"]


def require_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("launcher", "said"), [("srun", "srun --mpi=pmix"), ("mpirun", "mpirun"), ("horovodrun", "horovodrun --gloo")]
)
def test_each_launcher_trains_on_two_nodes_as_four_ranks_do_on_one(launcher, said, cluster, here, tmp_path):
    options = [] if launcher == "srun" else ["--launcher", launcher, "-i", "eth0"]
    arguments = ["--", *ALIKE, "--epochs", 2, "--output-dir", tmp_path / "run"]
    job = cluster.submit(TWO_BY_TWO, "slurm.sh", *options, *arguments, PAUSE="0")
    assert cluster.slurm.until(job, "COMPLETED") == "COMPLETED", cluster.said(job)
    assert f"Starting 4 ranks on node[1-2] by {said}, start 1\n" in cluster.said(job)
    assert events(tmp_path / "run", "end")[0]["world_size"] == RANKS
    # 22 updates of float64, whose sums Gloo may add in another order than MPI on one host.
    require_same(checkpoint(tmp_path / "run")["model"], here, 1e-12)


def test_the_doctor_finds_a_job_well_that_srun_has_started(cluster, tmp_path):
    arguments = ["--module", "hvd_adam.doctor", "--", "--json", "--seconds", 2, "--output-dir", tmp_path]
    job = cluster.submit(TWO_BY_TWO, "slurm.sh", *arguments)
    assert cluster.slurm.until(job, "COMPLETED") == "COMPLETED", cluster.said(job)
    found = json.loads(cluster.said(job).splitlines()[-1])
    assert sorted(rank["host"] for rank in found["ranks"]) == ["node1", "node1", "node2", "node2"]
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["launcher"]["found"].startswith("srun: 4 ranks")
    # Not all of them: the measurements may warn on a machine that is busy.
    for name in ("launcher", "network", "Horovod starts", "versions", "MPI"):
        assert checks[name]["status"] == "ok", checks[name]


def test_after_a_requeue_a_preemption_and_a_dead_node_it_ends_as_if_nothing_had_happened(cluster, tmp_path):
    slurm, run = cluster.slurm, tmp_path / "run"
    arguments = ["--", *ALIKE, "--epochs", 9, "--output-dir"]
    job = cluster.submit(TWO_BY_TWO, "slurm.sh", *arguments, run, PAUSE="0.25")
    cluster.until_trained(run, 3)
    slurm.ask("scontrol", "requeue", job)
    cluster.until_started_again(job, 1)

    cluster.until_trained(run, 20)
    urgent = slurm.submit("-p", "high", "--nodes=2", "--exclusive", "--wrap", "true", "--output=/dev/null")
    slurm.until(urgent, "COMPLETED")
    cluster.until_started_again(job, 2)

    cluster.until_trained(run, 40)
    slurm.hosts.kill("node2")
    deadline = time.monotonic() + 100
    while slurm.state(job) == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.hosts.start("node2")
    slurm.start("node2")
    slurm.until(job, "COMPLETED")

    said = cluster.said(job)
    assert [f"start {number}\n" in said for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    resumed = [event["step"] for event in events(run, "resume")]
    assert resumed == sorted(resumed) and resumed[0] >= 3 and resumed[1] >= 20 and resumed[2] >= 30
    assert [event["step"] for event in events(run, "step")] == list(range(1, 100))
    alone = {"PYTHONPATH": f"{cluster.folder}:{ROOT}", "PAUSE": "0"}
    assert train(*ALIKE, "--epochs", 9, ranks=RANKS, folder=tmp_path / "alone", env=alone).returncode == 0
    require_same(checkpoint(run)["model"], checkpoint(tmp_path / "alone")["model"], 1e-12)


def test_before_its_time_limit_it_saves_itself_and_goes_on_and_a_cancelled_job_does_not(cluster, tmp_path):
    slurm = cluster.slurm
    arguments = ["--", *ALIKE, "--output-dir"]
    # Slurm looks at time limits every half minute, and sends the signal up to so much earlier.
    limited = ["--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR1@20"]
    job = cluster.submit(limited, "slurm.sh", *arguments, tmp_path / "run", "--epochs", 9, PAUSE="0.25")
    alone = ["--nodes=1", "--ntasks-per-node=1"]
    other = cluster.submit(alone, "slurm.sh", *arguments, tmp_path / "other", "--epochs", 9, PAUSE="0.25")
    cluster.until_trained(tmp_path / "other", 3)
    slurm.ask("scancel", other)
    slurm.until(job, "COMPLETED")
    said = cluster.said(job)
    assert "The job is queued anew: the training has saved itself\n" in said and "start 2\n" in said
    assert [event["step"] for event in events(tmp_path / "run", "step")] == list(range(1, 199))
    assert slurm.state(other) == "CANCELLED" and int(slurm.facts(other)["Restarts"]) == 0


def test_a_wrong_argument_gets_its_line_and_code_2_and_tasks_of_an_array_seeds_of_their_own(cluster, tmp_path):
    wrong = cluster.submit(TWO_BY_TWO, "slurm.sh", "--", "--lr", "-1")
    arguments = ["--", "--max-steps", 2, "--model", "mlp", "--output-dir", tmp_path]
    array = cluster.submit(["--array=3,5"], "slurm.sh", *arguments)
    assert cluster.slurm.until(wrong, "FAILED") == "FAILED"
    assert cluster.code(wrong) == 2
    lines = cluster.said(wrong).splitlines()
    assert lines[1:] == ["hvd_adam.train: error: --lr is -1.0: it must be 0 or above"]
    for task in (3, 5):
        cluster.slurm.until(f"{array}_{task}", "COMPLETED")
        state = torch.load(checkpoint_file(tmp_path / str(task)), weights_only=True)
        assert state["config"]["seed"] == task


def checkpoint_file(run):
    return run / "checkpoints" / "step-00000002" / "state.pt"


# There is no Apptainer here: this stands in for it, and runs the command outside of any container.
APPTAINER = """#!/bin/bash
echo "apptainer $*"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""


def test_containers_get_the_repository_and_what_is_mounted_and_their_own_python(cluster, tmp_path):
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    path = subprocess.run(["bash", "-c", "echo $PATH"], capture_output=True, text=True, check=True).stdout.strip()
    environ = {"PATH": f"{tmp_path}:{path}", "HVD_ADAM_CONTAINER_PYTHON": sys.executable}
    arguments = ["--mount", tmp_path, "--", "--max-steps", 2, "--model", "mlp", "--output-dir", tmp_path / "run"]
    job = cluster.submit(TWO_BY_TWO, "slurm_container.sh image.sif", *arguments, **environ)
    lost = cluster.submit([], "slurm_container.sh image.sif", "--mount", "/none", **environ)
    assert cluster.slurm.until(job, "COMPLETED") == "COMPLETED", cluster.said(job)
    shown = (
        f"apptainer exec --nv --pwd {ROOT} --bind {ROOT} --bind {tmp_path} image.sif {sys.executable} -m hvd_adam"
    )
    assert cluster.said(job).count(shown) == RANKS
    assert events(tmp_path / "run", "end")[0]["world_size"] == RANKS
    assert cluster.slurm.until(lost, "FAILED") == "FAILED"
    assert cluster.said(lost).endswith("--mount /none: no such folder\n")
