"""torchvision without its compiled operators works for every program of an environment that `setup.sh` completed.

Hazards: only this project's process is helped; operators that are defined although they exist; torch imported at
each start of Python; `find_spec`, which other libraries call, that imports torch; a torchvision that fails for
another reason, whose message is lost; a wheel for the right build that is not used.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = next(Path(path) for path in sys.path if Path(path, "torchvision", "version.py").exists())
SITE = f"lib/python{sysconfig.get_python_version()}/site-packages"
PIP = """#!/bin/sh
case "$*" in
"-m pip "*) echo "$*" >>"$(dirname "$0")/pip.log"; exit 1 ;;
esac
exec "$(dirname "$0")/python" "$@"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with a torchvision whose library does not load, and with a pip that finds nothing."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / SITE
    # Lines without "import" add folders whose own .pth files are not read.
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    (site / "torchvision").mkdir()
    for path in (PACKAGES / "torchvision").iterdir():
        if not path.name.startswith("_C"):
            (site / "torchvision" / path.name).symlink_to(path)
    (site / "torchvision" / "_C.so").write_text("built for another torch")
    (folder / "bin" / "python_without_pip").write_text(PIP)
    (folder / "bin" / "python_without_pip").chmod(0o755)
    return folder


def python(environment, program, code=0):
    """Runs a program of a user in the environment, outside of this repository; returns its output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment / "bin" / "python", "-c", program]
    done = subprocess.run(command, cwd=environment, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stderr
    return done.stdout.strip() if code == 0 else done.stderr


def complete(environment, torch="2.13.0+cpu"):
    """Runs the step of setup.sh, with a pip that finds no wheel; returns what it was asked for."""
    script = (
        f"set -euo pipefail; ROOT={ROOT}; VENV={environment}; venv_python=$VENV/bin/python_without_pip\n"
        f"source {ROOT}/launch/lib/steps.sh; source {ROOT}/launch/lib/torchvision.sh\n"
        f"complete_torchvision {torch}"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    log = environment / "bin" / "pip.log"
    return done.stdout, log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def completed(environment):
    program = "from importlib.metadata import version; print(version('torchvision'))"
    if tuple(map(int, python(environment, program).split(".")[:2])) < (0, 17):
        pytest.skip("this torchvision is imported without its library")
    assert "operator torchvision::nms does not exist" in python(environment, "import torchvision", code=1)
    output, asked = complete(environment)
    assert "Making torchvision work with torch 2.13.0+cpu" in output and "cannot be imported" not in output
    return environment, asked


@pytest.mark.slow
def test_a_wheel_for_the_same_build_is_tried_first(completed):
    version = python(completed[0], "from importlib.metadata import version; print(version('torchvision'))")
    wheel = f"torchvision=={version.partition('+')[0]}+cpu"
    assert completed[1].splitlines() == [f"-m pip install --no-deps --force-reinstall {wheel}"]


@pytest.mark.slow
def test_any_program_of_the_environment_imports_torchvision_and_its_parts(completed):
    program = "import torchvision; print(torchvision.models.resnet18(num_classes=3).fc.out_features)"
    assert python(completed[0], program) == "3"
    program = "from torchvision.transforms import v2; from torchvision import ops; print(v2.Resize(3).size)"
    assert python(completed[0], program) == "[3]"
    boxes = "import torch, torchvision; torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)"
    assert "Couldn't load custom C++ ops" in python(completed[0], boxes, code=1)


def test_neither_the_start_of_python_nor_find_spec_imports_torch(completed):
    program = "import importlib.util, sys; importlib.util.find_spec('torchvision'); print('torch' in sys.modules)"
    assert python(completed[0], program) == "False"
    assert python(completed[0], "import importlib.util; print(importlib.util.find_spec('no_such'))") == "None"


@pytest.mark.slow
def test_a_second_set_up_does_nothing(completed):
    assert complete(completed[0]) == ("", completed[1])


def test_another_fault_of_torchvision_is_raised_as_it_is(completed, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('another fault')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision"
    assert "RuntimeError: another fault" in python(completed[0], program, code=1)
