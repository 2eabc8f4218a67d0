"""docker/: the files are linted, the CPU image is built, and its commands run in it.

Hazards: a layer contains a key, a secret of the build or a cache, which deleting it later does not remove; the
user is root, cannot read files or cannot write folders; versions differ from the pinned ones; the entry point
drops a command; sshd runs without being requested, or accepts any login; a login lacks variables that the ranks
need; the health check always succeeds; two containers do not connect.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import cpu_image
from helpers.cluster import hosts as namespaces
from helpers.cluster.hosts import Hosts
from helpers.cpu_image import MOUNT, CpuImage

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
TRAINER = 10001

# Building takes four minutes next to another test process, and three more if Horovod has to be compiled.
pytestmark = pytest.mark.timeout(1800)
no_image = cpu_image.skip_reason()
needs_image = pytest.mark.skipif(no_image is not None, reason=f"no image can be built: {no_image}")
no_hosts = namespaces.skip_reason()
needs_hosts = pytest.mark.skipif(no_hosts is not None, reason=f"no hosts made of namespaces: {no_hosts}")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    built = CpuImage(tmp_path_factory.mktemp("image"))
    print(built.table())
    yield built
    built.remove()


def docker_run(image, *arguments, **options):
    command = image.command(*arguments, **options)
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


# --- the files ----------------------------------------------------------------------------------------------


def test_health_check_passes_for_a_user_who_may_not_write_its_folder(tmp_path):
    for name, line in (("python", ""), ("nvidia-smi", "GPU 0: a")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{line}'\n")
        (tmp_path / name).chmod(0o755)
    # Outside the image there is no such folder, so that a file cannot be made there either.
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    checked = subprocess.run(
        ["bash", DOCKER / "healthcheck.sh"], env=env, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: bash launch/setup.sh --dev")
    linted = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout) == (0, "")


ENTRIES = {
    "": "mpirun.sh --",
    "--epochs 3": "mpirun.sh -- --epochs 3",
    "train --epochs 3": "mpirun.sh -- --epochs 3",
    "quickstart --epochs 3": "horovodrun.sh -np 2 -- --epochs 3",
    "bench step --models mlp": "python -m hvd_adam.bench step --models mlp",
    "doctor --json": "python -m hvd_adam.doctor --json",
    "evaluate --checkpoint runs": "python -m hvd_adam.evaluate --checkpoint runs",
    "sshd": "sshd.sh",
    "ssh-keys": "ssh_keys.sh",
    "python -m hvd_adam.train": "python -m hvd_adam.train",
}


@pytest.mark.parametrize("arguments", ENTRIES)
def test_entry_point_starts_the_documented_command(arguments, tmp_path):
    for name in ("launch/mpirun.sh", "launch/horovodrun.sh", "docker/sshd.sh", "docker/ssh_keys.sh", "bin/python"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
        program.chmod(0o755)
    entry = shutil.copy(DOCKER / "entrypoint.sh", tmp_path / "docker")
    environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run([entry, *arguments.split()], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ENTRIES[arguments] + "\n"


def test_argument_with_spaces_reaches_the_command_unchanged():
    done = subprocess.run([DOCKER / "entrypoint.sh", "echo", "a  b"], capture_output=True, text=True, check=True)
    assert done.stdout == "a  b\n"


@pytest.mark.parametrize("call", ["CDPATH", "symbolic link"])
def test_entry_point_finds_its_scripts_with(call, tmp_path):
    environ, command = {**os.environ}, "docker/entrypoint.sh"
    if call == "CDPATH":
        environ["CDPATH"] = f".:{ROOT}"
    else:
        command = str(tmp_path / "link")
        Path(command).symlink_to(DOCKER / "entrypoint.sh")
    arguments = [command, "train", "--help"]
    done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout and "--output-dir" in done.stdout


def test_versions_are_those_of_the_set_up():
    dockerfile, setup = (DOCKER / "Dockerfile").read_text(), (ROOT / "launch" / "setup.sh").read_text()
    torch = re.search(r"^ARG TORCH_VERSION=(.*)$", dockerfile, re.MULTILINE)[1]
    assert torch == re.search(r"^TORCH_PIN=(.*)$", setup, re.MULTILINE)[1]
    assert f"ARG TORCHVISION_VERSION=0.{int(torch.split('.')[1]) + 15}.{torch.split('.')[2]}" in dockerfile


def test_only_the_contents_of_the_image_are_sent_to_the_builder():
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    assert "*" in patterns and "**/__pycache__" in patterns
    assert allowed == {"docker", "hvd_adam", "launch", "LICENSE", "README.md", "pyproject.toml", "setup.cfg"}


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=len)
def test_docker_compose_accepts_its_files(files):
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed")
    options = [word for name in files for word in ("-f", str(DOCKER / name))]
    checked = subprocess.run([*command, *options, "config", "--quiet"], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr


def test_compose_files_agree_with_each_other_and_with_the_image():
    services = COMPOSE["services"]
    assert set(services) == {"ssh-keys", "host1", "host2"}
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert set(gpu) == set(services) and {service["image"] for service in gpu.values()} == {"hvd_adam"}
    for name in ("host1", "host2"):
        assert services[name]["hostname"] == name and services[name]["init"]
        assert "ssh-keys" in services[name]["depends_on"]
        for volume in services[name]["volumes"]:
            assert volume.partition(":")[0] in COMPOSE["volumes"]
    assert "host1:1,host2:1" in services["host1"]["command"]
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert "HEALTHCHECK" in dockerfile and services["host2"]["healthcheck"]["test"][1] in dockerfile


# --- the image ----------------------------------------------------------------------------------------------


@needs_image
def test_image_runs_as_an_unprivileged_user(image):
    assert image.config["User"] == str(TRAINER)
    assert docker_run(image, "id", "-u").stdout == f"{TRAINER}\n"
    for folder in ("/opt/hvd_adam", "/etc", "/usr"):
        assert docker_run(image, "test", "-w", folder).returncode == 1, folder
    readable = "find /opt/hvd_adam /etc/ssh ! -readable -print -quit"
    assert docker_run(image, *readable.split()).stdout == ""


@needs_image
def test_image_contains_exactly_the_pinned_versions(image):
    freeze = ["python", "-m", "pip", "freeze", "--all", "--exclude-editable"]
    installed = dict(
        re.split("==| @ ", line, maxsplit=1) for line in docker_run(image, *freeze).stdout.splitlines()
    )
    assert installed.pop("torch").partition("+")[0] == "2.13.0"
    assert installed.pop("torchvision") == "0.28.0" and "horovod-0.28.1" in installed.pop("horovod")
    installed.pop("pip")
    pinned = (DOCKER / "constraints.txt").read_text().splitlines()[1:]
    assert installed == dict(line.split("==") for line in pinned)


@needs_image
def test_image_trains_on_two_ranks_and_evaluates(image):
    trained = docker_run(image, "quickstart", "--epochs", "2", "--output-dir", "runs/first")
    assert trained.returncode == 0, trained.stderr
    accuracy = float(re.findall(r"test accuracy ([\d.]+)$", trained.stdout, re.MULTILINE)[-1])
    assert accuracy > 0.8 and "over 2 rank(s)" in trained.stdout
    checkpoints = image.rootfs / "workspace/runs/first/checkpoints"
    assert (checkpoints / "latest").stat().st_uid == TRAINER

    evaluated = docker_run(image, "evaluate", "--checkpoint", "runs/first", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)


@needs_image
def test_image_trains_as_any_other_user(image):
    trained = docker_run(image, "--epochs", "1", "--output-dir", "/tmp/mine", user="12345:12345")
    assert trained.returncode == 0, trained.stderr
    assert (image.rootfs / "tmp/mine/checkpoints/latest").stat().st_uid == 12345


@needs_image
@pytest.mark.parametrize("name", ["bench", "doctor"])
def test_image_has_the_other_commands(name, image):
    if not list((ROOT / "hvd_adam").glob(f"{name}*")):
        pytest.skip(f"there is no hvd_adam.{name}")
    assert docker_run(image, name, "--help").returncode == 0


def healthcheck(image):
    (form, *command) = image.config["Healthcheck"]["Test"]
    assert form == "CMD"
    return docker_run(image, *command, entry_point=False)


@needs_image
def test_health_check_detects_failures(image):
    checked = healthcheck(image)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    state = image.rootfs / "run/hvd_adam"
    assert (state / "loads").exists()  # so that the next check is fast
    try:
        (state / "sshd.pid").write_text("1\n")
        (state / "sshd_config").write_text("Port 1\n")
        checked = healthcheck(image)
        assert (checked.returncode, checked.stdout) == (1, "sshd does not respond on port 1\n")
        (state / "sshd.pid").unlink()

        (state / "loads").unlink()
        library = next(
            image.rootfs.glob("opt/hvd_adam/.venv/lib/python3*/site-packages/horovod/torch/mpi_lib_v2*.so")
        )
        library.rename(library.with_suffix(".away"))
        assert healthcheck(image).returncode == 1
        library.with_suffix(".away").rename(library)
    finally:
        for name in ("sshd.pid", "sshd_config"):
            (state / name).unlink(missing_ok=True)


@needs_image
def test_sshd_starts_only_on_request_and_with_keys(image):
    assert image.config["Entrypoint"] == ["/opt/hvd_adam/docker/entrypoint.sh"] and not image.config["Cmd"]
    refused = docker_run(image, "sshd")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1 and "/home/trainer/.ssh/authorized_keys" in refused.stderr
    assert not (image.rootfs / "run/hvd_adam/sshd.pid").exists()


# A rank with a worker that has its handler of SIGUSR1, and one without a handler. Rank 0 takes a second to save.
RANK = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, rank, own, received = Path(sys.argv[1]), os.environ["OMPI_COMM_WORLD_RANK"], os.getpid(), []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
os.fork()
parent = os.getppid()
other = subprocess.Popen(["sleep", "30"])
(folder / f"started.{os.getpid()}").touch()
while os.getppid() == parent and not received:
    time.sleep(0.02)
ended = other.poll()
other.kill()
if os.getpid() != own:
    (folder / f"worker.{rank}").write_text("signalled" if received else "")
    os._exit(0)
time.sleep(1 - int(rank))
(folder / f"saved.{rank}").write_text(str(ended))
os._exit(75)
"""

