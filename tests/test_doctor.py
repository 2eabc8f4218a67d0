"""The doctor: real faults, provoked on real hosts and ranks, are detected and reported with their remedy.

Hazards: a broken rank, host or library that hangs the doctor or ends it with a traceback; a finding without rank
or host; a wrong remedy; a fault on one rank that is not reported because Horovod does not start; a healthy cluster
that is reported as faulty; an exit code that contradicts the table; libraries that are imported before the
arguments have been checked; a majority value that is reported as the deviation.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.cluster.hosts import HEAD, Hosts, package_folders, skip_reason

from hvd_adam.cli import parse
from hvd_adam.distributed.launch_env import BUILD_COMMAND, SETUP_COMMAND
from hvd_adam.doctor import job_checks, links, machine, measurement_checks
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.gpu import driver
from hvd_adam.doctor.machine import interfaces, limits, loaded_libraries, output_folder, shared_memory
from hvd_adam.doctor.remote import explain
from hvd_adam.doctor.report import Check, Report, fail, from_error_message, ok, warn
from hvd_adam.doctor.software import (
    abi_mismatch,
    mpi_and_mpirun,
    packages,
    torch_release,
    torchvision_failure,
    torchvision_release,
)
from hvd_adam.doctor.worker import measured_ranks
from hvd_adam.doctor.worker_process import Findings, error_line, job_ended, process_ended
from hvd_adam.errors import UserError
from hvd_adam.versions import code_hash

ROOT = Path(__file__).parents[1]
PACKAGES = next(Path(path) for path in sys.path if Path(path, "torch", "version.py").exists())
MIB = 1 << 20
needs_hosts = pytest.mark.skipif(
    skip_reason() is not None, reason=f"no hosts in network namespaces: {skip_reason()}"
)

# Variables of the launcher of the test run itself, which the doctor must not see.
UNWANTED = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "NCCL_", "OMP_", "SLURM_", "HVD_ADAM_")


def environment(overlay, **variables):
    """Without a launcher's variables, and with the packages of directory `overlay` before all others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(UNWANTED)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"PYTHONPATH": f"{overlay}:{ROOT}", "PATH": path, "HVD_ADAM_PYTHON": sys.executable} | variables


def link_package(source, target, changes):
    """Copies a package as symbolic links, with some files replaced by the texts in `changes`."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        below = {
            name.partition("/")[2]: text for name, text in changes.items() if name.split("/")[0] == entry.name
        }
        if entry.name in changes:
            (target / entry.name).write_text(changes[entry.name])
        elif below:
            link_package(entry, target / entry.name, below)
        elif entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


class Result:
    """The output of a doctor: exit code, checks by name, and stderr."""

    def __init__(self, done):
        self.code, self.stderr = done.returncode, done.stderr
        found = re.search(r'\{"title".*\}', done.stdout)
        assert found, f"no JSON: {done.stdout}\n{done.stderr}"
        self.result = json.loads(found[0])
        self.checks = {check["name"]: Check(**check) for check in self.result["checks"]}
        assert "Traceback" not in done.stdout + done.stderr
        for check in self.checks.values():
            assert check.status == "ok" or check.remedy, check

    def expect(self, name, status, found, remedy):
        check = self.checks[name]
        assert check.status == status, check
        assert re.search(found, check.found), check
        assert re.search(remedy, check.remedy), check


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "overlay").mkdir()
    return folder


@pytest.fixture(autouse=True)
def outside_repository(workdir, monkeypatch):
    """The current directory is first on Python's path; the repository there would hide the overlays."""
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="module")
def hosts(workdir):
    if skip_reason() is not None:
        pytest.skip(f"no hosts in network namespaces: {skip_reason()}")
    with Hosts(workdir / "namespaces", ["node1", "node2", "node3"]) as hosts:
        yield hosts


@contextmanager
def mounted(hosts, host, *what):
    """Mounts a file system on one host."""
    hosts.run(host, ["mount", *what], check=True)
    try:
        yield
    finally:
        hosts.run(host, ["umount", "-l", what[-1]], check=True)


def run_job(hosts, workdir, script, where, *argv, **variables):
    """Runs a doctor on hosts, under a script of launch/."""
    name, *controller = script.split()
    launcher = ["bash", ROOT / "launch" / name, *controller, "-H", where, "-i", "eth0", "--no-check"]
    arguments = ["--module", "hvd_adam.doctor", "--", "--json", "--output-dir", workdir / "runs", *argv]
    env = environment(workdir / "overlay", **variables)
    return Result(hosts.run(HEAD, [*launcher, *arguments], env=env, timeout=250))


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh --gloo"])
def test_a_healthy_cluster_passes_every_check(script, hosts, workdir):
    result = run_job(hosts, workdir, script, "node1:2,node2:2", "--seconds", 1.5)
    assert result.code == 0, result.result
    assert result.result["status"] != "fail"
    assert [(rank["rank"], rank["host"]) for rank in result.result["ranks"]] == [
        (0, "node1"),
        (1, "node1"),
        (2, "node2"),
        (3, "node2"),
    ]
    expected = {
        "Python",
        "torch",
        "torchvision",
        "packages",
        "Horovod",
        "MPI",
        "launcher",
        "NCCL",
        "GPUs",
        "driver",
        "/dev/shm",
    }
    expected |= {
        "ulimits",
        "interfaces",
        "network",
        "ssh",
        "clocks",
        "output folder",
        "cores",
        "versions",
        "links",
    }
    assert set(result.checks) == expected | {"computing", "sums", "Horovod starts"}
    assert "slowest pair rank 0 on node1 and rank 2 on node2" in result.checks["links"].found
    assert result.checks["ssh"].found == "login works: node2"
    assert "node2 is 0.0" in result.checks["clocks"].found


