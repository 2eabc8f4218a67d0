"""launch/setup.sh, steps.sh, build_horovod.sh, without a full installation (tests/run.sh has just made one), and
what tests/gpu/run.sh refuses.

Hazards: a second run that does work again; a damaged or empty wheel in the cache taken for a whole one; one key
for different builds; half an MPI completed with half of another; missing packages met by a stack of errors instead
of the command that installs them; a failed step that hides why; an interrupted step that leaves compilers running;
an environment made from another one, which does not see that one's torch; an nvcc on PATH that lies outside its
toolkit; GPU tests that seem to pass where there is no GPU; scripts that shellcheck would refuse.
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
    [*LAUNCH.glob("*.sh"), *ROOT.glob("docker/*.sh"), *ROOT.glob("tests/**/run.sh"), ROOT / ".ci" / "run"]
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh --dev")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["setup.sh", "build_horovod.sh", "quickstart.sh", "../tests/gpu/run.sh"])
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


def test_one_machine_alone_can_do_without_mpi_and_ssh(path_without):
    bare = path_without("apt-get", "cmake", "mpicxx", "mpirun", "ssh")
    code, _, error = run("bash", LAUNCH / "setup.sh", env=bare)
    assert code == 2 and error.count("\n") == 1 and "--without-mpi" in error
    assert "missing: libopenmpi-dev openmpi-bin openssh-client cmake (Debian's names)" in error
    code, _, error = run("bash", LAUNCH / "setup.sh", "--without-mpi", env=bare)
    assert code == 2 and error.endswith("missing: cmake (Debian's names): install them first\n")


def test_half_an_mpi_is_not_completed_with_half_of_another(path_without):
    code, _, error = run("bash", LAUNCH / "setup.sh", env=path_without("mpirun"))
    assert code == 2 and error.count("\n") == 1 and "no mpirun" in error


def test_a_folder_that_is_no_environment_is_left_alone(environment, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").touch()
    code, _, error = run("bash", LAUNCH / "setup.sh", env=environment)
    assert code == 2 and "no virtual environment" in error and (tmp_path / "venv" / "thesis.tex").exists()


# --- an environment made from another one -------------------------------------------------------------------

TORCH = """
import types
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda="13.0")
def compiled_with_cxx11_abi(): return True
"""


@pytest.fixture
def parent(tmp_path):
    """An environment with something that passes for a CUDA build of torch, for pip and for NCCL."""
    folder = tmp_path / "parent"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/*/site-packages"))
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text(TORCH)
    (packages / "pip.py").write_text(
        "raise SystemExit('nothing is installed in this test') if __name__ == '__main__' else None"
    )
    for name in ("lib/libnccl.so.2", "include/nccl.h"):
        (packages / "nvidia" / "nccl" / name).parent.mkdir(parents=True)
        (packages / "nvidia" / "nccl" / name).write_text(
            "#define NCCL_MAJOR 2\n#define NCCL_MINOR 28\n#define NCCL_PATCH 9\n"
        )
    return folder


@pytest.fixture
def toolkit(tmp_path):
    """Makes what passes for a CUDA toolkit of a release."""

    def make(release):
        folder = tmp_path / f"cuda-{release}"
        (folder / "bin").mkdir(parents=True)
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text(
            f'#!/bin/sh\nif [ "$1" = --dryrun ]; then echo "#$ TOP={folder}/bin/.." >&2; '
            f'else echo "Cuda compilation tools, release {release}, V{release}.1"; fi\n'
        )
        nvcc.chmod(0o755)
        return folder

    return make


def test_what_is_made_from_an_environment_sees_its_packages(environment, parent, toolkit, tmp_path):
    # Without ensurepip, as on a Debian without python3-venv: the parent's pip must do.
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "PYTHONPATH": str(tmp_path)}
    code, out, error = run("bash", LAUNCH / "setup.sh", "--cuda", "--without-mpi", env=env)
    assert code == 1 and "nothing is installed in this test" in error and "Installing torch " not in out

    python = tmp_path / "venv" / "bin" / "python"
    where = run(python, "-I", "-c", "import torch, sys; print(torch.__file__, sys.prefix)", env=env)[1].split()
    assert Path(where[0]).is_relative_to(parent) and where[1] == str(tmp_path / "venv")
    # Horovod's build takes the NCCL that lies beside that torch, too.
    env |= {"PYTHON": str(python), "CUDA_HOME": str(toolkit("13.0"))}
    code, key, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--without-mpi", "--print-key", env=env)
    assert (code, error) == (0, "") and "torch2.13.0+cu130-" in key and "-nompi-cuda13.0-nccl2.28.9-" in key


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


def test_a_wheel_without_mpi_is_another_one_and_needs_none(path_without, environment, parent):
    build = ["bash", LAUNCH / "build_horovod.sh", "--print-key"]
    python = {"PYTHON": str(parent / "bin" / "python")}
    bare, environment = path_without("mpicxx", "mpirun") | python, environment | python
    code, out, error = run(*build, env=bare)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "mpicxx" in error and "--without-mpi" in error
    code, key, error = run(*build, "--without-mpi", env=bare)
    assert (code, error) == (0, "") and "-nompi-" in key
    assert run(*build, "--without-mpi", env=environment)[1] == key != run(*build, env=environment)[1]


@pytest.mark.parametrize(
    ("release", "code", "says"),
    [("12.8", 2, "is CUDA 12.8, torch was built with 13.0"), ("13.2", 0, "-cuda13.2-nccl2.28.9-cc90-")],
)
def test_toolkit_and_torch_must_have_one_major_version(release, code, says, environment, parent, toolkit):
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "HOROVOD_BUILD_CUDA_CC_LIST": "90"}
    env |= {"CUDA_HOME": str(toolkit(release))}
    answer = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--print-key", env=env)
    assert answer[0] == code and says in "".join(answer[1:]) and "".join(answer[1:]).count("\n") == 1


def test_without_nccl_a_cuda_build_of_torch_gives_another_wheel_where_there_is_nvcc(environment, parent, toolkit):
    build = ["bash", LAUNCH / "build_horovod.sh", "--cpu", "--print-key"]
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "CUDA_HOME": str(parent)}
    assert "-cpu-" in run(*build, env=env)[1]
    assert "-cuda13.0-nonccl-cc" in run(*build, env=env | {"CUDA_HOME": str(toolkit("13.0"))})[1]


def test_the_nvcc_on_path_may_be_a_script_that_calls_the_toolkits(path_without, parent, toolkit, tmp_path):
    env = path_without("nvcc") | {"PYTHON": str(parent / "bin" / "python")}
    env.pop("CUDA_HOME", None)
    script = Path(env["PATH"]) / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit("13.1")}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    code, key, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--print-key", env=env)
    assert (code, error) == (0, "") and "-cuda13.1-" in key


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


# --- the tests on a GPU -------------------------------------------------------------------------------------

GPU_TESTS = ROOT / "tests" / "gpu" / "run.sh"


def test_without_a_gpu_nothing_is_tested_and_the_exit_code_is_2(path_without):
    code, out, error = run("bash", GPU_TESTS, env=path_without("nvidia-smi"))
    assert (code, out) == (2, "") and error.count("\n") == 1 and "no NVIDIA GPU here: nothing to test" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "soon"], "--minutes soon: a whole number"),
        (["--python", "3"], "--python 3: write it as 3.12"),
        (["--carried"], "--carried needs a value"),
        (["--no-gpu", "--carried", "tests"], "tests holds no source of Horovod: fill it with --pack"),
    ],
)
def test_gpu_tests_with_bad_arguments_get_one_line_and_2(arguments, says, environment):
    code, out, error = run("bash", GPU_TESTS, *arguments, env=environment)
    assert (code, out) == (2, "") and error.count("\n") == 1 and says in error


def test_a_carried_folder_does_not_hold_torch(environment, tmp_path):
    (tmp_path / "horovod-0.28.1.tar.gz").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    env = environment | {"PYTHON": str(tmp_path / "empty" / "bin" / "python")}
    code, out, error = run("bash", GPU_TESTS, "--no-gpu", "--carried", tmp_path, env=env)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "cannot import torch" in error


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
