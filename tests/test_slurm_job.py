"""launch/lib/slurm_job.sh and slurm_allocation.sh, with stubs of Slurm's commands; test_slurm.py has a real one.

Hazards: a command of Slurm gets the number of a job where Slurm means its whole array, or all components of a
heterogeneous job; a job ends after exit code 75 without a line that says why it is not requeued; one rank starts
where Slurm has allocated several tasks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SRUN = """#!/bin/bash
if [[ $1 == --mpi=list ]]; then echo pmix; exit; fi
echo "srun starts ${SLURM_NTASKS:-no} tasks"
[[ $CODE != wait ]] || { trap 'exit 75' USR1; touch "$STUBS/started"; while :; do sleep 0.05; done; }
exit "$CODE"
"""
# Like Slurm: the number of an array or of a heterogeneous job stands for all of its parts.
SCONTROL = """#!/bin/bash
echo "$*" >>"$STUBS/calls"
case $* in
  "show hostnames "*) printf 'node1\\nnode2\\n' ;;
  "show job --oneliner 12") printf 'JobId=%s JobState=PENDING x\\nJobId=12 JobState=RUNNING x\\n' 13 ;;
  "show job --oneliner "*) [[ -n ${STATE:-} ]] && echo "JobId=12 JobState=$STATE Reason=None" ;;
  requeue*) exit "${REQUEUE:-0}" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    unwanted = ("SLURM_", "HOROVOD_", "OMPI_", "PMIX_", "HVD_ADAM_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]"}
    job |= {"PYTHONPATH": str(ROOT), "HVD_ADAM_PYTHON": sys.executable, "STUBS": str(tmp_path), "CODE": "0"}
    return clean | job | {"PATH": f"{tmp_path}:{clean['PATH']}"}


def run(*command, **environ):
    command = ["bash", str(ROOT / "launch" / command[0]), *command[1:]]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250, check=False)


def calls(folder, first):
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith(first)]


@pytest.mark.parametrize(
    ("job", "shown", "requeued"),
    [
        ({"SLURM_JOB_ID": "7"}, "7", "7"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3", "12_3"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0", "12_0"),
        ({"SLURM_HET_SIZE": "2"}, "12+0", "12"),
    ],
    ids=["job", "last task of an array", "other task of an array", "heterogeneous job"],
)
def test_exit_code_75_requeues_this_job_or_task_only(job, shown, requeued, slurm, tmp_path):
    done = run("slurm.sh", **slurm | job | {"SLURM_NTASKS": "2", "CODE": "75", "STATE": "RUNNING"})
    assert done.returncode == 75
    assert "Requeueing the job: the training has saved a checkpoint\n" in done.stdout
    assert calls(tmp_path, "show job") == [f"show job --oneliner {shown}"]
    assert calls(tmp_path, "requeue") == [f"requeue {requeued}"]


