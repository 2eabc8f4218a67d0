"""What a run leaves for its reader: `curves.png`, TensorBoard events and the head of `config.yaml`.

Hazards: curves without units or name, ticks that cannot be read, two quantities on one axis; a run whose values
are constant, missing, infinite or from an older release; tags without groups; a head that YAML refuses or that
ends the comment.
"""

import io
import json
import math
import sys
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml
from helpers.training_runs import events, succeeded, train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hvd_adam.cli import parse
from hvd_adam.config import TrainConfig
from hvd_adam.training import plots, run_dir
from hvd_adam.training.run_log import METRICS_FILE, RunLog, read_events
from hvd_adam.training.scores import confusion


def run_folder(tmp_path, losses=(2.3, 1.0, 0.4, 0.02), name="digits-small", **step):
    """Returns a run folder with one step event for each loss, and an evaluation after the last."""
    folder = tmp_path / name
    folder.mkdir()
    rows = [{"event": "start", "step": 0, "epoch": 0, "time": 0.0, "world_size": 2, "global_batch_size": 64}]
    for number, loss in enumerate(losses, start=1):
        row = {"event": "step", "step": 10 * number, "loss": loss, "lr": 1e-3, "images_per_second": 900.0}
        rows.append(row | step)
    test = {"test_loss": 0.5, "test_accuracy": 0.75, "test_balanced_accuracy": 0.7}
    rows.append({"event": "eval", "step": 10 * len(losses), "epoch": 1, **test})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tick_labels(axis):
    low, high = sorted(axis.get_view_interval())
    return [axis.get_major_formatter()(tick) for tick in axis.get_majorticklocs() if low <= tick <= high]


# curves.png.


def test_each_quantity_has_a_panel_with_a_title_a_unit_and_the_run_has_its_name(tmp_path):
    drawn = plots.figure(run_folder(tmp_path))
    panels = {axes.get_title(): axes for axes in drawn.axes}
    assert {title: axes.get_ylabel() for title, axes in panels.items()} == {
        "loss": "cross-entropy (nats)",
        "test accuracy": "correct (%)",
        "learning rate": "learning rate",
        "throughput of all ranks": "images/s",
    }
    assert all(axes.get_xlabel() == "updates" for axes in drawn.axes)
    assert drawn.get_suptitle() == "digits-small: 2 ranks, 64 images per update"
    (rate,) = panels["learning rate"].get_lines()
    assert list(rate.get_ydata()) == [1e-3] * 4
    assert [line.get_label() for line in panels["loss"].get_lines()] == ["training", "test"]


@pytest.mark.parametrize(
    ("losses", "scale", "labels"),
    [
        ((2.3, 1.0, 0.4, 0.02), "log", ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
        ((2.3, 2.2, 2.1), "linear", None),
        ((1e3, 1e-4), "log", ["0.0001", "0.01", "1", "100"]),
        ((0.0, 0.0), "linear", None),
        ((None, None), "linear", None),
    ],
)
def test_the_ticks_of_the_loss_are_plain_numbers(tmp_path, losses, scale, labels):
    folder = run_folder(tmp_path, losses)
    if labels is None:  # without the test loss
        lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    loss = plots.figure(folder).axes[0]
    assert loss.get_yscale() == scale
    ticks = tick_labels(loss.yaxis)
    assert len(ticks) >= 3
    if labels is not None:
        assert set(labels) <= set(ticks)
    assert plots.plot(folder).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["run$1$", "a_{b}^", "実行", "a\udcff b"])
