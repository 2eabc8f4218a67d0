"""The folders of the package show its architecture: one concern each, and imports that run one way.

Hazards: a circle of imports, or an import of a higher layer; a module that grows without bound; a module that uses
private names of another; `--help` that waits for torch.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training_runs import ROOT

PACKAGE = ROOT / "hvd_adam"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_MODULES = 320, 17
MAY_BE_LARGE = {"bench", "doctor"}


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_imports_run_one_way():
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    linter = shutil.which("lint-imports", path=folders)
    assert linter, "import-linter is missing: `bash launch/setup.sh --dev` installs it"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_too_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}


def test_no_folder_has_too_many_modules():
    folders = {path.parent for path in MODULES}
    counts = {
        folder.name: sum(not path.name.startswith("__") for path in folder.glob("*.py")) for folder in folders
    }
    assert not {name: n for name, n in counts.items() if n > MOST_MODULES and name not in MAY_BE_LARGE}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_other_modules(tree: ast.Module) -> list[str]:
    """Returns the private names that a module imports from others of the package, or reads through them."""
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or name.name for name in node.names if name.name.startswith("hvd_adam")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hvd_adam":
            found += [f"{node.module}.{name.name}" for name in node.names if private(name.name)]
            names = [(name.name, name.asname or name.name) for name in node.names]
            folder = PACKAGE.joinpath(*node.module.split(".")[1:])
            modules |= {alias for name, alias in names if folder.joinpath(f"{name}.py").exists()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in modules:
            found.append(ast.unparse(node))
    return [name for name in found if name != "hvd_adam._version"]  # a module for the package as a whole


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_uses_private_names_of_another(path):
    assert not private_names_of_other_modules(ast.parse(path.read_text()))


def test_distributed_can_be_imported_without_torch():
    done = run_python("import sys, hvd_adam.distributed; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    ["train", "evaluate", "predict", "export", "report", "compare", "doctor", "bench", "simulate", "advise"],
)
def test_help_does_not_import_torch(command):
    code = """
import runpy, sys
command, sys.argv[1:] = sys.argv[1], ["--help"]
try:
    runpy.run_module(command, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "horovod", "mpi4py"} & sys.modules.keys()
"""
    done = run_python(code, f"hvd_adam.{command}")
    assert done.returncode == 0, done.stdout + done.stderr
