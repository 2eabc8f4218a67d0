"""The doctor: real faults, provoked on real hosts and ranks, are found and named with their remedy.

Hazards: a broken rank, host or library that hangs the doctor, or ends it with a traceback; a finding without rank
or host; a remedy that does not fit; a fault on one rank that nobody hears of, since Horovod does not start; a
healthy cluster called ill; an exit code that says otherwise than the table; libraries loaded before the arguments
are good; one usual value taken for the odd one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cluster.hosts import HEAD, Hosts, skip_reason

from hvd_adam.cli import parse
from hvd_adam.doctor import judge, measured
from hvd_adam.doctor.checks import Check, Report, fail, ok, sentence, warn
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.follow import telling
from hvd_adam.doctor.gpu import driver
from hvd_adam.doctor.machine import interfaces, limits, loaded_libraries, shared_memory
from hvd_adam.doctor.remote import explain
from hvd_adam.doctor.software import (
    code_hash,
    mpi_and_mpirun,
    other_abi,
    torch_release,
    torchvision_release,
)
from hvd_adam.doctor.worker import points
from hvd_adam.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = next(Path(path) for path in sys.path if Path(path, "torch", "version.py").exists())
MIB = 1 << 20
needs_hosts = pytest.mark.skipif(skip_reason() is not None, reason=f"no hosts out of namespaces: {skip_reason()}")

# A doctor without launcher variables of the test's own, and with whatever lies in `overlay` before all else.
UNWANTED = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "NCCL_", "OMP_", "SLURM_", "HVD_ADAM_")


def environment(overlay, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(UNWANTED)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"PYTHONPATH": f"{overlay}:{ROOT}", "PATH": path, "HVD_ADAM_PYTHON": sys.executable} | variables


def forest(source, target, changes):
    """A package made of links to another, in which some files are others."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        below = {
            name.partition("/")[2]: text for name, text in changes.items() if name.split("/")[0] == entry.name
        }
        if entry.name in changes:
            (target / entry.name).write_text(changes[entry.name])
        elif below:
            forest(entry, target / entry.name, below)
        elif entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


class Outcome:
    """What a doctor said: its exit code, its checks by name, and stderr."""

    def __init__(self, done):
        self.code, self.stderr = done.returncode, done.stderr
        found = re.search(r'\{"title".*\}', done.stdout)
        assert found, f"no JSON: {done.stdout}\n{done.stderr}"
        self.result = json.loads(found[0])
        self.checks = {check["name"]: Check(**check) for check in self.result["checks"]}
        assert "Traceback" not in done.stdout + done.stderr
        for check in self.checks.values():
            assert check.status == "ok" or check.remedy, check

    def shows(self, name, status, found, remedy):
        check = self.checks[name]
        assert check.status == status, check
        assert re.search(found, check.found), check
        assert re.search(remedy, check.remedy), check


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "overlay").mkdir()
    return folder


@pytest.fixture(autouse=True)
def elsewhere(place, monkeypatch):
    """The current folder comes before all else on Python's path: not the repository, so that overlays count."""
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def hosts(place):
    if skip_reason() is not None:
        pytest.skip(f"no hosts out of namespaces: {skip_reason()}")
    with Hosts(place / "namespaces", ["node1", "node2", "node3"]) as hosts:
        yield hosts


@contextmanager
def mounted(hosts, host, *what):
    """A mount on one host alone."""
    hosts.run(host, ["mount", *what], check=True)
    try:
        yield
    finally:
        hosts.run(host, ["umount", "-l", what[-1]], check=True)


