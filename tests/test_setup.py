"""launch/setup.sh, the build of Horovod, the wheel, and the arguments of tests/gpu/run.sh.

There is no full installation here: tests/run.sh has just made one.

Hazards: a second run repeats work; a damaged or empty wheel in the cache is installed; two different builds have
one key; apt completes an MPI with parts of another one; missing packages give many errors instead of the command
that installs them; a failed step hides the reason; an interrupted step leaves compilers running; an environment
made from another one does not see its torch; the nvcc on PATH is outside its toolkit; GPU tests seem to pass
without a GPU; the wheel lacks files, so that the build of Horovod works in a clone only.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FOLDERS = ("launch/*.sh", "hvd_adam/*/build_horovod.sh", "docker/*.sh", "tests/**/run.sh")
SCRIPTS = sorted([*(path for pattern in FOLDERS for path in ROOT.glob(pattern)), ROOT / ".ci" / "run"])
SOURCED = [*ROOT.glob("launch/lib/*.sh"), *ROOT.glob("hvd_adam/build_horovod/shell.sh")]


@pytest.fixture
def environment(tmp_path):
    """An environment in which the scripts write to tmp_path only."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HVD_ADAM_", "HOROVOD_"))}
    folders = {"HVD_ADAM_VENV": str(tmp_path / "venv"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return clean | folders | {"PYTHON": sys.executable}


def run(*command, env):
    answer = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=250, check=False
    )
    return answer.returncode, answer.stdout, answer.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh --dev")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCED], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pipe_ends_in_a_command_that_stops_reading(script):
    # With pipefail, the command before it then fails by SIGPIPE, if it has not finished by chance.
    assert re.findall(r"\|\s*(?:grep +(?:-\S+ +)*-\w*[qm].*|head\b.*)", script.read_text()) == []


@pytest.mark.parametrize("script", ["setup.sh", "build_horovod.sh", "horovodrun.sh"])
def test_scripts_need_no_home(script, environment):
    env = {name: value for name, value in environment.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    code, out, error = run("bash", LAUNCH / script, "--help", env=env)
    assert (code, error) == (0, "") and "launch/" in out


@pytest.mark.parametrize("script", ["setup.sh", "build_horovod.sh", "quickstart.sh", "../tests/gpu/run.sh"])
def test_unknown_option_gets_one_line_and_exit_code_2(script, environment):
    code, out, error = run("bash", LAUNCH / script, "--fast", env=environment)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "--fast" in error


def test_a_cache_that_cannot_be_written_is_one_line(environment, tmp_path):
    (tmp_path / "file").touch()
    code, out, error = run(
        "bash", LAUNCH / "setup.sh", env=environment | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    )
    line = f"no write access to {tmp_path}/file/hvd_adam: set XDG_CACHE_HOME to a folder that you may write to"
    assert (code, out, error) == (2, "", f"setup.sh: {line}\n")


def test_cpu_and_cuda_together_are_refused(environment):
    code, _, error = run("bash", LAUNCH / "setup.sh", "--cpu", "--cuda", env=environment)
    assert code == 2 and "exclude" in error


def test_second_run_changes_nothing():
    venv = Path(os.environ.get("HVD_ADAM_VENV", ROOT / ".venv"))
    stamp = venv / "hvd_adam_setup"
    if not stamp.exists():
        pytest.skip(f"{venv} was not made by launch/setup.sh")
    if venv.is_symlink():  # as in a worktree, whose files may differ from those that were installed
        pytest.skip(f"{venv} is the environment of another checkout, which a set-up would change")
    before = stamp.stat().st_mtime_ns
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code, out, error = run("bash", LAUNCH / "setup.sh", "--dev", env=clean)
    assert (code, error) == (0, "") and out == f"Everything is set up in {venv}.\n"
    assert stamp.stat().st_mtime_ns == before


def test_installed_packages_are_described_without_importing_them(environment):
    code, out, error = run(
        sys.executable, "-X", "importtime", "-I", LAUNCH / "lib" / "describe_environment.py", env=environment
    )
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and " torch" not in error
    assert lines["torch"].split()[1] == version("torch") and "cuda" in lines["torch"]
    assert "mpi_lib_v2" in lines["horovod"]


# --- system packages ----------------------------------------------------------------------------------------


@pytest.fixture
def path_without(tmp_path, environment):
    """Makes an environment with the system's programs on PATH, except the named ones."""

    def make(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for system_folder in ("/usr/local/bin", "/bin", "/usr/bin"):
            for program in Path(system_folder).iterdir():
                link = folder / program.name
                if program.name not in names and not link.is_symlink():
                    link.symlink_to(program)
        return environment | {"PATH": str(folder)}

    return make


def test_missing_packages_are_listed_without_apt(path_without):
    code, _, error = run("bash", LAUNCH / "setup.sh", env=path_without("apt-get", "cmake", "g++"))
    assert code == 2 and error.count("\n") == 1 and "missing: cmake g++ (Debian's names)" in error


def test_a_python_that_does_not_exist_is_refused_before_anything_is_installed(path_without, tmp_path):
    env = path_without("apt-get", "cmake") | {"PYTHON": "/nope/python"}
    code, out, error = run("bash", LAUNCH / "setup.sh", env=env)
    assert (code, out, error) == (2, "", "setup.sh: PYTHON=/nope/python is not a program\n")
    assert not (tmp_path / "cache").exists()


def test_users_other_than_root_get_the_command_that_installs_missing_packages(path_without):
    # A user namespace without a mapping turns any user into nobody, who may still read these files.
    nobody = ["unshare", "--user"] if os.geteuid() == 0 else []
    if nobody and subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    code, _, error = run(*nobody, "bash", LAUNCH / "setup.sh", env=path_without("cmake"))
    if shutil.which("apt-get") is None:
        pytest.skip("no apt here")
    assert code == 2 and error.count("\n") == 1
    assert error.endswith("apt-get update && apt-get install -y --no-install-recommends cmake\n")


def test_without_mpi_neither_mpi_nor_ssh_is_needed(path_without):
    bare = path_without("apt-get", "cmake", "mpicxx", "mpirun", "ssh")
    code, _, error = run("bash", LAUNCH / "setup.sh", env=bare)
    assert code == 2 and error.count("\n") == 1 and "--without-mpi" in error
    assert "missing: libopenmpi-dev openmpi-bin openssh-client cmake (Debian's names)" in error
    code, _, error = run("bash", LAUNCH / "setup.sh", "--without-mpi", env=bare)
    assert code == 2 and error.endswith("missing: cmake (Debian's names): install them first\n")


def test_incomplete_mpi_is_refused(path_without):
    code, _, error = run("bash", LAUNCH / "setup.sh", env=path_without("mpirun"))
    assert code == 2 and error.count("\n") == 1 and "no mpirun" in error


def test_folder_that_is_not_an_environment_is_not_changed(environment, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").touch()
    code, _, error = run("bash", LAUNCH / "setup.sh", env=environment)
    assert code == 2 and "is not a virtual environment" in error and (tmp_path / "venv" / "thesis.tex").exists()


# --- an environment made from another one -------------------------------------------------------------------

TORCH = """
import types
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda="13.0")
def compiled_with_cxx11_abi(): return True
"""


@pytest.fixture
def parent(tmp_path):
    """An environment with stubs of a CUDA build of torch, of pip and of NCCL."""
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
    """Makes a stub of the CUDA toolkit of a release."""

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


def test_environment_made_from_another_one_sees_its_packages(environment, parent, toolkit, tmp_path):
    # Without ensurepip, as on Debian without python3-venv, the parent's pip is used.
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "PYTHONPATH": str(tmp_path)}
    code, out, error = run("bash", LAUNCH / "setup.sh", "--cuda", "--without-mpi", env=env)
    assert code == 1 and "nothing is installed in this test" in error and "Installing torch " not in out

    python = tmp_path / "venv" / "bin" / "python"
    where = run(python, "-I", "-c", "import torch, sys; print(torch.__file__, sys.prefix)", env=env)[1].split()
    assert Path(where[0]).is_relative_to(parent) and where[1] == str(tmp_path / "venv")
    # Horovod's build uses the NCCL of the parent, too.
    env |= {"PYTHON": str(python), "CUDA_HOME": str(toolkit("13.0"))}
    code, key, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--without-mpi", "--print-key", env=env)
    assert (code, error) == (0, "") and "torch2.13.0+cu130-" in key and "-nompi-cuda13.0-nccl2.28.9-" in key


# --- Horovod's wheel ----------------------------------------------------------------------------------------


def test_key_contains_what_the_wheel_depends_on(environment):
    code, out, _ = run("bash", LAUNCH / "build_horovod.sh", "--print-key", env=environment)
    assert code == 0
    torch_version = version("torch")
    assert (
        out.startswith(f"0.28.1-torch{torch_version}") and f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in out
    )
    mpi = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    assert mpi.split()[-1] in out and os.uname().machine in out


def test_wheel_without_mpi_has_its_own_key_and_needs_no_mpi(path_without, environment, parent):
    build = ["bash", LAUNCH / "build_horovod.sh", "--print-key"]
    python = {"PYTHON": str(parent / "bin" / "python")}
    bare, environment = path_without("mpicxx", "mpirun") | python, environment | python
    code, out, error = run(*build, env=bare)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "mpicxx" in error and "--without-mpi" in error
    code, key, error = run(*build, "--without-mpi", env=bare)
    assert (code, error) == (0, "") and "-nompi-" in key
    assert run(*build, "--without-mpi", env=environment)[1] == key != run(*build, env=environment)[1]


@pytest.mark.parametrize(
    ("release", "code", "message"),
    [("12.8", 2, "is CUDA 12.8, torch was built with 13.0"), ("13.2", 0, "-cuda13.2-nccl2.28.9-cc90-")],
)
def test_toolkit_and_torch_must_have_the_same_major_version(release, code, message, environment, parent, toolkit):
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "HOROVOD_BUILD_CUDA_CC_LIST": "90"}
    env |= {"CUDA_HOME": str(toolkit(release))}
    answer = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--print-key", env=env)
    assert answer[0] == code and message in "".join(answer[1:]) and "".join(answer[1:]).count("\n") == 1


def test_cuda_build_of_torch_without_nccl_has_its_own_key_with_nvcc(environment, parent, toolkit):
    build = ["bash", LAUNCH / "build_horovod.sh", "--cpu", "--print-key"]
    env = environment | {"PYTHON": str(parent / "bin" / "python"), "CUDA_HOME": str(parent)}
    assert "-cpu-" in run(*build, env=env)[1]
    assert "-cuda13.0-nonccl-cc" in run(*build, env=env | {"CUDA_HOME": str(toolkit("13.0"))})[1]


def test_nvcc_on_path_may_be_a_script_that_calls_the_toolkit(path_without, parent, toolkit, tmp_path):
    env = path_without("nvcc") | {"PYTHON": str(parent / "bin" / "python")}
    env.pop("CUDA_HOME", None)
    script = Path(env["PATH"]) / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit("13.1")}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    code, key, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--print-key", env=env)
    assert (code, error) == (0, "") and "-cuda13.1-" in key


@pytest.mark.slow
def test_only_an_undamaged_wheel_is_taken_from_the_cache(environment, tmp_path):
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


def test_gpu_build_is_refused_with_a_cpu_build_of_torch(environment):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    code, out, error = run("bash", LAUNCH / "build_horovod.sh", "--cuda", "--check", env=environment)
    assert (code, out) == (2, "") and "CUDA build of torch" in error and error.count("\n") == 1


# --- the wheel of the project -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy so that the build leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "hvd_adam", folder / "hvd_adam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, folder], check=True, timeout=250)
    return next((folder / "dist").glob("*.whl"))


def test_wheel_contains_scripts_rules_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("hvd_adam/") for name in archive.namelist()}
    assert {"py.typed", "distributed/openmpi_allreduce.rules"} <= names
    build = ("__main__.py", "build_horovod.sh", "shell.sh", "cxx20.cmake", "standard_override.cmake")
    assert {f"build_horovod/{name}" for name in build} <= names
    launch = ("horovodrun.py", "srun.py", "signal_proxy.py", "stderr_filter.py", "check_allreduce.py")
    assert {f"launch/{name}" for name in launch} <= names
    assert not any(name.startswith(("tests/", "launch/lib/")) for name in names)


