"""launch/slurm.sh and slurm_container.sh in jobs of a real Slurm, on two nodes made of namespaces.

Hazards: ranks do not connect; another launcher than the requested one is used; the time limit, another job, the
administrator or a failed node ends a job permanently; a job is requeued twice, or does not resume; a cancelled
job restarts; a task of an array requeues the whole array, or is not requeued; srun loses a rank's exit code
among those of the ranks that it kills, or lets ranks wait for ever for one that failed; tasks of an array write
into one folder.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.cluster.hosts import Hosts
from helpers.cluster.slurm import Slurm, skip_reason
from helpers.forked_python import forked_python
from helpers.training_runs import ROOT, checkpoint, events, train
from recovery import MODEL

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=f"no Slurm for tests: {skip_reason()}")

RANKS = 4
OPTIONS = "--model paced:build --precision fp64 --log-every 1 --checkpoint-every 10".split()
SCRIPT_WITH_GUARD = """import torch, horovod.torch as hvd
from hvd_adam import guard, init
cluster = init()
with guard(cluster):
    for update in range(9):
        if update == 5 and cluster.rank == 2:
            raise ArithmeticError("the first cause")
        hvd.allreduce(torch.zeros(1), name="loss")
"""
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
ONE_EACH = ("--nodes=2", "--ntasks-per-node=1")


class Cluster:
    """A Slurm with two nodes, and the logs of its jobs."""

    def __init__(self, slurm, folder):
        self.slurm, self.folder = slurm, folder

    def submit(self, options, script, *arguments, **environ):
        environ = {"HVD_ADAM_PYTHON": sys.executable, "PYTHONPATH": f"{self.folder}:{ROOT}", **environ}
        options = [*options, f"--output={self.folder}/%j.log"]
        script = script.split()
        command = [*options, f"launch/{script[0]}", *script[1:], *arguments]
        return self.slurm.submit(*command, environ=environ, folder=ROOT)

    def log(self, job):
        return (self.folder / f"{job}.log").read_text()

    def code(self, job):
        return int(self.slurm.facts(job)["ExitCode"].partition(":")[0])

    def wait_for_updates(self, run, updates, resumes=0):
        """Waits until a run has resumed `resumes` times and made `updates` more; returns the updates in total."""
        deadline = time.monotonic() + 250
        while True:
            made, resumed = [], [0]
            if (run / "metrics.jsonl").exists():
                made, resumed = ([event["step"] for event in events(run, kind)] for kind in ("step", "resume"))
                resumed = [0, *resumed]
            if len(resumed) > resumes and len(made) >= resumed[resumes] + updates:
                return len(made)
            waited = f"after {resumes} resumes no {updates} updates in {run}: {len(made)} updates, {resumed=}"
            assert time.monotonic() < deadline, f"{waited}\n{self.slurm.run('squeue', '-l')}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "paced.py").write_text(MODEL)
    with Hosts(folder / "hosts", ["node1", "node2"]) as hosts, Slurm(hosts, folder / "slurm") as slurm:
        yield Cluster(slurm, folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of an uninterrupted training on this machine: 4 ranks, 2 epochs."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "paced.py").write_text(MODEL)
    environ = {"PYTHONPATH": f"{folder}:{ROOT}", "PAUSE": "0"}
    done = train(*OPTIONS, "--epochs", 2, ranks=RANKS, folder=folder / "run", env=environ)
    assert done.returncode == 0, done.stderr
    return checkpoint(folder / "run")["model"]


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory):
    """A job with a time limit of a minute, on one of the four processors of each node, and its run folder.

    It starts before the first test and runs next to those of other jobs.
    """
    folder = tmp_path_factory.mktemp("limited") / "run"
    # Slurm checks time limits every 30 seconds and sends the signal up to 30 seconds earlier.
    options = [*ONE_EACH, "--time=1", "--signal=B:USR1@20"]
    arguments = ["--", *OPTIONS, "--epochs", 9, "--output-dir", folder]
    return cluster.submit(options, "slurm.sh", *arguments, PAUSE="0.25"), folder


def require_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("launcher", "reported"),
    [("srun", "srun --mpi=pmix"), ("mpirun", "mpirun"), ("horovodrun", "horovodrun --gloo")],
)
def test_each_launcher_trains_on_two_nodes_like_four_ranks_on_one(
    launcher, reported, cluster, limited, expected, tmp_path
):
    options = [] if launcher == "srun" else ["--launcher", launcher, "-i", "eth0"]
    arguments = ["--", *OPTIONS, "--epochs", 2, "--output-dir", tmp_path / "run"]
    # Forks of one process that loads PMIx crash under srun now and then.
    python = sys.executable if launcher == "srun" else forked_python()
    job = cluster.submit(TWO_BY_TWO, "slurm.sh", *options, *arguments, PAUSE="0", HVD_ADAM_PYTHON=python)
    assert cluster.slurm.wait_for_state(job, "COMPLETED") == "COMPLETED", cluster.log(job)
    assert f"Starting 4 ranks on node[1-2] by {reported}, start 1\n" in cluster.log(job)
    assert events(tmp_path / "run", "end")[0]["world_size"] == RANKS
    # 22 updates in float64; Gloo may add in another order than MPI on one host.
    require_same(checkpoint(tmp_path / "run")["model"], expected, 1e-12)


def test_doctor_passes_in_a_job_that_srun_started(cluster, tmp_path):
    arguments = ["--module", "hvd_adam.doctor", "--", "--json", "--seconds", 2, "--output-dir", tmp_path]
    job = cluster.submit(TWO_BY_TWO, "slurm.sh", *arguments)
    assert cluster.slurm.wait_for_state(job, "COMPLETED") == "COMPLETED", cluster.log(job)
    found = json.loads(cluster.log(job).splitlines()[-1])
    assert sorted(rank["host"] for rank in found["ranks"]) == ["node1", "node1", "node2", "node2"]
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["launcher"]["found"].startswith("srun: 4 ranks")
    # Not all of them: the measurements may warn on a busy machine.
    for name in ("launcher", "network", "Horovod starts", "versions", "MPI"):
        assert checks[name]["status"] == "ok", checks[name]


def test_an_exception_in_a_script_ends_ranks_that_srun_does_not_end(cluster, tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT_WITH_GUARD)
    srun = f"srun --mpi=pmix --kill-on-bad-exit=0 {sys.executable} {tmp_path}/mine.py"
    options = [*TWO_BY_TWO, f"--output={cluster.folder}/%j.log", f"--wrap={srun}"]
    job = cluster.slurm.submit(*options, environ={"PYTHONPATH": str(ROOT)}, folder=ROOT)
    assert cluster.slurm.wait_for_state(job, "FAILED") == "FAILED"
    log = cluster.log(job)
    assert cluster.code(job) == 1, log
    assert log.count("Traceback") == 1, log
    assert "mine.py:7: rank 2 on node2 failed: ArithmeticError('the first cause')\n" in log
    assert "HorovodInternalError" not in log


def test_wrong_argument_exits_with_2_and_tasks_of_an_array_get_their_own_seeds(cluster, tmp_path):
    wrong = cluster.submit(TWO_BY_TWO, "slurm.sh", "--", "--lr", "-1")
    arguments = ["--", "--max-steps", 2, "--model", "mlp", "--output-dir", tmp_path]
    array = cluster.submit(["--array=3,5"], "slurm.sh", *arguments)
    assert cluster.slurm.wait_for_state(wrong, "FAILED") == "FAILED"
    assert cluster.code(wrong) == 2
    lines = cluster.log(wrong).splitlines()
    assert lines[1:] == ["hvd_adam.train: error: --lr is -1.0: it must be 0 or above"]
    for task in (3, 5):
        cluster.slurm.wait_for_state(f"{array}_{task}", "COMPLETED")
        state = torch.load(checkpoint_file(tmp_path / str(task)), weights_only=True)
        assert state["config"]["seed"] == task


def test_tasks_of_an_array_resume_in_folders_and_with_seeds_of_their_own(cluster, tmp_path):
    # A time that has passed at the first update: the first start makes this update, the second one ends the run.
    arguments = ["--model", "mlp", "--max-steps", 1, "--max-time", 1]
    printed = subprocess.run(
        [sys.executable, "-m", "hvd_adam.train", *map(str, arguments), "--print_config"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "run.yaml").write_text(printed.stdout)  # with a seed of 0 and no output folder
    options = ["--output-dir", tmp_path, "--config", tmp_path / "run.yaml"]
    # Not by srun: forks of one process that loads PMIx crash there now and then.
    launcher = ["--launcher", "mpirun"]
    array = cluster.submit(["--array=1-3"], "slurm.sh", *launcher, "--", *options, HVD_ADAM_PYTHON=forked_python())
    for task in (1, 2, 3):
        cluster.slurm.wait_for_state(f"{array}_{task}", "COMPLETED")
        facts = cluster.slurm.facts(f"{array}_{task}")
        log = cluster.log(facts["JobId"])
        assert "Requeueing the job: the training has saved a checkpoint\n" in log
        assert int(facts["Restarts"]) == 1, log
        run = tmp_path / str(task)
        assert [event["step"] for event in events(run, "step")] == [1]
        assert [event["step"] for event in events(run, "resume")] == [1]
        assert checkpoint(run)["config"]["seed"] == task


def test_heterogeneous_job_is_requeued_as_a_whole_and_trains_on_its_first_component(cluster, tmp_path):
    arguments = ["--model", "mlp", "--max-steps", 1, "--max-time", 1, "--output-dir", tmp_path / "run"]
    job = cluster.submit(["--ntasks=1", ":", "--ntasks=1"], "slurm.sh", "--", *arguments)
    cluster.slurm.wait_for_state(f"{job}+0", "COMPLETED")
    log = cluster.log(job)
    assert "This job has 2 components, and ranks start on the first one only\n" in log
    assert log.count("Requeueing the job: the training has saved a checkpoint\n") == 1
    assert int(cluster.slurm.facts(f"{job}+0")["Restarts"]) == 1, log
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [1]


def checkpoint_file(run):
    return run / "checkpoints" / "step-00000002" / "state.pt"


# A stub of Apptainer that runs the command without a container.
APPTAINER = """#!/bin/bash
echo "apptainer $*"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""