def job(hosts, place, script, where, *argv, **variables):
    """A doctor under a script of launch/, on hosts."""
    name, *controller = script.split()
    launcher = ["bash", ROOT / "launch" / name, *controller, "-H", where, "-i", "eth0", "--no-check"]
    arguments = ["--module", "hvd_adam.doctor", "--", "--json", "--output-dir", place / "runs", *argv]
    env = environment(place / "overlay", **variables)
    return Outcome(hosts.run(HEAD, [*launcher, *arguments], env=env, timeout=150))


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh --gloo"])
def test_a_healthy_cluster_is_healthy(script, hosts, place):
    healthy = job(hosts, place, script, "node1:2,node2:2", "--seconds", 1.5)
    assert healthy.code == 0, healthy.result
    assert healthy.result["status"] != "fail"
    assert [(rank["rank"], rank["host"]) for rank in healthy.result["ranks"]] == [
        (0, "node1"),
        (1, "node1"),
        (2, "node2"),
        (3, "node2"),
    ]
    expected = {
        "Python",
        "torch",
        "torchvision",
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
    assert set(healthy.checks) == expected | {"computing", "sums", "Horovod starts"}
    assert "slowest pair rank 0 on node1 and rank 2 on node2" in healthy.checks["links"].found
    assert healthy.checks["ssh"].found == "lets us in: node2"
    assert "at most: node2 is 0.0" in healthy.checks["clocks"].found


def test_other_code_a_slow_link_and_a_slow_rank_are_named(hosts, place):
    copy = place / "other_code" / "hvd_adam"
    shutil.copytree(ROOT / "hvd_adam", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "# changed here\n")
    # Both ranks on one core, of which one gets a quarter, whatever else this machine does.
    python = place / "pinned_python"
    python.write_text(
        '#!/bin/sh\nif [ "$(hostname)" = node2 ]; then\n'
        "  renice -n 5 -p $$ >/dev/null; echo 5 2>/dev/null >/proc/self/autogroup\nfi\n"
        f'exec taskset -c {min(os.sched_getaffinity(0))} {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    hosts.run("node2", "tc qdisc add dev eth0 root tbf rate 20mbit burst 32kbit latency 400ms".split(), check=True)
    try:
        with mounted(hosts, "node2", "--bind", copy.parent, place / "overlay"):
            variables = {"HVD_ADAM_PYTHON": str(python)}
            ill = job(hosts, place, "horovodrun.sh --gloo", "node1:1,node2:1", "--seconds", 3, **variables)
    finally:
        hosts.run("node2", "tc qdisc del dev eth0 root".split(), check=True)
    assert ill.code == 1
    differs = r"code hash is \w{12} on rank 1 on node2, \w{12} on rank 0 on node1"
    ill.shows("versions", "fail", differs, "copy the same code")
    ill.shows("links", "warn", r"slowest pair rank 0 on node1 and rank 1 on node2: [1-4]\.\d\d MB/s", "cable")
    ill.shows("computing", "warn", r"slowest rank 1 on node2: \S+ GFLOP/s", "what else runs on node2")


def test_what_stops_one_rank_and_a_host_not_reached_are_named_though_horovod_cannot_start(hosts, place):
    (library,) = (PACKAGES / "horovod" / "torch").glob("mpi_lib_v2*.so")
    copy = place / "other_horovod"
    forest(PACKAGES / "horovod", copy / "horovod", {f"torch/{library.name}": "not a library"})
    route = ["blackhole", hosts.addresses["node1"]]
    with ExitStack() as stack:
        stack.enter_context(mounted(hosts, "node2", "--bind", copy, place / "overlay"))
        stack.enter_context(mounted(hosts, "node2", "-t", "tmpfs", "-o", "size=60m", "tmpfs", "/dev/shm"))
        hosts.run("node2", ["ip", "route", "add", *route], check=True)
        stack.callback(hosts.run, "node2", ["ip", "route", "del", *route], check=True)
        where = "node1:1,node2:1"
        ill = job(hosts, place, "horovodrun.sh --gloo", where, "--seconds", 1, OMP_NUM_THREADS="64")
    assert ill.code == 1
    ill.shows("Horovod", "fail", r"^rank 1 on node2: Horovod's library does not load \(", r"bash launch/setup\.sh")
    ill.shows("/dev/shm", "warn", r"^rank 1 on node2: 60 MiB", "--shm-size=2g")
    ill.shows(
        "cores", "warn", "OMP_NUM_THREADS is 64 on node1: 64 threads for", "unset OMP_NUM_THREADS, or set it to"
    )
    reached = r"rank 0 on node1 does not reach rank 1 on node2: 10\.77\.0\.3: timed out; and 1 more"
    ill.shows("network", "fail", reached, "open all ports between node1 and node2")
    assert "Horovod starts" not in ill.checks


@pytest.fixture
def odd_hosts(hosts):
    """Names of hosts to which the way is barred, each for another reason."""
    config = hosts.folder / "ssh_config"
    before = config.read_text()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hosts.folder / "wrong"], check=True)
    closed = f"Host closed\n  HostName {hosts.addresses['node1']}\n  Port 9\n"
    wrong = before.replace("Host *", "Host wrongkey").replace(f"{hosts.folder}/key", f"{hosts.folder}/wrong")
    wrong += f"  HostName {hosts.addresses['node1']}\n"
    config.write_text(closed + wrong + before.replace("Host *", "Host * !wrongkey"))
    yield ["nosuch", "wrongkey", "closed"]
    config.write_text(before)