def test_different_code_a_slow_link_and_a_slow_rank_are_reported(hosts, workdir):
    copy = workdir / "other_code" / "hvd_adam"
    shutil.copytree(ROOT / "hvd_adam", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "# changed here\n")
    # Both ranks run on one core, of which rank 1 gets a quarter. They go before what else runs on this machine,
    # which would make their speeds unsteady.
    python = workdir / "pinned_python"
    python.write_text(
        '#!/bin/sh\nnice=-15\nif [ "$(hostname)" = node2 ]; then nice=-10; fi\n'
        "renice -n $nice -p $$ >/dev/null; echo $nice 2>/dev/null >/proc/self/autogroup\n"
        f'exec taskset -c {min(os.sched_getaffinity(0))} {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    hosts.run("node2", "tc qdisc add dev eth0 root tbf rate 20mbit burst 32kbit latency 400ms".split(), check=True)
    try:
        with mounted(hosts, "node2", "--bind", copy.parent, workdir / "overlay"):
            variables = {"HVD_ADAM_PYTHON": str(python)}
            result = run_job(
                hosts, workdir, "horovodrun.sh --gloo", "node1:1,node2:1", "--seconds", 3, **variables
            )
    finally:
        hosts.run("node2", "tc qdisc del dev eth0 root".split(), check=True)
    assert result.code == 1
    differs = r"code hash is \w{12} on rank 1 on node2, \w{12} on rank 0 on node1"
    result.expect("versions", "fail", differs, "copy the same code")
    result.expect("links", "warn", r"slowest pair rank 0 on node1 and rank 1 on node2: [1-4]\.\d\d MB/s", "cable")
    result.expect("computing", "warn", r"slowest rank 1 on node2: \S+ GFLOP/s", "what else runs on node2")


def test_a_broken_rank_and_an_unreachable_host_are_reported_although_horovod_cannot_start(hosts, workdir):
    (library,) = (PACKAGES / "horovod" / "torch").glob("mpi_lib_v2*.so")
    copy = workdir / "other_horovod"
    link_package(PACKAGES / "horovod", copy / "horovod", {f"torch/{library.name}": "not a library"})
    route = ["blackhole", hosts.addresses["node1"]]
    with ExitStack() as stack:
        stack.enter_context(mounted(hosts, "node2", "--bind", copy, workdir / "overlay"))
        stack.enter_context(mounted(hosts, "node2", "-t", "tmpfs", "-o", "size=60m", "tmpfs", "/dev/shm"))
        hosts.run("node2", ["ip", "route", "add", *route], check=True)
        stack.callback(hosts.run, "node2", ["ip", "route", "del", *route], check=True)
        where = "node1:1,node2:1"
        result = run_job(hosts, workdir, "horovodrun.sh --gloo", where, "--seconds", 1, OMP_NUM_THREADS="64")
    assert result.code == 1
    result.expect(
        "Horovod", "fail", r"^rank 1 on node2: Horovod's library does not load \(", re.escape(BUILD_COMMAND)
    )
    result.expect("/dev/shm", "warn", r"^rank 1 on node2: 60 MiB", "--shm-size=2g")
    result.expect(
        "cores", "warn", "OMP_NUM_THREADS is 64 on node1: 64 threads for", "unset OMP_NUM_THREADS, or set it to"
    )
    reached = r"rank 0 on node1 does not reach rank 1 on node2: 10\.77\.0\.3: timed out; and 1 more"
    result.expect("network", "fail", reached, "open all ports between node1 and node2")
    assert "Horovod starts" not in result.checks


@pytest.fixture
def unreachable_hosts(hosts):
    """Names of hosts where the ssh login fails, each for a different reason."""
    config = hosts.folder / "ssh_config"
    before = config.read_text()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hosts.folder / "wrong"], check=True)
    closed = f"Host closed\n  HostName {hosts.addresses['node1']}\n  Port 9\n"
    wrong = before.replace("Host *", "Host wrongkey").replace(f"{hosts.folder}/key", f"{hosts.folder}/wrong")
    wrong += f"  HostName {hosts.addresses['node1']}\n"
    config.write_text(closed + wrong + before.replace("Host *", "Host * !wrongkey"))
    yield ["nosuch", "wrongkey", "closed"]
    config.write_text(before)


