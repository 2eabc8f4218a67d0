"""`init`: launcher, rank, world size and device, and errors that would make N processes train N separate models.

Hazards: variables of several launchers at once; processes that each see a world of size 1; a Horovod that is
missing, built against another PyTorch, or does not load; ranks with different arguments, or of which one fails;
ranks that share a GPU or use all cores; more ranks than cores without a word.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.forked_python import forked_python
from helpers.on_ranks import launch, on_ranks

from hvd_adam import init
from hvd_adam.distributed import context as cluster_module
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.launch_env import LaunchInfo, describe_unused_tasks, detect_launcher
from hvd_adam.distributed.placement import (
    RankPlacement,
    assign_gpus,
    batch_policy,
    describe_oversubscription,
)
from hvd_adam.errors import CollectiveError, UserError

ROOT = Path(__file__).parent.parent
STORE = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "1"}
DISTRIBUTE = (
    "import torch, hvd_adam; m = torch.nn.Linear(1, 1); hvd_adam.distribute(hvd_adam.Adam(m.parameters()), m)"
)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, LaunchInfo("none", 0, 1)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}, LaunchInfo("horovodrun", 1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, LaunchInfo("mpirun", 2, 3)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, LaunchInfo("srun", 1, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, LaunchInfo("mpiexec", 0, 2)),
        ({"RANK": "0", "WORLD_SIZE": "8"}, LaunchInfo("torchrun", 0, 8)),
        # sbatch's own shell: tasks are allocated, but no step runs
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, LaunchInfo("none", 0, 1)),
        # mpirun inside a Slurm allocation
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
            },
            LaunchInfo("mpirun", 3, 4),
        ),
        # an empty variable counts as unset
        ({"RANK": "", "WORLD_SIZE": ""}, LaunchInfo("none", 0, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "", "RANK": "1", "WORLD_SIZE": "2"},
            LaunchInfo("torchrun", 1, 2),
        ),
    ],
)
def test_the_launcher_is_detected_from_its_variables(environ, expected):
    assert detect_launcher(environ) == expected


@pytest.mark.parametrize("value", ["x", "-1", "1.5"])
def test_a_world_size_that_is_no_whole_number_is_named(value):
    message = f"WORLD_SIZE is {value!r} in the environment: it must be a whole number"
    with pytest.raises(UserError, match=re.escape(message)):
        detect_launcher({"RANK": "0", "WORLD_SIZE": value})


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("1", "1"), ("0", "0"), ("7", "2")])
@pytest.mark.parametrize("names", [("HOROVOD_RANK", "HOROVOD_SIZE"), ("PMI_RANK", "PMI_SIZE")], ids="-".join)
def test_a_rank_that_is_not_below_the_world_size_is_named(names, rank, size):
    message = f"{names[0]} is {rank!r} and {names[1]} is {size!r} in the environment: the rank must be below"
    with pytest.raises(UserError, match=re.escape(message)):
        detect_launcher(dict(zip(names, (rank, size), strict=True)))


@pytest.mark.parametrize(("rank", "size", "named"), [("0", "x", "WORLD_SIZE is 'x'"), ("2", "2", "RANK is '2'")])
def test_a_command_says_so_in_one_line(rank, size, named):
    command = [forked_python(), "-m", "hvd_adam.train", "--epochs", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank, "WORLD_SIZE": size}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert done.stderr.startswith(f"hvd_adam.train: error: {named}") and done.stderr.count("\n") == 1


def run(code, environ=None, python=None):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})}
    command = [
        *(python or [forked_python()]),
        "-c",
        f"from hvd_adam.errors import UserError\ntry:\n {code}\nexcept UserError as e: print(e)",
    ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "torchrun started 2 processes, but Horovod sees 1: torchrun does not start Horovod; use "
            "`horovodrun -np N python -m hvd_adam.train` instead",
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "srun started 2 processes, but Horovod sees 1: start the ranks with `srun --mpi=pmix` "
            "(`srun --mpi=list` shows what this Slurm has) or with mpirun inside the allocation",
        ),
    ],
)
def test_processes_that_horovod_does_not_see_are_refused_with_the_remedy(environ, message):
    assert run("import hvd_adam; hvd_adam.init()", environ) == message


@pytest.fixture
def packages(tmp_path):
    """A folder of links to all installed packages except Horovod."""
    folder = tmp_path / "packages"
    folder.mkdir()
    without = ("horovod", "hvd_adam", "__editable__", "distutils-precedence")
    # A virtual environment may add to the packages of the system; its own come first.
    for packages in map(Path, sys.path):
        if packages.name in ("site-packages", "dist-packages"):
            for entry in packages.iterdir():
                if not entry.name.startswith(without) and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
    return folder


def run_with(packages, code):
    """Runs code in a Python that sees the given packages only."""
    path = {"PYTHONPATH": f"{ROOT}:{packages}"}
    return run(code, path, python=(os.path.realpath(sys.executable), "-S"))


@pytest.mark.slow
def test_without_horovod_adam_works_and_init_and_distribute_name_the_build_command(packages):
    remedy = "Horovod is not installed in .*; build it with `python -m hvd_adam.build_horovod --install`"
    step = (
        "import torch, hvd_adam; p = torch.nn.Parameter(torch.ones(2)); o = hvd_adam.Adam([p]); "
        "p.sum().backward(); o.step(); print(p.tolist()[0] < 1)"
    )
    assert run_with(packages, step) == "True"
    assert re.fullmatch(remedy, run_with(packages, "import hvd_adam; hvd_adam.init()"))
    distribute = (
        "import torch, hvd_adam; m = torch.nn.Linear(1, 1); hvd_adam.distribute(hvd_adam.Adam(m.parameters()), m)"
    )
    assert re.fullmatch(remedy, run_with(packages, distribute))


@pytest.fixture
def horovod_copy(packages):
    """A copy of the installed Horovod that a test may damage."""
    original = Path(importlib.util.find_spec("horovod").origin).parent
    return Path(shutil.copytree(original, packages / "horovod"))


def test_a_horovod_built_against_another_torch_is_detected_and_reported(packages, horovod_copy):
    metadata = horovod_copy / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "pytorch": "2.0.1"}))
    assert run_with(packages, "import hvd_adam; hvd_adam.init()") == (
        f"Horovod was built against torch 2.0.1, but torch {torch.__version__} is installed; build it again "
        "with `python -m hvd_adam.build_horovod --install`"
    )


@pytest.mark.slow
def test_a_horovod_without_pytorch_support_or_that_does_not_load_is_reported(packages, horovod_copy):
    (library,) = (horovod_copy / "torch").glob("mpi_lib_v2*.so")
    library.write_bytes(b"not a library")
    message = run_with(packages, "import hvd_adam; hvd_adam.init()")
    assert message.startswith("Horovod's library does not load (")
    assert message.endswith("since it was built; build it again with `python -m hvd_adam.build_horovod --install`")
    library.unlink()
    assert "does not load" in run_with(packages, "import hvd_adam; hvd_adam.init()")
    (horovod_copy / "metadata.json").write_text("{}")
    assert "has no PyTorch support" in run_with(packages, "import hvd_adam; hvd_adam.init()")


@pytest.mark.slow
def test_distribute_before_init_is_refused_with_the_remedy():
    code = (
        "import torch, hvd_adam; m = torch.nn.Linear(1, 1); hvd_adam.distribute(hvd_adam.Adam(m.parameters()), m)"
    )
    assert run(code) == "call hvd_adam.init() before distribute()"


def test_an_unknown_device_is_refused():
    assert run("import hvd_adam; hvd_adam.init(device='tpu')") == "device is 'tpu'; use auto, cpu or cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused():
    message = run("import hvd_adam; hvd_adam.init(device='cuda')")
    assert "rank 0" in message
    assert "sees no GPU" in message
    assert "--device cpu" in message


def place(host, gpus=""):
    return RankPlacement(host, (0, 1), tuple(gpus))


# Placements are made up, since the tests need no GPUs; the assignment is the real one.
@pytest.mark.parametrize(
    ("places", "indices"),
    [
        ([place("a", "xy"), place("a", "xy")], [0, 1]),
        ([place("a", "x"), place("a", "y")], [0, 0]),  # bound by Slurm, for example
        ([place("a", "x"), place("b", "x")], [0, 0]),  # hosts may use the same names
        ([place("a", "xy"), place("a", "xy"), place("a", "zw"), place("a", "zw")], [0, 1, 0, 1]),  # first free
        ([place("a", "xy"), place("a", "x")], [1, 0]),
        ([place("a", "xyz"), place("a", "xz"), place("a", "x")], [1, 1, 0]),
        ([place("a"), place("b")], [None, None]),
    ],
)
def test_each_rank_gets_a_gpu_of_its_own_with_any_binding(places, indices):
    assert assign_gpus(places, "auto") == indices


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([place("a", "x"), place("a", "x")], "2 ranks on a for 1 GPU;"),
        ([place("a", "xy")] * 3, "3 ranks on a for 2 GPUs; start one rank per GPU"),
        ([place("a", "xy"), place("a", "x"), place("a", "x")], "3 ranks on a for 2 GPUs"),
        ([place("a", "x"), place("b")], "rank 1 on b sees no GPU"),
    ],
)
def test_fewer_gpus_than_ranks_are_refused(places, message):
    with pytest.raises(CollectiveError, match=message):
        assign_gpus(places, "auto")


@on_ranks(2)
def test_init_returns_ranks_and_sizes_and_later_calls_the_same_cluster(cluster):
    assert (cluster.size, cluster.local_size, cluster.cross_rank, cluster.cross_size) == (2, 2, 0, 1)
    assert cluster.rank == cluster.local_rank
    assert cluster.launcher == "horovodrun"
    assert init() is cluster
    assert cluster == replace(cluster)


@on_ranks(2)
def test_ranks_of_a_host_share_its_cores(cluster):
    if "OMP_NUM_THREADS" not in os.environ:
        assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)


@on_ranks(2, "gloo")
def test_under_gloo_the_threads_of_horovod_do_not_interrupt_others(cluster):
    policies = {int(thread): os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
    assert policies.pop(threading.get_native_id()) == os.SCHED_OTHER
    assert list(policies.values()).count(os.SCHED_BATCH) >= 2  # Horovod's own thread and Gloo's loop


def policies_during_a_wait(cluster):
    """Returns the policies of rank 0's thread while it waits for rank 1, which is late; none on rank 1."""
    seen, waiter, done = set(), threading.get_native_id(), threading.Event()

    def watch():
        while not done.wait(0.01):
            seen.add(os.sched_getscheduler(waiter))

    if cluster.rank == 1:
        time.sleep(0.5)
    else:
        watcher = threading.Thread(target=watch)
        watcher.start()
    cluster_module.horovod().allreduce(torch.ones(1), name="late")
    if cluster.rank == 0:
        done.set()
        watcher.join()
    return seen