def test_other_hosts_are_looked_at_by_ssh_and_each_fault_is_named_with_its_host(hosts, odd_hosts, place):
    version = (PACKAGES / "torch" / "version.py").read_text()
    other = re.sub(r"__version__ = .*", "__version__ = '2.0.1+odd'", version)
    forest(PACKAGES / "torch", place / "other_torch" / "torch", {"version.py": other})
    with ExitStack() as mounts:
        mounts.enter_context(mounted(hosts, "node2", "--bind", place / "other_torch", place / "overlay"))
        mounts.enter_context(mounted(hosts, "node3", "-t", "tmpfs", "tmpfs", ROOT / "hvd_adam"))
        command = [sys.executable, "-m", "hvd_adam.doctor", "--json", "--output-dir", place / "runs", "-H"]
        command.append(",".join(["node1:2", "node2", "node3", *odd_hosts]))
        ill = Outcome(hosts.run(HEAD, command, env=environment(place / "overlay"), timeout=150))
    assert ill.code == 1
    ill.shows("ssh", "fail", "nosuch: unknown host", "DNS or /etc/hosts")
    ill.shows("ssh", "fail", "wrongkey: ssh refuses our key", "ssh-copy-id wrongkey")
    ill.shows(
        "ssh", "fail", "closed: its ssh port is closed", "start sshd there, or name its port with --ssh-port"
    )
    ill.shows(
        "ssh", "fail", "node3: No module named '?hvd_adam", r"set the project up there \(`bash launch/setup.sh`"
    )
    ill.shows("torch", "fail", "node2: 2.0.1", "install torch 2.1 or newer")
    ill.shows("Horovod", "fail", "node2: Horovod was built against torch .*, but torch 2.0.1", r"launch/setup\.sh")
    ill.shows("versions", "fail", r"torch is 2\.0\.1\+odd on node2, \S+ on head, node1", "alike")
    assert not any("node1" in check.found for check in ill.checks.values() if check.name in ("ssh", "torch"))
    assert [rank["host"] for rank in ill.result["ranks"]] == ["head", "node1", "node2"]


MPIRUN = """#!/bin/sh
echo "mpirun (Open MPI) 5.0.1"
"""


def test_one_process_that_believes_it_is_alone_and_other_faults_of_a_machine(place):
    metadata = json.loads((PACKAGES / "horovod" / "metadata.json").read_text())
    changes = {"metadata.json": json.dumps({**metadata, "pytorch": "2.0.1"})}
    forest(PACKAGES / "horovod", place / "old_horovod" / "horovod", changes)
    (place / "bin").mkdir()
    (place / "bin" / "mpirun").write_text(MPIRUN)
    (place / "bin" / "mpirun").chmod(0o755)
    env = environment(place / "old_horovod", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="4")
    env |= {"PATH": f"{place / 'bin'}:{env['PATH']}", "NCCL_SOCKET_IFNAME": "eth9"}
    command = f"ulimit -n 200; exec {sys.executable} -m hvd_adam.doctor --json --output-dir {place / 'runs'}"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120)
    ill = Outcome(done)
    assert (ill.code, ill.stderr) == (1, "")
    ill.shows("launcher", "fail", "mpirun says it started 4 processes, but Horovod sees 1", "rebuild it with")
    ill.shows("Horovod", "fail", r"built against torch 2\.0\.1, but torch", r"again with `bash launch/setup\.sh`")
    ill.shows("ulimits", "fail", "open files 200, 1024 advised", "ulimit -n 1024")
    ill.shows("interfaces", "fail", "no interface eth9 here", r"name one of .*lo")
    ill.shows(
        "MPI", "warn", r"the library is Open MPI v\d.*, but mpirun on PATH is mpirun \(Open MPI\) 5\.0\.1", "PATH"
    )