@pytest.mark.parametrize(
    ("state", "requeue", "message"),
    [
        ("CANCELLED", "0", "Not requeueing the job, because it was cancelled"),
        (
            "COMPLETING",
            "0",
            "Not requeueing the job, because Slurm does so or has ended it: its state is COMPLETING",
        ),
        ("", "0", "Requeueing the job: "),  # scontrol has failed once
        ("RUNNING", "1", "Requeueing failed: submit the job again"),
    ],
)
def test_exit_code_75_never_ends_the_job_silently(state, requeue, message, slurm):
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "2", "CODE": "75"}
    done = run("slurm.sh", **slurm | array, STATE=state, REQUEUE=requeue)
    assert done.returncode == 75 and message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tasks", "ranks"),
    [
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, 8),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, 5),
        ({"SLURM_NTASKS_PER_NODE": "3", "SLURM_JOB_NUM_NODES": "2"}, 6),
        ({"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "4(x2)"}, 2),
    ],
    ids=str,
)
def test_number_of_ranks_is_that_of_the_allocated_tasks(tasks, ranks, slurm):
    done = run("slurm.sh", **slurm | tasks)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"Starting {ranks} ranks on node[1-2] by srun --mpi=pmix, start 1\nsrun starts {ranks} tasks\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [["--module", "mine"], ["--", "--device", "cpu"], ["--", "--dev=cpu", "--epochs", "2"]],
    ids=" ".join,
)
def test_a_partition_with_gpus_runs_programs_of_ones_own_and_trainings_on_cpus(arguments, slurm, tmp_path):
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho gpu:a100:4\n")
    (tmp_path / "mine.py").touch()
    job = slurm | {"SLURM_NTASKS": "2", "SLURM_JOB_PARTITION": "p", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = run("slurm.sh", *arguments, **job)
    assert (done.returncode, done.stderr) == (0, "")
    assert "has GPUs, but this job has none" in run("slurm.sh", "--", "--epochs", "2", **job).stderr


def test_a_module_that_does_not_exist_is_refused_before_ranks_start(slurm):
    done = run("slurm.sh", "--module", "none_of_mine", **slurm, SLURM_NTASKS="2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "finds no module none_of_mine to run" in done.stderr


@pytest.mark.parametrize(
    "task", [{}, {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}], ids=["job", "array"]
)
@pytest.mark.parametrize(
    "arguments", [["--output-dir", ""], ["--ou="], ["--epochs", "2", "--output-dir"]], ids=str
)
def test_an_empty_output_folder_is_refused(arguments, task, slurm):
    done = run("slurm.sh", "--", *arguments, **slurm | task | {"SLURM_NTASKS": "2"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "slurm.sh: --output-dir has an empty value: name a folder, or leave it out\n"


def test_one_rank_by_default_is_reported(slurm):
    done = run("slurm.sh", **slurm)
    assert "Starting 1 ranks" in done.stdout and "use sbatch --ntasks-per-node=N" in done.stderr
    component = run("slurm.sh", **slurm, SLURM_NTASKS="2", SLURM_HET_SIZE="3")
    assert "This job has 3 components, and ranks start on the first one only" in component.stderr


def test_mpirun_starts_the_tasks_of_the_allocation(slurm):
    done = run("mpirun.sh", "--dry-run", **slurm, SLURM_TASKS_PER_NODE="4(x2)")
    assert " mpirun -np 8 " in done.stdout and done.stderr == ""


def test_one_rank_without_np_hosts_and_gpus_is_reported(slurm, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    del slurm["SLURM_JOB_ID"]
    for script in ("mpirun.sh", "horovodrun.sh"):
        done = run(script, "--dry-run", **slurm)
        assert " -np 1 " in done.stdout
        assert done.stderr == f"{script}: starting one rank, because this machine has no GPU; use -np N for more\n"


@pytest.mark.parametrize(
    ("tasks", "hosts"),
    [
        ({"SLURM_TASKS_PER_NODE": "2,1"}, ["node1:2", "node2:1"]),
        ({"SLURM_NTASKS_PER_NODE": "3", "SLURM_JOB_NUM_NODES": "2"}, ["node1:3", "node2:3"]),
        (
            {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "2"},
            ["node1:4", "node2:4"],
        ),
    ],
    ids=str,
)
def test_elastic_hosts_have_the_tasks_or_the_gpus_of_the_allocation(tasks, hosts, slurm, tmp_path):
    (tmp_path / "timeout").write_text("#!/bin/sh\n")  # every host is reachable
    (tmp_path / "timeout").chmod(0o755)
    done = run("discover_hosts.sh", "slurm", **slurm | tasks)
    assert sorted(done.stdout.splitlines()) == hosts and done.stderr == ""


@pytest.mark.parametrize("group", [False, True], ids=["to the script", "to the process group"])
def test_ctrl_c_in_salloc_saves_and_ends_the_job_with_130_without_a_requeue(group, slurm, tmp_path):
    command = ["bash", str(ROOT / "launch" / "slurm.sh")]
    environ = slurm | {"SLURM_NTASKS": "2", "CODE": "wait", "STATE": "RUNNING"}
    running = subprocess.Popen(
        ["env", "--default-signal=INT", *command], env=environ, start_new_session=True, stdout=subprocess.PIPE
    )
    while not (tmp_path / "started").exists():
        assert running.poll() is None
        time.sleep(0.02)
    (os.killpg if group else os.kill)(running.pid, signal.SIGINT)
    output = running.communicate(timeout=250)[0]
    assert running.returncode == 130 and b"equeue" not in output
    assert not (tmp_path / "calls").exists()
