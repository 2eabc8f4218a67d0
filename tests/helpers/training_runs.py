"""Runs training as a user does, and reads its results: output, metrics.jsonl and checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from helpers.forked_python import forked_python
from helpers.on_ranks import launch

ROOT = Path(__file__).parents[2]


def train(*argv, ranks=0, controller="gloo", folder=None, module="hvd_adam.train", forked=True, **options):
    """Trains in `folder` and returns the finished process; with ranks=0, without a launcher.

    With forked=False in new processes, not in forks of one that has imported PyTorch.
    """
    arguments = ["-m", module, *map(str, argv), *(["--output-dir", str(folder)] if folder else [])]
    if ranks:
        return launch(arguments, ranks, controller, forked=forked, **options)
    command = [forked_python() if forked else sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, **options)


def events(folder, kind=None):
    """Returns the events of a run, or those of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if kind is None else [line for line in lines if line["event"] == kind]


def checkpoint(folder):
    """Returns the state in the newest checkpoint of a run."""
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    return torch.load(folder / "checkpoints" / latest / "state.pt", weights_only=True)


def succeeded(done):
    """Checks that a process ended with 0, and returns it."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_line(done, code=2):
    """Checks the exit code, and that stderr is one line and no traceback; returns the line."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]