def test_other_hosts_are_checked_over_ssh_and_each_fault_is_reported_with_its_host(
    hosts, unreachable_hosts, workdir
):
    version = (PACKAGES / "torch" / "version.py").read_text()
    other = re.sub(r"__version__ = .*", "__version__ = '2.0.1+odd'", version)
    link_package(PACKAGES / "torch", workdir / "other_torch" / "torch", {"version.py": other})
    with ExitStack() as mounts:
        mounts.enter_context(mounted(hosts, "node2", "--bind", workdir / "other_torch", workdir / "overlay"))
        for package in package_folders():
            mounts.enter_context(mounted(hosts, "node3", "-t", "tmpfs", "tmpfs", package))
        command = [sys.executable, "-m", "hvd_adam.doctor", "--json", "--output-dir", workdir / "runs", "-H"]
        command.append(",".join(["node1:2", "node2", "node3", *unreachable_hosts]))
        result = Result(hosts.run(HEAD, command, env=environment(workdir / "overlay"), timeout=250))
    assert result.code == 1
    result.expect("ssh", "fail", "nosuch: unknown host", "DNS or /etc/hosts")
    result.expect("ssh", "fail", "wrongkey: ssh key rejected", "ssh-copy-id wrongkey")
    result.expect(
        "ssh", "fail", "closed: its ssh port is closed", "start sshd there, or name its port with --ssh-port"
    )
    result.expect("ssh", "fail", "node3: No module named '?hvd_adam", re.escape(SETUP_COMMAND))
    result.expect("torch", "fail", "node2: 2.0.1", "install torch 2.1 or newer")
    result.expect(
        "Horovod", "fail", "node2: Horovod was built against torch .*, but torch 2.0.1", re.escape(BUILD_COMMAND)
    )
    result.expect("versions", "fail", r"torch is 2\.0\.1\+odd on node2, \S+ on head, node1", "on all hosts")
    assert not any("node1" in check.found for check in result.checks.values() if check.name in ("ssh", "torch"))
    assert [rank["host"] for rank in result.result["ranks"]] == ["head", "node1", "node2"]


MPIRUN = """#!/bin/sh
echo "mpirun (Open MPI) 5.0.1"
"""


def test_a_launcher_whose_processes_are_not_connected_and_other_faults_of_a_machine_are_reported(workdir):
    metadata = json.loads((PACKAGES / "horovod" / "metadata.json").read_text())
    changes = {"metadata.json": json.dumps({**metadata, "pytorch": "2.0.1"})}
    link_package(PACKAGES / "horovod", workdir / "old_horovod" / "horovod", changes)
    (workdir / "bin").mkdir()
    (workdir / "bin" / "mpirun").write_text(MPIRUN)
    (workdir / "bin" / "mpirun").chmod(0o755)
    env = environment(workdir / "old_horovod", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="4")
    env |= {"PATH": f"{workdir / 'bin'}:{env['PATH']}", "NCCL_SOCKET_IFNAME": "eth9"}
    command = f"ulimit -n 200; exec {sys.executable} -m hvd_adam.doctor --json --output-dir {workdir / 'runs'}"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=250)
    result = Result(done)
    assert (result.code, result.stderr) == (1, "")
    result.expect("launcher", "fail", "mpirun .*started 4 processes, but Horovod sees 1", re.escape(BUILD_COMMAND))
    result.expect("Horovod", "fail", r"built against torch 2\.0\.1, but torch", re.escape(BUILD_COMMAND))
    result.expect("ulimits", "fail", "open files 200, 1024 advised", "ulimit -n 1024")
    result.expect("interfaces", "fail", "no interface eth9", r"name one of .*lo")
    result.expect(
        "MPI", "warn", r"the library is Open MPI v\d.*, but mpirun on PATH is mpirun \(Open MPI\) 5\.0\.1", "PATH"
    )


