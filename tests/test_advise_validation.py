"""`advise_validation.py`: what it makes of trainings. It is not run in full here: it takes half an hour."""

import json
import math

import advise_validation
import pytest


def write(folder, losses, length=10, rate=1000.0):
    folder.mkdir()
    rows = [
        {"event": "step", "step": length * (n + 1), "loss": loss, "images_per_second": rate}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_updates_are_counted_to_the_middle_of_an_epoch_and_interpolated(tmp_path):
    run = write(tmp_path / "run", [4.0, 2.0, 1.0, 0.25])
    assert advise_validation.updates_to_target(run, 2.0) == pytest.approx(15)
    assert advise_validation.updates_to_target(run, 0.5) == pytest.approx(30)
    assert advise_validation.updates_to_target(run, 0.1) == math.inf


def test_the_advised_batch_is_compared_with_the_best_of_the_grid(tmp_path, capsys):
    for batch in advise_validation.GRID:
        # Each batch needs 4 epochs; twice the batch is half the updates at the same samples a second.
        length = 5120 // batch
        for seed in advise_validation.SEEDS:
            write(tmp_path / f"mlp-{batch}-{seed}", [1.0, 0.4, 0.2, 0.1], length)
        write(tmp_path / f"time-mlp-2-{batch}-0", [1.0] * 8, rate=1000.0 + (batch == 64) * 250.0)
    rows = [{"global_batch": batch, "relative_time": 1.0} for batch in advise_validation.GRID]
    advice = {"noise_scale": {"value": 100.0}, "soonest": {"global_batch": 128}, "rows": rows, "confirmed": None}
    (tmp_path / "advice-mlp-2-adam.json").write_text(json.dumps(advice))
    advise_validation.tables(tmp_path)
    out = capsys.readouterr().out
    assert "best 64: 1.00 of" in out and "advised 128: 1.25 of the best time" in out and "confirmed" not in out
    (tmp_path / "advice-mlp-2-adam.json").write_text(json.dumps({**advice, "confirmed": {"soonest": 32}}))
    advise_validation.tables(tmp_path)
    assert "confirmed 32: 1.25 of the best time" in capsys.readouterr().out