@pytest.fixture(scope="module")
def crash(place):
    """An overlay whose torch ends the process."""
    (place / "crash" / "torch").mkdir(parents=True)
    (place / "crash" / "torch" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    return place / "crash"


def test_a_torch_that_crashes_is_told_with_the_signal(crash):
    command = [sys.executable, "-m", "hvd_adam.doctor"]
    done = subprocess.run(command, env=environment(crash), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^fail  torch +the process ended by SIGSEGV\n +→ see whether", done.stdout, re.MULTILINE)
    assert "ok    Python" in done.stdout


def start_two(controller, other, place):
    """A doctor on two ranks of this machine, of which rank 1 does something else."""
    script = (
        f'if [ "${{HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}}" = 1 ]; then {other}; fi; '
        f"exec {sys.executable} -m hvd_adam.doctor --json --timeout 4 --output-dir {place / 'runs'}"
    )
    launcher = [sys.executable, "-m", "hvd_adam.launch.horovodrun", controller, "-np", "2", "bash", "-c", script]
    env = environment(place / "overlay")
    return Outcome(subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=150))


def test_a_rank_that_crashes_on_its_way_says_so_and_rank_0_misses_it(crash, place):
    ill = start_two("--gloo", f"export PYTHONPATH={crash}:$PYTHONPATH", place)
    assert ill.code == 1
    assert re.search(r"rank 1 on \S+: torch: the process ended by SIGSEGV: see whether", ill.stderr), ill.stderr
    ill.shows("ranks", "fail", r"rank 1 not here after 4 s; here is rank 0 on \S+", "see what the other ranks say")
    assert ill.checks["torch"].status == "ok"


def test_a_rank_that_never_arrives_at_mpis_start_is_not_waited_for_without_end(place):
    ill = start_two("--mpi", "exec sleep 300", place)
    assert ill.code == 1
    ill.shows("ranks", "fail", "not all have come to MPI's start within", "see what the other ranks say")
    assert ill.checks["torch"].status == "ok"


def test_an_output_folder_that_is_full_or_read_only_is_told(hosts, place):
    script = "from pathlib import Path; from hvd_adam.doctor.machine import _output_folder as look; "
    script += "print(look(Path({!r})))"
    small, closed = place / "small", place / "closed"
    for folder in (small, closed):
        folder.mkdir()
    with ExitStack() as mounts:
        mounts.enter_context(mounted(hosts, HEAD, "-t", "tmpfs", "-o", "size=8m", "tmpfs", small))
        mounts.enter_context(mounted(hosts, HEAD, "-t", "tmpfs", "-o", "ro", "tmpfs", closed))
        said = [
            hosts.run(
                HEAD, [sys.executable, "-c", script.format(str(folder / "run"))], env=environment(place)
            ).stdout
            for folder in (small, closed)
        ]
    assert "status='fail'" in said[0] and "8 MiB free, 100 MiB needed" in said[0] and "--output-dir" in said[0]
    assert "status='fail'" in said[1] and "Read-only file system" in said[1] and "--output-dir" in said[1]


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
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_named_in_one_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(*argv.split())


def test_hosts_may_be_given_as_to_a_launcher():
    assert config("--hosts", "a:4, me@b ,a").host_names() == ("a", "me@b")


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        (["--seconds", "-1"], {}, "--seconds is -1.0"),
        (
            ["-H", "a"],
            {"PMI_RANK": "0", "PMI_SIZE": "2"},
            "--hosts goes without a launcher, and mpiexec started this",
        ),
        ([], {"HOROVOD_ELASTIC": "1"}, "start the doctor without --min-np"),
    ],
)
def test_what_cannot_be_done_costs_one_line_and_no_import_of_torch(argv, variables, message, place):
    script = (
        "import atexit, os, runpy, sys; os._exit = sys.exit; "
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'horovod', 'numpy'} & set(sys.modules)))); "
        f"sys.argv = ['doctor', *{argv!r}]; runpy.run_module('hvd_adam.doctor', run_name='__main__')"
    )
    env = environment(place, **variables)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "heavy: []\n")
    assert done.stderr.startswith("hvd_adam.doctor: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


# From here on: judgement alone, for what no machine of ours has.


def reports(*hosts, **facts):
    return [Report(rank, host, facts=dict(facts)) for rank, host in enumerate(hosts)]


def test_ranks_with_the_same_fault_share_a_line_and_the_worst_counts():
    four = reports("a", "a", "b", "b")
    for report in four:
        bad = report.host == "b"
        report.checks = [warn("x", "low", "raise it") if bad else ok("x", "high"), ok("y", str(report.rank))]
    four[3].checks[0] = fail("x", "none", "buy one")
    merged = judge.merged(four, judge.ranks_of(four))
    assert merged == [
        fail("x", "rank 2 on b: low; rank 3 on b: none", "raise it; buy one"),
        ok("y", "0"),
    ]
    for report in four:
        report.checks = [warn("x", "low", "raise it")]
    assert judge.merged(four, judge.ranks_of(four)) == [warn("x", "everywhere: low", "raise it")]
    assert judge.merged(four[:1], judge.ranks_of(four)) == [warn("x", "low", "raise it")]


def test_the_odd_version_is_the_one_that_fewer_have_and_rank_0s_counts_in_a_draw():
    three = reports("a", "b", "c")
    for report, version in zip(three, ("2.0", "2.1", "2.1"), strict=True):
        report.versions = {"torch": version, "code hash": "x"}
    check = judge.versions(three, judge.ranks_of(three))
    assert check.found == "torch is 2.0 on rank 0 on a, 2.1 on rank 1 on b, rank 2 on c"
    assert "launch/setup.sh" in check.remedy
    assert (
        judge.versions(three[:2], judge.ranks_of(three)).found == "torch is 2.1 on rank 1 on b, 2.0 on rank 0 on a"
    )
    assert judge.versions(three[1:], judge.ranks_of(three)).status == "ok"


@pytest.mark.parametrize(
    ("gpus", "device", "status", "found"),
    [
        ([["x", "y"], ["x", "y"]], "auto", "ok", "one a rank: a 2 visible"),
        ([["x"], ["y"]], "auto", "ok", "one a rank: a 1 visible"),  # bound by Slurm
        ([["x"], ["x"]], "auto", "fail", "2 ranks on a for 1 GPU"),
        ([["x", "y"], []], "auto", "fail", "rank 1 on a sees no GPU"),
        ([["x"], ["x"]], "cpu", "ok", "none used"),
        ([[], []], "cuda", "fail", "rank 0 on a sees no GPU"),
    ],
)
def test_each_rank_needs_a_gpu_of_its_own(gpus, device, status, found):
    check = judge.gpus([Report(rank, "a", facts={"gpus": mine}) for rank, mine in enumerate(gpus)], device)
    assert (check.status, check.found) == (status, found)
    assert status == "ok" or "--device cpu" in check.remedy


@pytest.mark.parametrize(
    ("hosts", "cores", "threads", "status", "found"),
    [
        ("aa", 8, "", "ok", "a 8 cores for 2 ranks"),
        ("aa", 8, "4", "ok", "a 8 cores for 2 ranks"),
        ("aa", 8, "5", "warn", "10 threads for 8 cores"),
        ("aa", 8, "5,1", "warn", "10 threads for 8 cores"),
        ("a", 8, "1", "warn", "OMP_NUM_THREADS is 1 on a, of 8 cores a rank"),
        ("aaa", 2, "1", "warn", "a has 2 cores for 3 ranks"),
        ("a", 2, "many", "warn", "OMP_NUM_THREADS is 'many' on a: no number"),
    ],
)
def test_threads_must_fit_the_cores(hosts, cores, threads, status, found):
    check = judge.cores(reports(*hosts, cores=list(range(cores)), threads=threads), together=True)
    assert check.status == status and found in check.found


def link(a, b, rate=1e9, rtt=1e-4):
    return {"a": a, "b": b, "address": "10.0.0.1", "rate": rate, "rtt": rtt, "ahead": 0.0}


def test_the_host_that_all_slow_pairs_have_in_common_is_named():
    four = reports("a", "b", "c", "d")
    fast = [link(a, b) for a in range(4) for b in range(a + 1, 4)]
    assert measured.pairs(fast, four).status == "ok"
    slow = [one | {"rate": 3e8 if 2 in (one["a"], one["b"]) else 1e9} for one in fast]
    check = measured.pairs(slow, four)
    assert check.status == "warn" and check.found.endswith("every slow pair is with c")
    assert "slowest pair rank 0 on a and rank 2 on c: 300 MB/s" in check.found
    assert "(6 of 6 pairs, median 650 MB/s)" in check.found
    assert "(1 of 2 pairs" in measured.pairs([link(0, 1), {"a": 0, "b": 2, "address": "x"}], four).found
    late = measured.pairs([*fast[1:], link(0, 1, rtt=0.02)], four)
    assert late.status == "warn" and "rank 0 on a and rank 1 on b takes 20.00 ms" in late.found
    assert measured.pairs([link(0, 1, rate=1e6)], reports("a", "a")).status == "ok"  # no network between them


def test_an_address_that_two_hosts_have_is_told():
    check = measured.reachability([link(0, 1), link(1, 0)], reports("a", "b", addresses=["172.17.0.1"]))
    assert (
        check.status == "warn" and "172.17.0.1 is an address of a and of b" in check.found and "-i" in check.remedy
    )


@pytest.mark.parametrize(("seconds", "status"), [(0.5, "ok"), (-20, "warn"), (400, "fail")])
def test_clocks_that_differ_are_named(seconds, status):
    check = measured.clocks({"b": 0.01, "c": seconds}, "a")
    assert check.status == status and "c" in check.found
    assert status == "ok" or "chronyc" in check.remedy
    two = reports("a", "b")
    assert measured.ahead([link(0, 1) | {"ahead": 3.0}, {"a": 1, "b": 0, "address": "x"}], two) == {"b": 3.0}


def test_the_slowest_rank_is_named_and_called_slow_only_beside_the_others():
    speeds = [{"compute": 100.0}, {"compute": 90.0}, {"compute": 50.0}]
    check = measured.computing(speeds, ["a", "a", "b"])
    assert check.status == "warn" and "slowest rank 2 on b: 50.0 GFLOP/s, the others 95.0" in check.found
    assert measured.computing(speeds[:2], ["a", "a"]).status == "ok"


def test_limits_are_judged_by_what_needs_them():
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
def test_shared_memory_is_judged_by_what_is_free(total, free, status):
    assert shared_memory((total * MIB, 0, free * MIB)).status == status


def test_interfaces_are_judged_by_what_the_environment_names():
    states = {"lo": True, "ib0": False, "eth0": True}
    assert interfaces(states, "eth", ["10.0.0.1"]).status == "ok"  # NCCL takes a beginning
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
def test_a_driver_must_fit_torch(number, cuda, usable, status):
    check = driver(number, cuda, usable, "the driver is too old")
    assert check.status == status
    assert status != "fail" or "the driver is too old" in check.found


def test_software_is_judged_by_its_versions(tmp_path):
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
    assert other_abi(tmp_path, True) == ""
    (tmp_path / "torch" / "mpi_lib_v2.so").write_bytes(b"_ZNSt7__cxx1112basic_stringIcE")
    assert other_abi(tmp_path, True) == ""
    assert "new C++ ABI, torch the old one" in other_abi(tmp_path, False)
    (tmp_path / "torch" / "a.py").write_text("1")
    before = code_hash(tmp_path)
    assert before == code_hash(tmp_path)
    (tmp_path / "torch" / "a.py").write_text("2")
    assert before != code_hash(tmp_path)


def test_a_message_becomes_what_is_wrong_and_what_to_do():
    assert sentence("x", "a (b: c), says d; do e") == fail("x", "a (b: c), says d", "do e")
    assert sentence("x", "a differs: do e") == fail("x", "a differs", "do e")
    assert sentence("x", "odd").remedy


@pytest.mark.parametrize(
    ("said", "found", "remedy"),
    [
        ("Host key verification failed.", "a: its host key is unknown or has changed", "ssh-keyscan a"),
        ("ssh: connect to host a port 22: Connection timed out", "a: no answer at its ssh port", "firewall"),
        ("ssh: connect to host a port 22: No route to host", "a: no way to it", "host is up"),
        ("bash: line 1: cd: /x: No such file or directory", "is not there", "same paths"),
        ("env: ‘/x/python’: No such file or directory", "python", "launch/setup.sh"),
        ("segfault", "exit code 3 (segfault)", "see what `ssh -o BatchMode=yes a true` does"),
    ],
)
def test_what_ssh_says_becomes_a_remedy(said, found, remedy):
    check = explain("a", 3, [said])
    assert found in check.found and remedy in check.remedy


def test_of_a_librarys_outpour_one_line_is_told():
    assert (
        telling(["-----\n", "It looks like MPI_INIT failed\n", "see  the   help\n"])
        == " (It looks like MPI_INIT failed)"
    )
    assert telling(["----\n"]) == ""


def test_links_are_measured_between_hosts_or_on_one_between_ranks():
    assert points(["a", "a", "b", "b"]) == [0, 2]
    assert points(["a", "a"]) == [0, 1]
