"""Training as a user starts it, and what it leaves: the process, the lines of metrics.jsonl, the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from helpers.on_ranks import launch

ROOT = Path(__file__).parents[2]


def train(*argv, ranks=0, controller="gloo", folder=None, module="hvd_adam.train", **options):
    """Trains in `folder`; ranks=0 is without a launcher. Returns the finished process."""
    arguments = ["-m", module, *map(str, argv), *(["--output-dir", str(folder)] if folder else [])]
    if ranks:
        return launch(arguments, ranks, controller, **options)
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def events(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if kind is None else [line for line in lines if line["event"] == kind]


def checkpoint(folder):
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    return torch.load(folder / "checkpoints" / latest / "state.pt", weights_only=True)


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_line(done, code=2):
    """The one line of stderr, without what launchers put around it."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]