@pytest.fixture(scope="module")
def crashing_torch(workdir):
    """An overlay with a torch that crashes the process."""
    (workdir / "crash" / "torch").mkdir(parents=True)
    (workdir / "crash" / "torch" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    return workdir / "crash"


def test_a_torch_that_crashes_is_reported_with_the_signal(crashing_torch):
    command = [sys.executable, "-m", "hvd_adam.doctor"]
    done = subprocess.run(command, env=environment(crashing_torch), capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^fail  torch +the process ended by SIGSEGV\n +→ check whether", done.stdout, re.MULTILINE)
    assert "ok    Python" in done.stdout


FAILING_TORCHVISION = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.mark.slow
def test_a_torchvision_that_a_users_script_cannot_import_fails(workdir):
    link_package(
        PACKAGES / "torchvision", workdir / "vision" / "torchvision", {"__init__.py": FAILING_TORCHVISION}
    )
    command = [sys.executable, "-m", "hvd_adam.doctor", "--json", "--output-dir", workdir / "runs"]
    env = environment(workdir / "vision")
    result = Result(subprocess.run(command, env=env, capture_output=True, text=True, timeout=250))
    assert result.code == 1
    result.expect(
        "torchvision", "fail", "cannot be imported .*operator torchvision::nms", re.escape(SETUP_COMMAND)
    )


@pytest.mark.parametrize(
    ("torch", "command"),
    [
        ("2.13.0+cpu", "'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu`"),
        ("2.6.0+cu124", "'torchvision==0.21.*' --index-url https://download.pytorch.org/whl/cu124`"),
        ("2.13.0", "'torchvision==0.28.*'`"),
    ],
)
def test_the_remedy_for_torchvision_is_the_build_that_goes_with_torch(torch, command):
    check = torchvision_failure("0.28.0", torch, RuntimeError("operator torchvision::nms does not exist"))
    assert check.status == "fail" and "operator torchvision::nms does not exist" in check.found
    assert f"pip install --no-deps --force-reinstall {command}, or `{SETUP_COMMAND}`" in check.remedy


# Without site-packages there is nothing but the standard library, and the modules of this project.
BARE_PYTHON = """
import sys

sys.path[:] = [path for path in sys.path if "-packages" not in path]
"""


def test_the_doctor_needs_nothing_but_python_and_reports_what_is_missing(workdir):
    (workdir / "bare").mkdir()
    (workdir / "bare" / "sitecustomize.py").write_text(BARE_PYTHON)
    command = [sys.executable, "-m", "hvd_adam.doctor", "--json", "--output-dir", workdir / "runs"]
    env = environment(workdir / "bare")
    result = Result(subprocess.run(command, env=env, capture_output=True, text=True, timeout=250))
    assert (result.code, result.stderr) == (1, "")
    result.expect("torch", "fail", "^not installed$", re.escape("pip install '.[train]' in the clone of hvd_adam"))
    result.expect("Horovod", "fail", "^not installed in ", re.escape(BUILD_COMMAND))
    result.expect(
        "packages",
        "fail",
        "numpy, .*jsonargparse, .*psutil",
        re.escape("pip install '.[train]' in the clone of hvd_adam"),
    )
    result.expect(
        "MPI", "warn", "mpi4py is not installed", re.escape("pip install '.[horovod]' in the clone of hvd_adam")
    )
    assert all(result.checks[name].status != "fail" for name in ("Python", "interfaces", "versions", "cores"))


def run_two_ranks(controller, other, workdir):
    """Runs a doctor on two ranks of this machine; rank 1 first runs shell command `other`."""
    script = (
        f'if [ "${{HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}}" = 1 ]; then {other}; fi; '
        f"exec {sys.executable} -m hvd_adam.doctor --json --timeout 4 --output-dir {workdir / 'runs'}"
    )
    launcher = [sys.executable, "-m", "hvd_adam.launch.horovodrun", controller, "-np", "2", "bash", "-c", script]
    env = environment(workdir / "overlay")
    return Result(subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=250))


def test_a_rank_that_crashes_reports_it_and_rank_0_reports_it_missing(crashing_torch, workdir):
    result = run_two_ranks("--gloo", f"export PYTHONPATH={crashing_torch}:$PYTHONPATH", workdir)
    assert result.code == 1
    assert re.search(r"rank 1 on \S+: torch: the process ended by SIGSEGV: check whether", result.stderr), (
        result.stderr
    )
    result.expect(
        "ranks", "fail", r"rank 1 missing after 4 s; present: rank 0 on \S+", "messages of the other ranks"
    )
    assert result.checks["torch"].status == "ok"


def test_the_wait_for_a_rank_that_never_calls_mpi_init_is_bounded(workdir):
    result = run_two_ranks("--mpi", "exec sleep 300", workdir)
    assert result.code == 1
    result.expect("ranks", "fail", "not all ranks called MPI_Init within", "messages of the other ranks")
    assert result.checks["torch"].status == "ok"


def test_a_full_or_read_only_output_folder_is_reported(hosts, workdir):
    script = "from pathlib import Path; from hvd_adam.doctor.machine import output_folder; "
    script += "print(output_folder(Path({!r})))"
    small, closed = workdir / "small", workdir / "closed"
    for folder in (small, closed):
        folder.mkdir()
    with ExitStack() as mounts:
        mounts.enter_context(mounted(hosts, HEAD, "-t", "tmpfs", "-o", "size=8m", "tmpfs", small))
        mounts.enter_context(mounted(hosts, HEAD, "-t", "tmpfs", "-o", "ro", "tmpfs", closed))
        outputs = [
            hosts.run(
                HEAD, [sys.executable, "-c", script.format(str(folder / "run"))], env=environment(workdir)
            ).stdout
            for folder in (small, closed)
        ]
    assert (
        "status='fail'" in outputs[0]
        and "8 MiB free, 100 MiB required" in outputs[0]
        and "--output-dir" in outputs[0]
    )
    assert "status='fail'" in outputs[1] and "Read-only file system" in outputs[1] and "--output-dir" in outputs[1]


def test_an_output_folder_in_which_training_cannot_start_fails(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "link", tmp_path / "link" / "run"):
        check = output_folder(folder)
        assert check.status == "fail" and f"link is a link to {tmp_path}/gone, which does not exist" in check.found
    closed = tmp_path / "closed"
    (closed / "runs").mkdir(parents=True)
    closed.chmod(0o600)
    code = "import os, sys; from pathlib import Path; from hvd_adam.doctor.machine import output_folder; "
    code += "os.geteuid() or os.seteuid(65534); print(output_folder(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, closed / "runs" / "a"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert "status='fail'" in done.stdout and "Permission denied in" in done.stdout


def config(*argv):
    return parse(DoctorConfig, "hvd_adam.doctor", argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seconds 0", "--seconds is 0.0: it must be above 0 and at most 600"),
        ("--timeout nan", "--timeout is nan"),
        ("--hosts ,", "--hosts is ',': it must be names, as in host1,host2"),
        ("--hosts a;b", "--hosts is 'a;b'"),
        ("--hosts=-oProxyCommand=x", "--hosts is '-oProxyCommand=x'"),
        ("--ssh-port 0", "--ssh-port is 0: it must be from 1 to 65535"),
        ("--ssh-key /no/such", "--ssh-key is /no/such: it must be a file"),
        ("--fast", "--fast is not an option"),
    ],
)
def test_bad_arguments_are_reported_in_one_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(*argv.split())