def test_containers_get_the_repository_the_mounts_and_their_own_python(cluster, tmp_path):
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    path = subprocess.run(["bash", "-c", "echo $PATH"], capture_output=True, text=True, check=True).stdout.strip()
    environ = {"PATH": f"{tmp_path}:{path}", "HVD_ADAM_CONTAINER_PYTHON": sys.executable}
    arguments = ["--mount", tmp_path, "--", "--max-steps", 2, "--model", "mlp", "--output-dir", tmp_path / "run"]
    job = cluster.submit(ONE_EACH, "slurm_container.sh image.sif", *arguments, **environ)
    lost = cluster.submit([], "slurm_container.sh image.sif", "--mount", "/none", **environ)
    assert cluster.slurm.wait_for_state(job, "COMPLETED") == "COMPLETED", cluster.log(job)
    shown = (
        f"apptainer exec --nv --pwd {ROOT} --bind {ROOT} --bind {tmp_path} image.sif {sys.executable} -m hvd_adam"
    )
    assert cluster.log(job).count(shown) == 2
    assert events(tmp_path / "run", "end")[0]["world_size"] == 2
    assert cluster.slurm.wait_for_state(lost, "FAILED") == "FAILED"
    assert cluster.log(lost).endswith("--mount /none: no such folder\n")