def test_base_requirements_are_torch_numpy_and_filelock(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    base = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert base == {"torch", "numpy", "filelock"}
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"horovod", "train", "export", "dev", "all"}


@pytest.mark.slow
def test_horovods_build_runs_from_the_wheel(wheel, environment, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = environment | {"PYTHONPATH": str(tmp_path / "site"), "PYTHON": "/none"}
    module = [sys.executable, "-m", "hvd_adam.build_horovod"]

    def build(*arguments):
        done = subprocess.run([*module, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, error = build("--help")
    assert (code, error) == (0, "") and "python -m hvd_adam.build_horovod" in out
    code, out, error = build("--fast")
    assert (code, out) == (2, "") and error.count("\n") == 1 and "--fast" in error
    script = run("bash", LAUNCH / "build_horovod.sh", "--print-key", env=environment)
    assert build("--print-key") == script and script[0] == 0


# --- the tests on a GPU -------------------------------------------------------------------------------------

GPU_TESTS = ROOT / "tests" / "gpu" / "run.sh"


def test_gpu_tests_without_a_gpu_exit_with_2(path_without):
    code, out, error = run("bash", GPU_TESTS, env=path_without("nvidia-smi"))
    assert (code, out) == (2, "") and error.count("\n") == 1 and "no NVIDIA GPU here: nothing to test" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "soon"], "--minutes soon: must be a whole number"),
        (["--python", "3"], "--python 3: must have the form 3.12"),
        (["--carried"], "--carried needs a value"),
        (["--no-gpu", "--carried", "tests"], "tests contains no source of Horovod: fill it with --pack"),
    ],
)
def test_gpu_tests_with_bad_arguments_get_one_line_and_exit_code_2(arguments, message, environment):
    code, out, error = run("bash", GPU_TESTS, *arguments, env=environment)
    assert (code, out) == (2, "") and error.count("\n") == 1 and message in error


