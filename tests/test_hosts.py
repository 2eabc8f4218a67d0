"""launch/mpirun.sh and horovodrun.sh on several hosts, with real ssh between them (hosts made of namespaces).

Hazards: each rank trains by itself; variables do not reach remote ranks; a port, a key or an interface is ignored;
ranks are not placed as the slots require; a host that is unreachable or has different software or arguments is
detected late or never, or is reported in many lines or without its name.
"""

import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from helpers.cluster.hosts import HEAD, SSHD, Hosts, package_folders, skip_reason
from helpers.forked_python import forked_python
from helpers.training_runs import ROOT, checkpoint, events, train
from recovery import MODEL

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=f"no hosts made of namespaces: {skip_reason()}")

OPTIONS = "--model paced:build --precision fp64 --log-every 1 --epochs 2".split()
BOTH = "node1:2,node2:2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "paced.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="module")
def hosts(folder):
    with Hosts(folder / "hosts", ["node1", "node2"]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(folder):
    """The final weights of 4 ranks on this machine."""
    environ = {"PYTHONPATH": f"{folder}:{ROOT}", "PAUSE": "0"}
    assert train(*OPTIONS, ranks=4, folder=folder / "one_host", env=environ).returncode == 0
    return checkpoint(folder / "one_host")["model"]


def launch(hosts, folder, script, *arguments):
    name, *controller = script.split()
    command = ["bash", ROOT / "launch" / name, *controller, *arguments]
    environ = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": f"{folder}:{ROOT}"}
    environ |= {"HVD_ADAM_PYTHON": forked_python(), "HOME": "/root"}
    return hosts.run(HEAD, command, env=environ, timeout=250)


@contextmanager
def another_sshd(hosts, folder):
    """Runs a second sshd on every host, at port 2222, which accepts only a key of its own."""
    key = folder / "another_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    servers = []
    for host in hosts.names:
        settings = (hosts.folder / f"sshd_{host}").read_text()
        settings = settings.replace(str(hosts.folder / "key.pub"), f"{key}.pub") + "Port 2222\n"
        (folder / f"sshd_{host}_2222").write_text(settings)
        servers.append(hosts.popen(host, [SSHD, "-D", "-f", folder / f"sshd_{host}_2222"]))
    yield key
    for server in servers:
        server.kill()
        server.wait()


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh --mpi", "horovodrun.sh --gloo"])
def test_two_hosts_train_like_one(script, hosts, folder, expected, tmp_path):
    common = ["-i", "eth0", "-x", "PAUSE=0"]
    arguments = ["--", *OPTIONS, "--output-dir", tmp_path / "run"]
    if script == "mpirun.sh":
        done = launch(hosts, folder, script, "-np", 4, "-H", BOTH, *common, *arguments)
    elif "mpi" in script:
        (tmp_path / "hosts").write_text("# different slots\nnode1 slots=1\nnode2 slots=3\n")
        done = launch(hosts, folder, script, "--hostfile", tmp_path / "hosts", *common, *arguments)
    else:
        with another_sshd(hosts, tmp_path) as key:
            ssh = ["--ssh-port", 2222, "--ssh-key", key]
            done = launch(hosts, folder, script, "-H", BOTH, *ssh, *common, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(tmp_path / "run", "end")[0]["world_size"] == 4
    for name, weight in checkpoint(tmp_path / "run")["model"].items():
        # 22 updates in float64, with sums in a possibly different order.
        assert (weight - expected[name]).abs().max() <= 1e-12, name


@contextmanager
def replaced(hosts, host, path, other):
    """Replaces a file or folder on one host."""
    hosts.run(host, ["mount", "--bind", other, path], check=True)
    yield
    hosts.run(host, ["umount", path], check=True)


def one_line(done):
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    return lines[0]


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh --gloo"])
def test_unusable_host_is_named_with_the_remedy_in_one_line(script, hosts, folder, tmp_path):
    def error_of(*arguments):
        return one_line(
            launch(hosts, folder, script, *arguments, "--", *OPTIONS, "--output-dir", tmp_path / "run")
        )

    assert "node9: unknown host; " in error_of("-H", "node1:2,node9:2")
    assert "node1: its ssh port is closed; start sshd there" in error_of("-H", BOTH, "--ssh-port", 2299)
    if script == "mpirun.sh":  # the scripts differ only in when they check the hosts
        with another_sshd(hosts, tmp_path):
            line = error_of("-H", BOTH, "--ssh-port", 2222)
            assert "node1: ssh " in line and "; ssh-copy-id node1" in line
        (tmp_path / "empty").mkdir()
        with ExitStack() as replacements:
            for package in package_folders():
                replacements.enter_context(replaced(hosts, "node2", package, tmp_path / "empty"))
            line = error_of("-H", BOTH)
            assert "node2: No module named" in line and "launch/setup.sh" in line
    (tmp_path / "version.py").write_text("__version__ = '2.9.1'\n")
    with replaced(hosts, "node2", Path(torch.__file__).with_name("version.py"), tmp_path / "version.py"):
        assert f"node2: torch 2.9.1 is installed there, {torch.__version__} here; " in error_of("-H", BOTH)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh --gloo"])
def test_host_with_different_arguments_is_named(script, hosts, folder, tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 0.002\n")
    (tmp_path / "other.yaml").write_text("lr: 0.003\n")
    with replaced(hosts, "node2", tmp_path / "run.yaml", tmp_path / "other.yaml"):
        arguments = ["--", "--config", tmp_path / "run.yaml", "--output-dir", tmp_path / "run"]
        done = launch(hosts, folder, script, "-H", BOTH, "-i", "eth0", *arguments)
    assert "lr is 0.002 on rank 0 and 0.003 on rank 2 on node2" in one_line(done)
    assert not (tmp_path / "run").exists()