def test_any_name_of_a_folder_is_a_title(tmp_path, name):
    folder = run_folder(tmp_path, name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(plots.plot(folder)) as image:
            assert image.width == 1200


def test_a_run_of_an_older_release_or_without_values_is_plotted(tmp_path):
    folder = run_folder(tmp_path, (1.0, 0.5))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("test_balanced_accuracy", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    accuracy = plots.figure(folder).axes[1]
    assert [line.get_label() for line in accuracy.get_lines()] == ["accuracy"]
    (folder / "metrics.jsonl").write_text("")
    assert plots.plot(folder).exists()


# TensorBoard.


def board(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def hparams(board, tag):
    content = board.SummaryMetadata(tag).plugin_data.content
    return HParamsPluginData.FromString(content)


CONFIG = {"lr": 1e-3, "model": "cnn", "elastic": False, "max_steps": None, "betas": (0.9, 0.999)}


def test_tags_are_grouped_and_configuration_and_hyper_parameters_are_recorded(tmp_path):
    log = RunLog(tmp_path, 10, None, {**CONFIG, "positive_class": None, "data_dir": "a|b"}, ("cat", "dog"))
    log.event("step", 5, 1, loss=1.5, lr=1e-3, grad_norm=0.25, images_per_second=100.0)
    log.event("skip", 6, 1, reason="gradient not finite", skipped=1)
    log.event("step", 10, 1, loss=math.nan, lr=1e-3, grad_norm=None, images_per_second=100.0)
    scores = {
        "test_loss": 0.5,
        "test_accuracy": 0.75,
        "test_balanced_accuracy": 0.7,
        "test_ece": 0.25,
        "images": 4,
    }
    log.event("eval", 10, 1, world_size=1, **scores, confusion=[[3, 0], [1, 0]])
    log.close()
    written = board(tmp_path)
    points = {
        tag: [(e.step, round(e.value, 6)) for e in written.Scalars(tag)] for tag in written.Tags()["scalars"]
    }
    assert [step for step, _ in points.pop("train/loss")] == [5, 10]
    assert points == {
        "optim/lr": [(5, 1e-3), (10, 1e-3)],
        "optim/grad_norm": [(5, 0.25)],
        "optim/skipped_updates": [(6, 1.0)],
        "perf/images_per_second": [(5, 100.0), (10, 100.0)],
        "eval/loss": [(10, 0.5)],
        "eval/accuracy": [(10, 0.75)],
        "eval/balanced_accuracy": [(10, 0.7)],
        "eval/calibration_error": [(10, 0.25)],
    }
    text = written.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "| `lr` | `0.001` |" in text and "| `max_steps` | – |" in text and "| `data_dir` | `a\\|b` |" in text
    values = hparams(written, "_hparams_/session_start_info").session_start_info.hparams
    assert values["lr"].number_value == 1e-3 and values["betas"].string_value == "0.9, 0.999"
    assert values["elastic"].bool_value is False and "max_steps" not in values
    results = hparams(written, "_hparams_/experiment").experiment.metric_infos
    assert "eval/accuracy" in [metric.name.tag for metric in results]
    (picture,) = written.Images("eval/confusion_matrix")
    image = Image.open(io.BytesIO(picture.encoded_image_string))
    assert (image.width, image.height) == (picture.width, picture.height)


def test_an_event_that_a_lost_rank_0_has_not_recorded_is_recorded_by_the_next_rank_0(tmp_path):
    lost, other = RunLog(tmp_path, 10), RunLog(None, 10)
    for step in (1, 2, 3):
        for log in (lost, other)[step == 3 :]:  # rank 0 is lost after the third update
            log.event("step", step, 1, loss=1.0 / step, lr=1e-3, images_per_second=100.0)
    lost.close()
    for _ in range(2):  # the next one is lost, too
        log = RunLog(tmp_path, 10, 3, recent=[*other.recent])
        log.event("step", 4, 1, loss=0.25, lr=1e-3, images_per_second=100.0)
        log.close()
    steps = [(event["step"], event["loss"]) for event in read_events(tmp_path / METRICS_FILE)]
    assert steps == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


def test_the_shades_of_a_confusion_matrix_are_fractions_of_the_true_class():
    png, width, height = confusion.draw([[30, 10], [0, 1]], ("cat", "ein sehr langer Name"))
    image = np.asarray(Image.open(io.BytesIO(png)))
    assert image.shape == (height, width, 3)
    left, top = width - confusion.MARGIN - 2 * confusion.CELL, height - confusion.MARGIN - 2 * confusion.CELL
    left = min(left, width - confusion.MARGIN - 120)
    shades = [
        [int(image[top + confusion.CELL * row + 3, left + confusion.CELL * column + 3, 0]) for column in range(2)]
        for row in range(2)
    ]
    assert shades == [[round(255 - 247 * 0.75), round(255 - 247 * 0.25)], [255, 8]]


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves_and_evaluations_count_every_image(tmp_path):
    fixed = ["--model", "mlp", "--log-every", 2, "--eval-every", 1, "--epochs", 2, "--global-batch-size", 500]
    succeeded(train(*fixed, "--max-steps", 2, folder=tmp_path / "run"))
    succeeded(train(*fixed, "--max-steps", 4, folder=tmp_path / "run"))
    written = board(tmp_path / "run")
    assert [point.step for point in written.Scalars("train/loss")] == [2, 4]
    norms = [event["grad_norm"] for event in events(tmp_path / "run", "step")]
    assert [point.value for point in written.Scalars("optim/grad_norm")] == pytest.approx(norms)
    assert all(norm > 0 for norm in norms)
    for event in events(tmp_path / "run", "eval"):
        matrix = torch.tensor(event["confusion"])
        assert matrix.sum() == event["images"] == 355
        assert matrix.trace() / 355 == pytest.approx(event["test_accuracy"], rel=1e-6)
        recalls = matrix.diagonal() / matrix.sum(dim=1)
        assert recalls.mean() == pytest.approx(event["test_balanced_accuracy"], rel=1e-6)


# config.yaml.


def opened(folder, monkeypatch, argv=("python", "-m", "hvd_adam.train", "--lr", "1e-2")):
    monkeypatch.setattr(sys, "orig_argv", list(argv))
    config = TrainConfig(output_dir=str(folder), lr=1e-2)
    run_dir.open_run(config, 3, None, {})
    return (folder / "config.yaml").read_text()


def test_the_configuration_starts_with_command_line_world_size_versions_and_code_hash(tmp_path, monkeypatch):
    text = opened(tmp_path / "run", monkeypatch)
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("\n".join(head))
    assert "# Command line: python -m hvd_adam.train --lr 1e-2" in head
    assert "# World size: 3" in head
    (versions,) = [line for line in head if line.startswith("# Versions: hvd_adam ")]
    assert f"torch {version('torch')}" in versions and "code hash " in versions and "horovod " in versions


@pytest.mark.parametrize(
    "argument", ["a b", "two\nlines: [", "\x1b[1m", "é実", "\udcff", "#: {", "\\n", "\u2028x: 1"]
)
def test_any_command_line_stands_in_a_comment_that_the_option_config_reads(tmp_path, monkeypatch, argument):
    text = opened(tmp_path / "run", monkeypatch, ["python", argument])
    assert text.isascii()
    assert yaml.safe_load(text)["lr"] == 1e-2
    config = parse(TrainConfig, "hvd_adam.train", ["--config", str(tmp_path / "run" / "config.yaml")])
    assert config.lr == 1e-2