# A stub of sshd with two ranks, which a shell starts, as after a login.
SSHD = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[0]).parent
def stop(*_):
    (folder / "stopped").write_text(" ".join(sorted(path.name for path in folder.glob("saved.*"))))
    os._exit(255)
signal.signal(signal.SIGTERM, stop)
command = f"for rank in 0 1; do OMPI_COMM_WORLD_RANK=$rank {sys.executable} {folder}/rank.py {folder} & done; wait"
subprocess.call(["bash", "-c", command])
time.sleep(100)
"""


# The script is process 1, as in a container, and its ranks are the only ones that it sees.
OWN_PROCESSES = "unshare --mount --pid --fork --kill-child --mount-proc".split()


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.call([*OWN_PROCESSES, "true"], stderr=subprocess.DEVNULL) != 0,
    reason="unshare --pid is not permitted here, or not installed",
)
@pytest.mark.parametrize("seconds", [60, 0])
def test_sshd_asks_ranks_to_save_before_it_ends(seconds, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "sshd").write_text(f"#!{sys.executable}\n{SSHD}")
    (tmp_path / "sshd").chmod(0o755)
    (tmp_path / "keys").write_text("a key\n")
    script = (DOCKER / "sshd.sh").read_text().replace("/run/hvd_adam", str(tmp_path))
    (tmp_path / "sshd.sh").write_text(script.replace("/usr/sbin/sshd", str(tmp_path / "sshd")))
    environ = {**os.environ, "AUTHORIZED_KEYS": str(tmp_path / "keys"), "STOP_SECONDS": str(seconds)}
    command = [*OWN_PROCESSES, "bash", tmp_path / "sshd.sh"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as running:
        while len(list(tmp_path.glob("started.*"))) < 4:
            assert running.poll() is None
            time.sleep(0.02)
        script_pid = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text())
        os.kill(script_pid, signal.SIGTERM)
        assert running.wait(timeout=250) == 255
    stopped = (tmp_path / "stopped").read_text()
    if not seconds:
        return
    assert stopped == "saved.0 saved.1"
    assert [(tmp_path / f"saved.{rank}").read_text() for rank in (0, 1)] == ["None"] * 2  # no signal to the worker
    assert [(tmp_path / f"worker.{rank}").read_text() for rank in (0, 1)] == [""] * 2


# Files that must not be in any layer.
LITTER = re.compile(
    r"""(^|/)(ssh_host_\w+_key(\.pub)?|id_(rsa|dsa|ecdsa|ed25519)(\.pub)?|authorized_keys|known_hosts
    |pip\.conf|\.netrc|\.pypirc|\.git|\.docker|\.aws|\.cache|\.ssh/.+|.*\.(key|p12|pfx|whl|deb))$
    |^(root/.+/.+|tmp/.+|run/secrets.*|var/cache/apt/.+|var/lib/apt/lists/.+)$""",
    re.VERBOSE,
)
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]{40}")


@needs_image
def test_no_layer_contains_a_secret_a_key_or_a_cache(image):
    secrets = {path.read_bytes() for path in image.secrets.values()}
    sizes = {len(secret) for secret in secrets}
    seen = 0
    for number, tar, entry in image.files():
        seen += 1
        name = entry.name.removeprefix("./").rstrip("/")
        assert not LITTER.search(name), f"layer {number}: {name}"
        assert not entry.mode & 0o6000 or not name.startswith(("opt/", "home/")), f"set-uid: {name}"
        small = entry.size < 20_000 and not name.endswith((".py", ".pyc", ".h"))
        if entry.isfile() and (small or entry.size in sizes):
            content = tar.extractfile(entry).read()
            assert content not in secrets and not PRIVATE_KEY.search(content), f"layer {number}: {name}"
    assert seen > 10_000
    metadata = json.dumps([image.config, image.history])
    assert not any(word in metadata for word in image.settings.get("find-links", "").split())


# --- two containers -----------------------------------------------------------------------------------------

# The volumes of compose.yaml and mpijob.yaml, and folders that each container has of its own.
VOLUMES = """
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs -o mode=700,uid=10001,gid=10001 tmpfs "$1/run/hvd_adam"
mount --bind "$2/ssh" "$1/home/trainer/.ssh"
mount --bind "$2/runs" "$1/workspace/runs"
mkdir -p "$1/etc/mpi"
mount --bind "$2/mpi" "$1/etc/mpi"
"""


@pytest.fixture
def containers(image, tmp_path):
    """The hosts host1 and host2 with the image as their system, with run_in(host, command) and start_in(...)."""
    for volume in ("ssh", "runs", "mpi"):
        (tmp_path / volume).mkdir()
        os.chown(tmp_path / volume, TRAINER, TRAINER)
    with Hosts(tmp_path / "hosts", ["host1", "host2"]) as hosts:
        for name in hosts.names:
            hosts.run(
                name, ["bash", "-c", MOUNT + VOLUMES, "mount", image.rootfs, tmp_path], check=True, timeout=250
            )

        def run_in(name, *command, **variables):
            return hosts.run(name, image.chroot(*command, **variables), timeout=400)

        def start_in(name, *command):
            return hosts.popen(name, image.chroot(*command), stderr=subprocess.DEVNULL)

        hosts.run_in, hosts.start_in = run_in, start_in
        yield hosts


@needs_image
@needs_hosts
def test_two_containers_train_together_under_compose_and_the_mpi_operator(containers, tmp_path):
    services = COMPOSE["services"]
    assert containers.run_in("host1", *services["ssh-keys"]["command"]).returncode == 0
    key = (tmp_path / "ssh/id_ed25519").read_bytes()
    assert containers.run_in("host2", *services["ssh-keys"]["command"]).returncode == 0
    assert (tmp_path / "ssh/id_ed25519").read_bytes() == key  # a second start keeps it

    containers.start_in("host2", *services["host2"]["command"])
    check = services["host2"]["healthcheck"]["test"][1:]
    listening = "until (: </dev/tcp/127.0.0.1/2222) 2>/dev/null; do sleep 0.1; done"
    assert containers.run_in("host2", "timeout", "250", "bash", "-c", listening).returncode == 0
    assert containers.run_in("host2", *check).returncode == 0

    trained = containers.run_in("host1", *services["host1"]["command"], "--epochs", "1")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "over 2 rank(s)" in trained.stdout
    assert (tmp_path / "runs/compose/checkpoints/latest").stat().st_uid == TRAINER

    # The launcher of launch/mpijob.yaml, with the operator's host file and variables. It runs on a host without
    # ranks: both ranks are on host2.
    (tmp_path / "mpi/hostfile").write_text("host2 slots=2\n")
    (_, job) = yaml.safe_load_all((ROOT / "launch/mpijob.yaml").read_text())
    (launcher,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    operator = {
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    }
    trained = containers.run_in("host1", *launcher["args"], "--epochs", "1", **operator)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "over 2 rank(s)" in trained.stdout
    assert (tmp_path / "runs/hvd-adam/checkpoints/latest").exists()

    # A login without a key is refused.
    for name in ("id_ed25519", "id_ed25519.pub"):
        (tmp_path / "ssh" / name).unlink()
    refused = containers.run_in("host1", "ssh", "host2", "true")
    assert refused.returncode == 255 and "Permission denied (publickey)" in refused.stderr