@on_ranks(2, "mpi")
def test_under_mpi_a_waiting_rank_does_not_interrupt_others(cluster):
    seen = policies_during_a_wait(cluster)
    assert (os.SCHED_BATCH in seen) == (cluster.rank == 0)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@on_ranks(2, "gloo")
def test_under_gloo_a_waiting_rank_keeps_its_policy(cluster):
    assert policies_during_a_wait(cluster) == ({os.SCHED_OTHER} if cluster.rank == 0 else set())


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_policy_that_the_user_has_chosen_is_kept(policy):
    code = (
        f"import os; os.sched_setscheduler(0, {policy}, os.sched_param(0)); "
        "from hvd_adam.distributed.placement import batch_policy\n "
        "with batch_policy(): inside = os.sched_getscheduler(0)\n "
        "print(inside, os.sched_getscheduler(0))"
    )
    assert run(code) == f"{policy} {policy}"


def test_a_system_that_forbids_the_policy_is_left_as_it_is(monkeypatch):
    def forbid(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    with batch_policy():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(
    ("environ", "cycle"),
    [
        ({}, "0.1"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "2"}, "0.1"),
        (STORE | {"HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "2"}, "0.5"),
        (STORE | {"HOROVOD_SIZE": "4", "HOROVOD_LOCAL_SIZE": "2"}, "2"),
        (STORE | {"HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_ELASTIC": "1"}, "2"),
    ],
)
def test_the_default_cycle_time_depends_on_the_controller_and_on_the_hosts(monkeypatch, environ, cycle):
    for name in (*STORE, "HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE", "HOROVOD_ELASTIC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cluster_module.horovod_defaults()["HOROVOD_CYCLE_TIME"] == cycle


@on_ranks(2)
def test_a_stalled_rank_ends_the_job_by_default(cluster):
    assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "600"


@on_ranks(2)
def test_an_error_of_one_rank_is_raised_on_all_with_its_rank_and_host(cluster):
    with pytest.raises(CollectiveError, match=r"^rank 1 on \S+: no such file: x$"), raise_on_all_ranks(cluster):
        if cluster.rank == 1:
            raise UserError("no such file: x")
    with pytest.raises(CollectiveError, match=r"^bad value$"), raise_on_all_ranks(cluster):
        raise UserError("bad value")
    with raise_on_all_ranks(cluster):
        pass


@on_ranks(2)
def test_arguments_that_differ_between_ranks_are_named(cluster):
    require_same(cluster, "arguments", {"lr": 0.1})
    with pytest.raises(
        CollectiveError, match=r"have different arguments: lr is 0\.0 on rank 0 and 0\.5 on rank 1"
    ):
        require_same(cluster, "arguments", {"lr": cluster.rank / 2, "seed": 0})


@on_ranks(2, "mpi")
def test_mpirun_is_detected(cluster):
    assert (cluster.launcher, cluster.size) == ("mpirun", 2)


def test_a_rank_that_never_arrives_ends_the_others_in_bounded_time():
    code = (
        "import time, hvd_adam, torch; c = hvd_adam.init(); import horovod.torch as hvd; "
        "time.sleep(1000) if c.rank else hvd.allreduce(torch.ones(1), name='x')"
    )
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    done = launch(["-c", code], 2, "mpi", env={**limits, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert "is stalled for longer than 3 seconds. Will shutdown." in done.stderr


def test_a_variable_set_by_the_user_overrides_the_default(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "7")
    code = "import os, hvd_adam; hvd_adam.init(); print(os.environ['HOROVOD_STALL_SHUTDOWN_TIME_SECONDS'])"
    assert run(code) == "7"
    assert cluster_module.HOROVOD_DEFAULTS["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "600"


@pytest.mark.parametrize("value", ["abc", "", "-1", "nan", "inf"])
def test_a_variable_of_horovod_that_is_no_number_is_refused(value):
    message = f"HOROVOD_CYCLE_TIME is '{value}' in the environment; it must be a number, 0 or above"
    assert run("import hvd_adam; hvd_adam.init()", {"HOROVOD_CYCLE_TIME": value}) == message


@pytest.mark.parametrize(("environ", "cycle"), [({}, "12.5"), ({"HOROVOD_CYCLE_TIME": "3"}, "3")])
def test_the_cycle_time_is_the_arguments_unless_the_user_sets_the_variable(environ, cycle):
    code = "import os, hvd_adam; hvd_adam.init(cycle_time_ms=12.5); print(os.environ['HOROVOD_CYCLE_TIME'])"
    assert run(code, environ) == cycle


@pytest.mark.parametrize("value", [0, -1, float("nan"), 1001, float("inf"), True, "10"])
def test_a_cycle_time_that_is_no_time_is_refused(value):
    with pytest.raises(UserError, match=f"cycle_time_ms is {value!r}; it must be a number above 0, at most 1000"):
        init(cycle_time_ms=value)


def test_options_of_a_later_call_that_have_no_effect_are_named():
    code = (
        "import warnings, hvd_adam; warnings.simplefilter('error'); c = hvd_adam.init(cycle_time_ms=5); "
        "assert hvd_adam.init(cycle_time_ms=5) is hvd_adam.init() is c\n"
        " try: hvd_adam.init(process_sets=True)\n except RuntimeWarning as w: print(w)"
    )
    message = "init(process_sets=True) has no effect: Horovod runs already; give it to the first init()"
    assert run(code) == message


def test_settings_that_come_too_late_because_horovod_runs_already_are_named_once():
    code = "import horovod.torch as hvd, hvd_adam; hvd.init(); hvd_adam.init(); hvd_adam.init()"
    environ = {"HOROVOD_CACHE_CAPACITY": "2048", "PYTHONPATH": str(ROOT)}
    done = launch(["-c", code], 2, "gloo", env=environ)
    assert done.returncode == 0, done.stderr
    (warning,) = re.findall(r".*RuntimeWarning: hvd_adam: .*", done.stderr)
    assert "started before init()" in warning
    assert "HOROVOD_DISABLE_GROUP_FUSION" in warning
    assert "HOROVOD_CACHE_CAPACITY" not in warning


def test_a_host_with_more_ranks_than_cores_is_named_with_both_numbers():
    def placed(host, *cores):
        return RankPlacement(host, cores, ())

    eight = [placed("a", 0, 1)] * 8
    warning = describe_oversubscription(eight)
    assert warning.startswith("8 ranks on a share 2 cores and wait for each other; start fewer ranks there (-np")
    assert "2 ranks on b share 1 core " in describe_oversubscription([placed("a", 0), *[placed("b", 3)] * 2])
    for enough in ([placed("a", 0, 1)] * 2, [placed("a", 0), placed("a", 1)], [placed("a", 0), placed("b", 0)]):
        assert describe_oversubscription(enough) == ""


def test_a_job_with_more_ranks_than_cores_gets_one_warning():
    code = "import hvd_adam; hvd_adam.init(); hvd_adam.init()"
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, "horovodrun", "-np", "2", "--gloo", forked_python(), "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 ranks on ") == done.stderr.count(" share 1 core ") == 1


@pytest.mark.parametrize(
    ("environ", "warned"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),  # sbatch --wrap "python ..."
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": ""}, False),
        ({"SLURM_JOB_ID": "", "SLURM_NTASKS": "4"}, False),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
            False,
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({}, False),
    ],
)
def test_one_rank_in_a_slurm_job_with_several_tasks_is_reported(environ, warned):
    warning = describe_unused_tasks(detect_launcher(environ), environ)
    assert ("the Slurm job has 4 tasks" in warning and "srun --mpi=pmix" in warning) == warned
    if warned:
        code = "import hvd_adam; hvd_adam.init()"
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        done = subprocess.run(
            [forked_python(), "-c", code], env=environ, capture_output=True, text=True, timeout=250
        )
        assert (done.returncode, done.stderr) == (0, f"{warning}\n")