def test_hosts_are_accepted_in_the_launchers_format():
    assert config("--hosts", "a:4, me@b ,a").host_names() == ("a", "me@b")


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        (["--seconds", "-1"], {}, "--seconds is -1.0"),
        (
            ["-H", "a"],
            {"PMI_RANK": "0", "PMI_SIZE": "2"},
            "--hosts cannot be used under a launcher, and mpiexec started this",
        ),
        ([], {"HOROVOD_ELASTIC": "1"}, "start it without --min-np"),
    ],
)
def test_an_invalid_use_is_reported_in_one_line_without_importing_torch(argv, variables, message, workdir):
    script = (
        "import atexit, os, runpy, sys; os._exit = sys.exit; "
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'horovod', 'numpy'} & set(sys.modules)))); "
        f"sys.argv = ['doctor', *{argv!r}]; runpy.run_module('hvd_adam.doctor', run_name='__main__')"
    )
    env = environment(workdir, **variables)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (2, "heavy: []\n")
    assert done.stderr.startswith("hvd_adam.doctor: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


# Checks of given values, for faults that cannot be provoked here.


def reports(*hosts, **facts):
    return [Report(rank, host, facts=dict(facts)) for rank, host in enumerate(hosts)]


def test_ranks_with_the_same_fault_share_a_line_with_the_worst_status():
    four = reports("a", "a", "b", "b")
    for report in four:
        bad = report.host == "b"
        report.checks = [warn("x", "low", "raise it") if bad else ok("x", "high"), ok("y", str(report.rank))]
    four[3].checks[0] = fail("x", "none", "buy one")
    merged = job_checks.merged(four, job_checks.ranks_of(four))
    assert merged == [
        fail("x", "rank 2 on b: low; rank 3 on b: none", "raise it; buy one"),
        ok("y", "0"),
    ]
    for report in four:
        report.checks = [warn("x", "low", "raise it")]
    assert job_checks.merged(four, job_checks.ranks_of(four)) == [warn("x", "everywhere: low", "raise it")]
    assert job_checks.merged(four[:1], job_checks.ranks_of(four)) == [warn("x", "low", "raise it")]


def test_a_version_deviates_if_fewer_ranks_have_it_and_rank_0_wins_a_tie():
    three = reports("a", "b", "c")
    for report, version in zip(three, ("2.0", "2.1", "2.1"), strict=True):
        report.versions = {"torch": version, "code hash": "x"}
    check = job_checks.versions(three, job_checks.ranks_of(three))
    assert check.found == "torch is 2.0 on rank 0 on a, 2.1 on rank 1 on b, rank 2 on c"
    assert "same versions on all hosts" in check.remedy
    assert (
        job_checks.versions(three[:2], job_checks.ranks_of(three)).found
        == "torch is 2.1 on rank 1 on b, 2.0 on rank 0 on a"
    )
    assert job_checks.versions(three[1:], job_checks.ranks_of(three)).status == "ok"


@pytest.mark.parametrize(
    ("gpus", "device", "status", "found"),
    [
        ([["x", "y"], ["x", "y"]], "auto", "ok", "one per rank: a 2 visible"),
        ([["x"], ["y"]], "auto", "ok", "one per rank: a 1 visible"),  # bound by Slurm
        ([["x"], ["x"]], "auto", "fail", "2 ranks on a for 1 GPU"),
        ([["x", "y"], []], "auto", "fail", "rank 1 on a sees no GPU"),
        ([["x"], ["x"]], "cpu", "ok", "none used"),
        ([[], []], "cuda", "fail", "rank 0 on a sees no GPU"),
    ],
)
def test_each_rank_needs_a_gpu_of_its_own(gpus, device, status, found):
    check = job_checks.gpus([Report(rank, "a", facts={"gpus": mine}) for rank, mine in enumerate(gpus)], device)
    assert (check.status, check.found) == (status, found)
    assert status == "ok" or "--device cpu" in check.remedy


@pytest.mark.parametrize(
    ("hosts", "cores", "threads", "status", "found"),
    [
        ("aa", 8, "", "ok", "a 8 cores for 2 ranks"),
        ("aa", 8, "4", "ok", "a 8 cores for 2 ranks"),
        ("aa", 8, "5", "warn", "10 threads for 8 cores"),
        ("aa", 8, "5,1", "warn", "10 threads for 8 cores"),
        ("a", 8, "1", "warn", "OMP_NUM_THREADS is 1 on a, but a rank has 8 cores"),
        ("aaa", 2, "1", "warn", "a has 2 cores for 3 ranks"),
        ("a", 2, "many", "warn", "OMP_NUM_THREADS is 'many' on a: not a number"),
    ],
)
def test_threads_must_match_the_cores(hosts, cores, threads, status, found):
    check = job_checks.cores(reports(*hosts, cores=list(range(cores)), threads=threads), together=True)
    assert check.status == status and found in check.found


def link(a, b, rate=1e9, rtt=1e-4):
    return {"a": a, "b": b, "address": "10.0.0.1", "rate": rate, "rtt": rtt, "ahead": 0.0}


def test_the_host_in_every_slow_pair_is_named():
    four = reports("a", "b", "c", "d")
    fast = [link(a, b) for a in range(4) for b in range(a + 1, 4)]
    assert measurement_checks.links(fast, four).status == "ok"
    slow = [one | {"rate": 3e8 if 2 in (one["a"], one["b"]) else 1e9} for one in fast]
    check = measurement_checks.links(slow, four)
    assert check.status == "warn" and check.found.endswith("c is in every slow pair")
    assert "slowest pair rank 0 on a and rank 2 on c: 300 MB/s" in check.found
    assert "(6 of 6 pairs, median 650 MB/s)" in check.found
    assert "(1 of 2 pairs" in measurement_checks.links([link(0, 1), {"a": 0, "b": 2, "address": "x"}], four).found
    late = measurement_checks.links([*fast[1:], link(0, 1, rtt=0.02)], four)
    assert late.status == "warn" and "rank 0 on a and rank 1 on b: round trip 20.00 ms" in late.found
    one_host = measurement_checks.links([link(0, 1, rate=1e6)], reports("a", "a"))
    assert one_host.status == "ok"  # there is no network between its ranks


def test_an_address_of_two_hosts_is_reported():
    check = measurement_checks.reachability([link(0, 1), link(1, 0)], reports("a", "b", addresses=["172.17.0.1"]))
    assert (
        check.status == "warn" and "172.17.0.1 is an address of a and of b" in check.found and "-i" in check.remedy
    )


@pytest.mark.parametrize(("seconds", "status"), [(0.5, "ok"), (-20, "warn"), (400, "fail")])
def test_clocks_that_differ_are_reported_with_their_hosts(seconds, status):
    check = measurement_checks.clocks({"b": 0.01, "c": seconds}, "a")
    assert check.status == status and "c" in check.found
    assert status == "ok" or "chronyc" in check.remedy
    two = reports("a", "b")
    assert measurement_checks.clock_offsets(
        [link(0, 1) | {"ahead": 3.0}, {"a": 1, "b": 0, "address": "x"}], two
    ) == {"b": 3.0}


def computing(*ranks):
    """Returns the check of ranks with these GFLOP/s in each turn, each on a host of its own."""
    speeds = [{"compute": statistics.median(turns), "turns": list(turns)} for turns in ranks]
    return measurement_checks.computing(speeds, list("abcd"[: len(ranks)]))


STEADY = (100, 98, 101, 100, 99)


def test_the_slowest_rank_is_a_warning_only_if_it_is_much_slower_than_the_others():
    check = computing([100] * 5, [90] * 5, [50] * 5)
    assert check.status == "warn" and "slowest rank 2 on c: 50.0 GFLOP/s, others 95.0" in check.found
    assert "what else runs on c" in check.remedy
    check = computing([100] * 5, [90] * 5)
    assert check.status == "ok" and "not steady" not in check.found
    assert computing(STEADY).status == "ok"


@pytest.mark.parametrize(
    ("ranks", "status"),
    [
        ((STEADY, (50, 51, 49, 50, 52)), "warn"),
        ((STEADY, (50, 51, 95, 50, 52)), "warn"),  # something has slowed the others down in one turn
        ((STEADY, (50, 97, 95, 50, 52)), "ok"),
        ((STEADY, (95, 96, 20, 95, 97)), "ok"),  # an interruption, after which the mean is 80
        ((STEADY, (95, 96, 1, 1, 1)), "ok"),
        (((90, 10, 90, 10, 90), (10, 90, 10, 90, 10)), "ok"),  # two ranks that take turns on one core
        (((100, 30, 100, 30, 100), (50, 16, 50, 16, 50)), "ok"),  # within the noise
        (((100, 30, 100, 30, 100), (9, 3, 9, 3, 9)), "warn"),  # above the noise
        ((STEADY, STEADY, STEADY, (30, 31, 30, 29, 30)), "warn"),
    ],
)
def test_a_slow_rank_is_a_warning_only_where_it_is_steady_and_above_the_noise(ranks, status):
    check = computing(*ranks)
    assert check.status == status, check
    if status == "ok":
        assert re.search(r"not steady \(slow in \d of 5 turns, ranks vary by \d+%\)", check.found)


@pytest.fixture
def clock(monkeypatch):
    """The time of the modules that measure disks and links; `clock.now` may be advanced."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = clock.monotonic = lambda: clock.now
    monkeypatch.setattr(machine, "time", clock)
    monkeypatch.setattr(links, "time", clock)
    return clock


def test_one_interruption_does_not_change_the_speed_of_a_disk(tmp_path, monkeypatch, clock):
    durations = iter([0.01, 0.01, 10.0])

    def fsync(_):
        clock.now += next(durations)

    monkeypatch.setattr(os, "fsync", fsync)
    check = machine.output_folder(tmp_path)
    assert check.status == "ok" and check.found.endswith(", 105 MB/s")


def test_one_interruption_does_not_change_the_rate_of_a_link(clock):
    class Connection:
        """A connection that receives 1 MB in each call: in 10 ms, once in 300 ms."""

        calls = 0

        def recv_into(self, buffer):
            self.calls += 1
            clock.now += 0.3 if self.calls == 5 else 0.01
            return 1_000_000

        def settimeout(self, seconds):
            raise OSError

    sent = []
    links._receive(SimpleNamespace(connection=Connection(), write=sent.append), 0.5)
    assert sent == [{"rate": pytest.approx(1e8)}]


def test_limits_depend_on_the_hardware_that_needs_them():
    good = {"NOFILE": 4096, "NPROC": None, "STACK": 8 * MIB, "MEMLOCK": 8 * MIB}
    assert limits(good, infiniband=False).status == "ok"
    check = limits(good, infiniband=True)
    assert (check.status, check.remedy.split(" before")[0]) == ("fail", "ulimit -l unlimited")
    assert limits(good | {"MEMLOCK": None}, infiniband=True).status == "ok"
    check = limits(good | {"STACK": 2 * MIB, "NPROC": 100}, infiniband=False)
    assert check.status == "fail" and "ulimit -u 1024; ulimit -s 8192 before" in check.remedy


@pytest.mark.parametrize(
    ("total", "free", "status"), [(2048, 2048, "ok"), (64, 60, "warn"), (64, 10, "fail"), (9999, 1, "fail")]
)
def test_shared_memory_is_checked_by_its_free_space(total, free, status):
    assert shared_memory((total * MIB, 0, free * MIB)).status == status


def test_shared_memory_must_be_writable():
    check = shared_memory((2048 * MIB, 0, 2048 * MIB), writable=False)
    assert (check.status, check.found) == ("fail", "not writable")


def test_the_interface_named_by_the_environment_must_exist_and_be_up():
    states = {"lo": True, "ib0": False, "eth0": True}
    assert interfaces(states, "eth", ["10.0.0.1"]).status == "ok"  # NCCL accepts a prefix
    assert "ib0 is down" in interfaces(states, "ib0", ["10.0.0.1"]).found
    assert interfaces(states, "", []).status == "warn"


@pytest.mark.parametrize(
    ("number", "cuda", "usable", "status"),
    [
        ("", None, False, "ok"),
        ("", "12.4", False, "ok"),
        ("550.1", "12.4", True, "ok"),
        ("550.1", None, False, "warn"),
        ("450.1", "13.0", False, "fail"),
    ],
)
def test_the_driver_must_match_torch(number, cuda, usable, status):
    check = driver(number, cuda, usable, "the driver is too old")
    assert check.status == status
    assert status != "fail" or "the driver is too old" in check.found


def test_software_versions_must_match(tmp_path):
    assert torch_release("2.13.0+cpu").status == "ok"
    assert torch_release("2.0.1").status == torch_release("1.13").status == "fail"
    assert torchvision_release("0.28.0", "2.13.0+cpu").status == "ok"
    assert "torchvision==0.28.*" in torchvision_release("0.2.0", "2.13.0").remedy
    assert mpi_and_mpirun("Open MPI v4.1.4", "mpirun (Open MPI) 4.1.4").status == "ok"
    assert mpi_and_mpirun("Open MPI v4.1.4", "HYDRA build details: Version: 4.1.4").status == "warn"
    assert mpi_and_mpirun("Open MPI v4.1.4", "").status == "warn"
    maps = "7f-8f r-xp 0 08:01 5 /opt/a/libmpi.so.40\n7f r-xp 0 08:01 5 /usr/libmpi.so.12\n7f rw-p 0 0 0\n"
    assert loaded_libraries("libmpi.so", maps * 2) == ["/opt/a/libmpi.so.40", "/usr/libmpi.so.12"]
    (tmp_path / "torch").mkdir()
    assert abi_mismatch(tmp_path, True) == ""
    (tmp_path / "torch" / "mpi_lib_v2.so").write_bytes(b"_ZNSt7__cxx1112basic_stringIcE")
    assert abi_mismatch(tmp_path, True) == ""
    assert "new C++ ABI, torch with the old one" in abi_mismatch(tmp_path, False)
    (tmp_path / "torch" / "a.py").write_text("1")
    before = code_hash(tmp_path)
    assert before == code_hash(tmp_path)
    (tmp_path / "torch" / "a.py").write_text("2")
    assert before != code_hash(tmp_path)


def test_missing_packages_of_training_are_a_warning_and_others_a_failure():
    assert packages([]).status == "ok"
    check = packages(["matplotlib", "yaml"])
    assert (check.status, check.remedy) == ("warn", "pip install '.[train]' in the clone of hvd_adam")
    check = packages(["numpy", "psutil"])
    assert (check.status, check.found) == ("fail", "not installed: numpy, psutil")
    assert (
        check.remedy
        == "pip install '.[train]' in the clone of hvd_adam; pip install '.[horovod]' in the clone of hvd_adam"
    )


def test_an_error_message_is_split_into_finding_and_remedy():
    assert from_error_message("x", "a (b: c) is d; do e") == fail("x", "a (b: c) is d", "do e")
    assert from_error_message("x", "a differs: do e") == fail("x", "a differs", "do e")
    assert from_error_message("x", "odd").remedy


@pytest.mark.parametrize(
    ("stderr", "found", "remedy"),
    [
        ("Host key verification failed.", "a: its host key is unknown or has changed", "ssh-keyscan a"),
        ("ssh: connect to host a port 22: Connection timed out", "a: no answer at its ssh port", "firewall"),
        ("ssh: connect to host a port 22: No route to host", "a: no route to host", "host is up"),
        ("bash: line 1: cd: /x: No such file or directory", "does not exist there", "same paths"),
        ("env: ‘/x/python’: No such file or directory", "python", "launch/setup.sh"),
        ("segfault", "exit code 3 (segfault)", "run `ssh -o BatchMode=yes a true`"),
    ],
)
def test_an_error_of_ssh_is_reported_with_its_remedy(stderr, found, remedy):
    check = explain("a", 3, [stderr])
    assert found in check.found and remedy in check.remedy


def test_one_line_of_a_librarys_output_is_reported():
    assert (
        error_line(["-----\n", "It looks like MPI_INIT failed\n", "see  the   help\n"])
        == " (It looks like MPI_INIT failed)"
    )
    assert error_line(["----\n"]) == ""


def test_lines_of_open_mpi_that_name_no_cause_are_not_reported():
    cause = "MPI_INIT has failed because at least one MPI process is unreachable"
    noise = [
        "[vm:1] [[1,0],0] ORTE_ERROR_LOG: Data unpack would read past end of buffer in file show_help.c",
        "*** An error occurred in MPI_Init_thread",
        "*** Unknown error",
        "*** MPI_ERRORS_ARE_FATAL (processes in this communicator will now abort,",
        "***    and potentially your MPI job)",
        "[vm:1] Local abort before MPI_INIT completed completed successfully, but am not able to aggregate",
    ]
    assert error_line([cause, *noise]) == f" ({cause})"
    assert error_line(noise) == ""


def test_the_remedy_of_a_horovod_that_does_not_start_names_the_choices_of_mpi(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OMPI_")]:
        monkeypatch.delenv(name)
    one, two = ([Report(rank, "a") for rank in range(ranks)] for ranks in (1, 2))
    assert "put ssh and Open MPI's programs on PATH" in process_ended(Findings(one, stage="start"), 1).remedy
    monkeypatch.setenv("OMPI_MCA_btl", "tcp")
    monkeypatch.setenv("OMPI_MCA_orte_launch", "1")  # as mpirun sets it
    alone = process_ended(Findings(one, stage="start"), 1).remedy
    assert alone == "correct or unset OMPI_MCA_btl=tcp; if it is only slow, use a longer --timeout"
    together = process_ended(Findings(two, stage="start"), 1).remedy
    assert "firewall" in together and "OMPI_MCA_btl=tcp" in together


@pytest.mark.parametrize(
    ("size", "found"), [("1", "the doctor received SIGTERM"), ("2", "the launcher ended the job")]
)
def test_sigterm_is_the_launchers_only_where_there_are_other_ranks(size, found, monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", size)
    check = job_ended(Findings(stage="software"))
    assert check.status == "fail" and found in check.found and check.found.endswith(" at: torch")


def test_links_are_measured_between_hosts_or_between_the_ranks_of_one_host():
    assert measured_ranks(["a", "a", "b", "b"]) == [0, 2]
    assert measured_ranks(["a", "a"]) == [0, 1]
