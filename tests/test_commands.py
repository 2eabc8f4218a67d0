"""`python -m hvd_adam`, and commands in environments without some or all third-party packages.

Hazards: a list of commands that needs torch; a traceback for a typo or a missing package; a remedy that names the
wrong extra; a doctor that cannot run where something is missing, which is where it is needed.
"""

import ast
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from hvd_adam.__main__ import COMMANDS
from hvd_adam.arguments import parse
from hvd_adam.config import EvaluateConfig
from hvd_adam.errors import UserError
from hvd_adam.extras import BASE, EXTRAS

ROOT = Path(__file__).parents[1]

# As sitecustomize: Python finds no module of the packages in HIDDEN, nor do the processes that it starts.
HIDE = """
import os, sys
from importlib.machinery import PathFinder

hidden = os.environ["HIDDEN"].split()

class Finder:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(*argv, python=sys.executable, **environ):
    return subprocess.run(
        [python, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with nothing but the standard library."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture
def hide(tmp_path):
    """Returns the variables that hide packages from a Python."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    return lambda *packages: {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HIDDEN": " ".join(packages)}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_commands_are_listed_one_a_line_with_the_standard_library_alone(bare_python, argv):
    done = run("-m", "hvd_adam", *argv, python=bare_python)
    assert (done.returncode, done.stderr) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"  {name:<15} {summary}\n" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_is_listed_can_be_run(name):
    package = ROOT / "hvd_adam" / name
    if name == "build_horovod" and not package.exists():
        pytest.skip("this installation has no build of Horovod")
    assert package.with_suffix(".py").exists() or (package / "__main__.py").exists()


def test_a_command_gets_its_own_arguments_and_exit_code():
    argv = ["evaluate", "--checkpoint", "", "--batch-size", "7"]
    direct, listed = run("-m", f"hvd_adam.{argv[0]}", *argv[1:]), run("-m", "hvd_adam", *argv)
    assert (listed.returncode, listed.stdout, listed.stderr) == (2, direct.stdout, direct.stderr)
    assert "hvd_adam.evaluate: error: --checkpoint is missing" in listed.stderr


@pytest.mark.parametrize(
    ("name", "near"), [("trainn", "train"), ("doktor", "doctor"), ("build-horovd", "build_horovod")]
)
def test_an_unknown_command_is_refused_in_one_line_with_near_names(bare_python, name, near):
    done = run("-m", "hvd_adam", name, python=bare_python)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{name}'" in done.stderr and near in done.stderr and done.stderr.count("\n") == 1


def test_the_package_can_be_imported_with_the_standard_library_alone(bare_python):
    done = run("-c", "import hvd_adam; print(hvd_adam.__version__)", python=bare_python)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_a_command_without_its_extra_is_refused_in_one_line(bare_python, command):
    done = run("-m", f"hvd_adam.{command}", python=bare_python)
    assert (done.returncode, done.stdout) == (2, "")
    remedy = "jsonargparse is not installed: pip install '.[train]' in the clone of hvd_adam"
    assert done.stderr == f"hvd_adam.{command}: error: {remedy}\n"


@pytest.mark.parametrize(
    ("hidden", "remedy"),
    [
        ("jsonargparse", "pip install '.[train]' in the clone of hvd_adam"),
        ("yaml", "pip install '.[train]' in the clone of hvd_adam"),
        ("tqdm", "pip install '.[train]' in the clone of hvd_adam"),
        ("sklearn", "pip install '.[train]' in the clone of hvd_adam"),
        ("torch", "pip install torch"),
        ("horovod", "python -m hvd_adam.build_horovod"),
    ],
)
def test_training_without_a_package_is_refused_in_one_line_with_the_remedy(hide, hidden, remedy, tmp_path):
    done = run("-m", "hvd_adam.train", "--output-dir", str(tmp_path / "run"), **hide(hidden))
    assert done.returncode == 2, done.stderr
    assert remedy in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_the_training_command_names_a_missing_package_at_its_start(hide, tmp_path, package):
    done = run("-m", "hvd_adam.train", "--output-dir", str(tmp_path / "run"), **hide(package))
    assert (done.returncode, done.stdout) == (2, "")
    remedy = f"{package} is not installed: pip install '.[train]' in the clone of hvd_adam"
    assert done.stderr == f"hvd_adam.train: error: {remedy}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_single_process_needs_no_psutil(hide):
    program = (
        "from hvd_adam.recovery.peer_server import host_addresses; import hvd_adam.recovery.watchdog, "
        "hvd_adam.recovery.elastic; print(*host_addresses())"
    )
    done, whole = run("-c", program, **hide("psutil")), run("-c", program)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(whole.stdout.split())


def plain(monkeypatch, *argv):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    return parse(EvaluateConfig, "hvd_adam.evaluate", argv)


def test_without_jsonargparse_options_have_the_same_names_and_types(monkeypatch):
    argv = ["--checkpoint=x", "--batch_size", "8", "--device", "cpu", "--json", "--dataset", "digits"]
    config = parse(EvaluateConfig, "hvd_adam.evaluate", argv)
    assert (config.batch_size, config.device, config.json, config.data_dir) == (8, "cpu", True, None)
    assert plain(monkeypatch, *argv) == config
    assert plain(monkeypatch, *argv, "--no-json") != config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--foo 1", "--foo is not an option"),
        ("--batch-size x", "--batch-size is x: it must be a whole number"),
        ("--batch-size 0", "--batch-size is 0: it must be at least 1"),
        ("--batch-size", "--batch-size needs a value: it must be a whole number"),
        ("--device tpu", "--device is tpu: it must be one of auto, cpu, cuda"),
        ("--config run.yaml", "--config needs jsonargparse, .* pip install '\\.\\[train\\]' in the clone"),
    ],
)
def test_without_jsonargparse_a_wrong_argument_is_one_line_too(monkeypatch, argv, message):
    with pytest.raises(UserError, match=message) as refusal:
        plain(monkeypatch, "--checkpoint", "x", *argv.split())
    assert "\n" not in str(refusal.value)


def test_every_third_party_import_of_the_package_has_a_remedy():
    known = {*BASE, *EXTRAS, "hvd_adam", "horovod", "triton", "apex", "deepspeed"}
    for path in (ROOT / "hvd_adam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert packages <= known, path


def test_no_remedy_installs_a_project_of_this_name_from_a_package_index():
    files = [file for folder in ("hvd_adam", "launch", "docs") for file in (ROOT / folder).rglob("*.*")]
    files = [file for file in [*files, *ROOT.glob("*.md")] if file.suffix in (".py", ".sh", ".md")]
    advice = re.compile(r"pip install [^`\n]*\bhvd_adam(?!/)\b(?<!clone of hvd_adam)")
    assert [file for file in files if advice.search(file.read_text())] == []
