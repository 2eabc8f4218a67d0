"""launch/setup.sh, steps.sh and build_horovod.sh, without a full installation (tests/run.sh has just made one).

Hazards: a second run that does work again; a damaged or empty wheel in the cache taken for a whole one; one key
for different builds; half an MPI completed with half of another; missing packages met by a stack of errors instead
of the command that installs them; a failed step that hides why; an interrupted step that leaves compilers running;
scripts that shellcheck would refuse.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(
    [*LAUNCH.glob("*.sh"), *ROOT.glob("docker/*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
)


@pytest.fixture
def environment(tmp_path):
    """Everything the scripts write lands in tmp_path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HVD_ADAM_", "HOROVOD_"))}
    places = {"HVD_ADAM_VENV": str(tmp_path / "venv"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return clean | places | {"PYTHON": sys.executable}


def run(*command, env):
    answer = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=100, check=False
    )
    return answer.returncode, answer.stdout, answer.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh --dev")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["setup.sh", "build_horovod.sh", "quickstart.sh"])
def test_an_unknown_option_gets_one_line_and_2(script, environment):
    code, out, error = run("bash", LAUNCH / script, "--fast", env=environment)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "--fast" in error


def test_cpu_and_cuda_exclude_each_other(environment):
    code, _, error = run("bash", LAUNCH / "setup.sh", "--cpu", "--cuda", env=environment)
    assert code == 2 and "exclude" in error


def test_a_second_run_finds_everything_and_changes_nothing():
    venv = Path(os.environ.get("HVD_ADAM_VENV", ROOT / ".venv"))
    stamp = venv / "hvd_adam_setup"
    if not stamp.exists():
        pytest.skip(f"{venv} was not made by launch/setup.sh")
    before = stamp.stat().st_mtime_ns
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code, out, error = run("bash", LAUNCH / "setup.sh", "--dev", env=clean)
    assert (code, error) == (0, "") and out == f"Everything is set up in {venv}.\n"
    assert stamp.stat().st_mtime_ns == before


def test_what_is_installed_is_described_without_importing_it(environment):
    code, out, error = run(
        sys.executable, "-X", "importtime", "-I", LAUNCH / "describe_environment.py", env=environment
    )
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and " torch" not in error
    assert lines["torch"].split()[1] == version("torch") and "cuda" in lines["torch"]
    assert "mpi_lib_v2" in lines["horovod"]


# --- system packages ----------------------------------------------------------------------------------------


@pytest.fixture
def path_without(tmp_path, environment):
    """An environment whose PATH holds the system's programs except the named ones."""

    def make(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for place in ("/usr/local/bin", "/bin", "/usr/bin"):
            for program in Path(place).iterdir():
                link = folder / program.name
                if program.name not in names and not link.is_symlink():
                    link.symlink_to(program)
        return environment | {"PATH": str(folder)}

    return make


def test_missing_packages_are_listed_where_there_is_no_apt(path_without):
    code, _, error = run("bash", LAUNCH / "setup.sh", env=path_without("apt-get", "cmake", "g++"))
    assert code == 2 and error.count("\n") == 1 and "missing: cmake g++ (Debian's names)" in error


def test_the_command_that_installs_them_is_shown_to_users_other_than_root(path_without):
    # A user namespace without a mapping turns any user into nobody, who may still read these files.
    nobody = ["unshare", "--user"] if os.geteuid() == 0 else []
    if nobody and subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    code, _, error = run(*nobody, "bash", LAUNCH / "setup.sh", env=path_without("cmake"))
    if shutil.which("apt-get") is None:
        pytest.skip("no apt here")
    assert code == 2 and error.count("\n") == 1
    assert error.endswith("apt-get update && apt-get install -y --no-install-recommends cmake\n")


def test_half_an_mpi_is_not_completed_with_half_of_another(path_without):
    code, _, error = run("bash", LAUNCH / "setup.sh", env=path_without("mpirun"))
    assert code == 2 and error.count("\n") == 1 and "no mpirun" in error


def test_a_folder_that_is_no_environment_is_left_alone(environment, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").touch()
    code, _, error = run("bash", LAUNCH / "setup.sh", env=environment)
    assert code == 2 and "no virtual environment" in error and (tmp_path / "venv" / "thesis.tex").exists()


# --- Horovod's wheel ----------------------------------------------------------------------------------------


def test_the_key_names_what_the_wheel_depends_on(environment):
    code, out, _ = run("bash", LAUNCH / "build_horovod.sh", "--print-key", env=environment)
    assert code == 0
    torch_version = version("torch")
    assert (
        out.startswith(f"0.28.1-torch{torch_version}") and f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in out
    )
    mpi = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    assert mpi.split()[-1] in out and os.uname().machine in out


def test_only_a_whole_wheel_is_taken_from_the_cache(environment, tmp_path):
    build = ["bash", LAUNCH / "build_horovod.sh"]
    _, key, _ = run(*build, "--print-key", env=environment)
    folder = tmp_path / "cache" / "hvd_adam" / "horovod" / key.strip()
    folder.mkdir(parents=True)
    wheel = folder / "horovod-0.28.1-py3-none-any.whl"
    content = os.urandom(1000)
    wheel.write_bytes(content)
    (folder / "sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  ./{wheel.name}\n")
    assert run(*build, env=environment)[:2] == (0, f"{wheel}\n")  # found, so nothing is built

    for damaged in (content[:500], b""):
        wheel.write_bytes(damaged)
        assert run(*build, "--check", env=environment)[0] == 1


def test_a_gpu_build_is_refused_where_torch_is_a_cpu_build(environment):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    code, out, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--check", env=environment)
    assert (code, out) == (2, "") and "CUDA build of torch" in error and error.count("\n") == 1


# --- steps --------------------------------------------------------------------------------------------------

STEP = f"set -euo pipefail; source {LAUNCH}/common.sh; source {LAUNCH}/steps.sh; step trial Trying "


def test_a_failed_step_shows_the_end_of_its_log_and_where_the_log_is(environment, tmp_path):
    command = ["bash", "-c", STEP + "bash -c 'seq 30; exit 3'; echo went on"]
    code, out, error = run(*command, env=environment)
    assert code == 1 and "FAILED" in out and "went on" not in out
    lines = error.splitlines()
    assert lines[:-1] == [f"  | {number}" for number in range(11, 31)]
    assert str(tmp_path / "venv" / "log" / "trial.log") in lines[-1]


def test_a_step_that_ends_well_says_so(environment):
    code, out, error = run("bash", "-c", STEP + "true; echo went on", env=environment)
    assert (code, error) == (0, "") and out.startswith("Trying ...\n  done in ") and out.endswith("went on\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_setup_takes_the_running_step_with_it(number, environment, tmp_path):
    inner = f'bash -c "echo \\$\\$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 1000; true"'
    process = subprocess.Popen(["bash", "-c", STEP + inner], env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 128 + number
    inner_pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{inner_pid}").exists():
        time.sleep(0.02)
