"""`docs/compression_quality.py`: the trainings behind the table of what compressed gradients change.

Hazards: rows without feedback that have it after all; batches or weights that differ between the rows of a seed; a
finished run that is repeated; differences in other units than the table's notes say.
"""

import json
import math
import runpy

import pytest
from helpers.on_ranks import launch
from helpers.training_runs import ROOT

SCRIPT = ROOT / "docs/compression_quality.py"


def test_all_rows_are_trained_once_and_only_feedback_differs(tmp_path):
    module = runpy.run_path(str(SCRIPT))
    output = tmp_path / "runs.jsonl"
    known = module["Run"]("mlp", module["Row"]("none"), updates=2, lr=module["TASKS"]["mlp"]().lr, seed=0)
    module["write"](output, {known: {"train_loss": -1.0, "test_loss": -2.0, "test_accuracy": -3.0}})
    done = launch([str(SCRIPT), "--seeds", "1", "--updates", "2", "--output", str(output)], 2, "gloo")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    loss = {
        (run["model"], run["row"]["compression"], run["row"]["strategy"], run["row"]["feedback"]): run[
            "train_loss"
        ]
        for run in results
    }
    assert len(loss) == len(results) == 17
    assert loss.pop(("mlp", "none", "allreduce", True)) == -1.0
    assert all(math.isfinite(value) for value in loss.values())
    for model in ("cnn", "transformer"):
        # Other weights and batches change it by 0.02 after two updates of the transformer, int8 by 5e-5.
        assert loss[model, "int8", "allreduce", True] == pytest.approx(
            loss[model, "none", "allreduce", True], abs=1e-3
        )
    for model, compression, strategy, _ in loss:
        if compression != "none":
            assert loss[model, compression, strategy, True] != loss[model, compression, strategy, False]
    lines = done.stdout.splitlines()
    assert sum("| cnn | `int4`, sharded, no feedback |" in line for line in lines) == 1


def test_differences_are_in_standard_errors_of_none_and_of_the_paired_difference():
    compared = runpy.run_path(str(SCRIPT))["compared"]
    # none: mean 2, standard error 1/√3·1; differences 1, 1, 4: mean 2, standard error 1.
    assert compared([2.0, 3.0, 7.0], [1.0, 2.0, 3.0]) == ["4.0000 ± 1.5275", "+3.5, +2.0"]
