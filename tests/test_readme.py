"""The commands and the Python examples of the README and of docs/ run as written.

Hazards: a command that the new name of an option broke; an example that needs what the reader does not have.
A command that several pages show runs once. `python` and `horovodrun` are those of `helpers.forked_python`, also
for the ranks of the scripts of launch/, except in the quick start and in one other command.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import documents
from helpers.forked_python import forked_python

ROOT = documents.ROOT
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git tracks, or would, with the scripts of the documents."""
    folder = tmp_path_factory.mktemp("checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name, text in documents.scripts().items():
        (folder / name).write_text(text)
    return folder


def run(command: list[str], folder: Path, installed: bool = False) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HVD_ADAM_VENV": str(BIN.parent)}
    if not installed:
        environ["PATH"] = f"{Path(forked_python()).parent}:{environ['PATH']}"
        environ["HVD_ADAM_PYTHON"] = forked_python()
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("command", documents.commands(""))
def test_each_command_runs_as_written(command, checkout):
    # The quick start sets up the environment that the other tests use: it belongs to the repository itself.
    folder = ROOT if "quickstart" in command else checkout
    installed = command == "horovodrun -np 2 python mine.py"
    done = run(["bash", "-euo", "pipefail", "-c", command], folder, installed)
    if "quickstart" in command:
        accuracy = float(re.findall(r"test accuracy ([0-9.]+)$", done.stdout, re.MULTILINE)[-1])
        assert accuracy >= 0.98
        for what in ("checkpoint", "plot"):
            path = re.search(rf"^\S*{what} (\S+)$", done.stdout, re.MULTILINE)[1]
            assert (folder / path).exists()
        run_folder = re.search(r"^\S*run folder (\S+)$", done.stdout, re.MULTILINE)[1]
        shutil.rmtree(folder / run_folder)
    if command.endswith("mine.py"):
        assert float(re.search(r"test accuracy ([0-9.]+)", done.stdout)[1]) > 0.8


def test_the_python_examples_run(checkout):
    # After the commands, because an example may read what they wrote; in one process, which imports torch once.
    blocks = [block for block in documents.BLOCKS if block.language == "python" and not block.kind]
    assert blocks
    names = [f"{number}_{block.document.stem}.py" for number, block in enumerate(blocks)]
    for name, block in zip(names, blocks, strict=True):
        (checkout / name).write_text(block.text)
    run([sys.executable, "-c", f"import runpy\nfor name in {names}: runpy.run_path(name)"], checkout)


@pytest.mark.parametrize("command", documents.commands("cluster"))
def test_commands_for_clusters_are_well_formed_and_name_what_exists(command):
    subprocess.run(["bash", "-n", "-c", command], check=True)
    for path in re.findall(r"\b(?:launch|docker)/[\w.]+", command):
        assert (ROOT / path).exists()
    if command.startswith("launch/"):
        script, _, arguments = command.partition(" ")
        dry = ["bash", "-c", f"{ROOT / script} --dry-run {arguments}"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "-m hvd_adam.train" in done.stdout