def test_gpu_tests_with_carried_packages_need_a_python_with_torch(environment, tmp_path):
    (tmp_path / "horovod-0.28.1.tar.gz").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    env = environment | {"PYTHON": str(tmp_path / "empty" / "bin" / "python")}
    code, out, error = run("bash", GPU_TESTS, "--no-gpu", "--carried", tmp_path, env=env)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "cannot import torch" in error


# --- steps --------------------------------------------------------------------------------------------------

STEP = f"set -euo pipefail; source {LAUNCH}/lib/common.sh; source {LAUNCH}/lib/steps.sh; run_step trial Trying "


def test_failed_step_prints_the_end_and_the_path_of_its_log(environment, tmp_path):
    command = ["bash", "-c", STEP + "bash -c 'seq 30; exit 3'; echo continued"]
    code, out, error = run(*command, env=environment)
    assert code == 1 and "FAILED" in out and "continued" not in out
    lines = error.splitlines()
    assert lines[:-1] == [f"  | {number}" for number in range(11, 31)]
    assert str(tmp_path / "venv" / "log" / "trial.log") in lines[-1]


def test_successful_step_reports_its_time(environment):
    code, out, error = run("bash", "-c", STEP + "true; echo continued", env=environment)
    assert (code, error) == (0, "") and out.startswith("Trying ...\n  done in ") and out.endswith("continued\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_setup_ends_the_running_step(number, environment, tmp_path):
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