def test_a_cancelled_job_does_not_start_again(cluster, tmp_path):
    arguments = ["--", *OPTIONS, "--epochs", 9, "--output-dir", tmp_path / "run"]
    job = cluster.submit(["--nodes=1", "--ntasks-per-node=1"], "slurm.sh", *arguments, PAUSE="0.25")
    cluster.wait_for_updates(tmp_path / "run", 3)
    cluster.slurm.run("scancel", job)
    assert cluster.slurm.wait_for_state(job, "CANCELLED") == "CANCELLED"
    assert int(cluster.slurm.facts(job)["Restarts"]) == 0


@pytest.mark.timeout(600)  # two starts, and updates that wait for each other on a busy machine
def test_job_resumes_after_its_time_limit(cluster, limited):
    job, folder = limited
    cluster.slurm.wait_for_state(job, "COMPLETED", seconds=500)
    log = cluster.log(job)
    assert "Requeueing the job: the training has saved a checkpoint\n" in log and "start 2\n" in log
    assert [event["step"] for event in events(folder, "step")] == list(range(1, 199))


# Last: it takes the nodes from other jobs.
def test_job_resumes_exactly_after_requeue_preemption_and_node_failure(cluster, tmp_path):
    slurm, run, pause = cluster.slurm, tmp_path / "run", tmp_path / "pause"
    pause.touch()  # so that no fault comes after the last of the 198 updates, on a busy machine either
    arguments = ["--", *OPTIONS, "--epochs", 9, "--output-dir"]
    job = cluster.submit(ONE_EACH, "slurm.sh", *arguments, run, PAUSE=pause)
    made = [cluster.wait_for_updates(run, 3)]
    slurm.run("scontrol", "requeue", job)

    made.append(cluster.wait_for_updates(run, 9, resumes=1))
    urgent = slurm.submit("-p", "high", "--nodes=2", "--exclusive", "--wrap", "true", "--output=/dev/null")
    slurm.wait_for_state(urgent, "COMPLETED")

    # At least one checkpoint, every 10 updates, after the one from which it resumed.
    made.append(cluster.wait_for_updates(run, 13, resumes=2) - 10)
    slurm.hosts.kill("node2")
    pause.unlink()
    deadline = time.monotonic() + 250
    while slurm.state(job) == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.hosts.start("node2")
    slurm.start("node2")
    slurm.wait_for_state(job, "COMPLETED")

    log = cluster.log(job)
    assert [f"start {number}\n" in log for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    resumed = [event["step"] for event in events(run, "resume")]
    assert resumed == sorted(resumed) and resumed[0] >= 3 and resumed[1] >= 12 and resumed[2] >= 20
    assert all(step >= least for step, least in zip(resumed, made, strict=True)), (resumed, made)
    assert [event["step"] for event in events(run, "step")] == list(range(1, 199))
    environ = {"PYTHONPATH": f"{cluster.folder}:{ROOT}", "PAUSE": "0"}
    done = train(*OPTIONS, "--epochs", 9, ranks=2, folder=tmp_path / "uninterrupted", env=environ)
    assert done.returncode == 0
    require_same(checkpoint(run)["model"], checkpoint(tmp_path / "uninterrupted")["model"], 1e-12)
