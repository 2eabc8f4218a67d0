"""The README's commands run as they are written, and its links and names exist.

Fenced blocks of `sh` are run, in order, in a copy of the repository; `sh cluster` needs several hosts, Slurm or
Docker and is checked for its syntax and its scripts only; `sh self` is this test run, or takes minutes. The
first `python` block is saved as mine.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|sh cluster|sh self|python|text)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
CLUSTER_COMMANDS = [line for kind, block in BLOCKS if kind == "sh cluster" for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git tracks, or would."""
    folder = tmp_path_factory.mktemp("checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (script,) = [block for kind, block in BLOCKS if kind == "python"]
    (folder / "mine.py").write_text(script)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs_as_written(command, checkout):
    bin_folder = Path(sys.executable).parent
    environ = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "HVD_ADAM_VENV": str(bin_folder.parent)}
    # The quick start sets up the environment that the other tests use: it belongs to the repository itself.
    folder = ROOT if "quickstart" in command else checkout
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "quickstart" in command:
        accuracy = float(re.search(r"^\S*test accuracy ([0-9.]+)$", done.stdout, re.MULTILINE)[1])
        assert accuracy >= 0.98
        for what in ("checkpoint", "plot"):
            path = re.search(rf"^\S*{what} (\S+)$", done.stdout, re.MULTILINE)[1]
            assert (folder / path).exists()
        run_folder = re.search(r"^\S*run folder (\S+)$", done.stdout, re.MULTILINE)[1]
        shutil.rmtree(folder / run_folder)


@pytest.mark.parametrize("command", CLUSTER_COMMANDS)
def test_commands_for_clusters_are_well_formed_and_name_what_exists(command):
    subprocess.run(["bash", "-n", "-c", command], check=True)
    for path in re.findall(r"\b(?:launch|docker)/[\w.]+", command):
        assert (ROOT / path).exists()
    if command.startswith("launch/"):
        script, _, arguments = command.partition(" ")
        dry = ["bash", "-c", f"bash {script} --dry-run {arguments}"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "-m hvd_adam.train" in done.stdout


def test_every_kind_of_block_is_known():
    assert len(BLOCKS) == README.count("```") / 2


def test_every_option_named_is_one_that_exists():
    helps = ""
    for module in (
        "hvd_adam.train",
        "hvd_adam.evaluate",
        "hvd_adam.bench adam",
        "hvd_adam.bench step",
        "hvd_adam.doctor",
    ):
        command = [sys.executable, "-m", *module.split(), "--help"]
        helps += subprocess.run(command, capture_output=True, text=True).stdout
    scripts = "".join(
        path.read_text() for path in (*ROOT.glob("*/*.sh"), *ROOT.glob("docker/*"), ROOT / "tests/gpu/run.sh")
    )
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    for option in re.findall(r"`(--[a-z-]+)", prose):
        assert option in helps + scripts, option


def test_every_file_named_exists():
    for path in re.findall(r"`((?:launch|docker|tests|hvd_adam)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
