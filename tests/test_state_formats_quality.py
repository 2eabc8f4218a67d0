"""`docs/state_formats_quality.py`: the trainings behind the table and the picture of formats of the state.

Hazards: formats that are not used; batches or weights that differ between the formats of a seed; a finished run
that is repeated, or one of another length that is taken for it.
"""

import json
import subprocess
import sys

import pytest
from helpers.training_runs import ROOT


def test_formats_differ_in_their_rounding_only_and_finished_runs_are_not_repeated(tmp_path):
    output, picture = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    known = {
        "model": "cnn",
        "state_format": "float32",
        "seed": 0,
        "updates": 8,
        "train_loss": -1.0,
        "test_loss": -2.0,
    }
    known |= {"test_accuracy": -3.0, "curve": [2.0] * 8}
    other_length = {**known, "state_format": "8bit", "updates": 9}
    output.write_text("".join(json.dumps(run) + "\n" for run in (known, other_length)))
    options = ["--seeds", "1", "--updates", "8", "--models", "cnn", "mlp"]
    files = ["--output", str(output), "--picture", str(picture)]
    script = [sys.executable, str(ROOT / "docs/state_formats_quality.py")]
    done = subprocess.run([*script, *options, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    loss = {(run["model"], run["state_format"]): run["train_loss"] for run in runs}
    assert len(runs) == 7
    assert loss["cnn", "float32"] == -1.0
    assert loss["cnn", "8bit"] > 0
    of_formats = [loss["mlp", state_format] for state_format in ("float32", "bfloat16", "8bit")]
    assert len(set(of_formats)) == 3
    # Other weights and batches change the loss by 0.02 and more after so few updates, rounding by 2e-3.
    assert of_formats == pytest.approx(of_formats[:1] * 3, abs=1e-2)
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines()[2:]]
    assert rows == [[f"| {m}", f"`{f}`"] for m in ("cnn", "mlp") for f in ("float32", "bfloat16", "8bit")]
    assert picture.read_bytes().startswith(b"\x89PNG")
