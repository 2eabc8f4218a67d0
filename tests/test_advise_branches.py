"""`hvd_adam.advise --measure` and `--confirm`: branches of a run, and what is concluded from them.

Hazards: a branch that starts elsewhere than the run, or at another learning rate; a run folder that a branch
changes; a branch that fails without a reason; a loss that one branch never reaches; a finished schedule.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.forked_python import forked_python
from helpers.training_runs import events, succeeded, train
from test_advise import ask
from test_simulate import PLAIN, TWO

from hvd_adam.advise import record as records
from hvd_adam.advise.branches import Branch, Branches, Launcher, Point, changed
from hvd_adam.advise.choice import Row, Setting
from hvd_adam.advise.confirm import curve, next_batch, settings_by_batch, time_to, verdict
from hvd_adam.advise.measure import speed, spread
from hvd_adam.advise.report import _verdict
from hvd_adam.checkpoint import storage
from hvd_adam.errors import UserError
from hvd_adam.simulate.calibration import Calibration
from hvd_adam.simulate.workload import Bucket

RATE = ("--lr-decay", "constant", "--warmup-epochs", "0.5")
OPTIONS = ("--model", "mlp", "--batch-size", "16", "--accumulate", "2", "--noise-scale", "1", "--log-every", "5")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch of 45 updates, on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    succeeded(train(*OPTIONS, *RATE, "--epochs", 1, folder=folder))
    return folder


@pytest.fixture
def _forks(monkeypatch):
    """Lets branches start as forks, which takes a second less for each."""
    monkeypatch.setattr(sys, "executable", forked_python())


def digest(folder):
    """Returns a checksum of the names, contents and times of all files of a folder."""
    files = sorted(path for path in folder.rglob("*"))
    facts = [
        (str(path.relative_to(folder)), path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in files
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.usefixtures("_forks")
def test_a_branch_with_the_batch_of_the_run_is_the_run_resumed(run, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    succeeded(train(*OPTIONS, *RATE, "--epochs", 2, folder=resumed))
    losses = [event["loss"] for event in events(resumed, "step") if event["step"] > 45]
    record = records.read(str(run))
    branch = Branches(record, Launcher(1, "gloo")).run(Setting(1, 16, 2, 32), 45, 9)
    assert [point.loss for point in branch.points] == losses
    assert [point.samples for point in branch.points] == [32 * n for n in range(5, 50, 5)]
    assert branch.test_loss == events(resumed, "eval")[-1]["test_loss"]


@pytest.mark.parametrize(("rule", "rate"), [("linear", 4.0), ("sqrt", 2.0), ("halflife", 1.0), ("none", 1.0)])
def test_a_branch_begins_after_as_many_samples_with_the_scaled_learning_rate(run, rule, rate):
    state = storage.load(run)
    state["config"]["lr_scaling"] = rule
    state["progress"].update(step=45 + 20, epoch=2, epoch_done=False)
    before = json.dumps(state["progress"])
    new = changed(state, records.read(str(run)), Setting(1, 128, 1, 128))
    assert new["progress"]["step"] == 11 + 5 and new["progress"]["epoch"] == 2  # 1442 // 128; 20·32 / 128
    old_group, group = (each["optimizer"]["param_groups"][0] for each in (state, new))
    assert group["lr"] == new["schedule"]["peak"] == pytest.approx(rate * old_group["lr"])
    second = {"sqrt": 1 - 4 * 0.001, "halflife": 0.999**4}.get(rule, 0.999)
    assert group["betas"][1] == pytest.approx(second)
    assert json.dumps(state["progress"]) == before and tuple(old_group["betas"]) == (0.9, 0.999)
    state["progress"].update(step=45, epoch=1, epoch_done=True)
    assert changed(state, records.read(str(run)), Setting(1, 128, 1, 128))["progress"]["step"] == 11


@pytest.mark.usefixtures("_forks")
def test_updates_are_measured_and_the_run_folder_does_not_change(run, capsys):
    before = digest(run)
    ask(run, "--measure", "--batches", "64,256", "--json")
    assert digest(run) == before
    advice = json.loads(capsys.readouterr().out)
    assert advice["basis"] == "measured" and {row["global_batch"] for row in advice["rows"]} == {32, 64, 256}
    assert all(row["seconds"] > 0 for row in advice["rows"])
    assert advice["base"] == {"ranks": 1, "micro_batch": 16, "accumulate": 2, "global_batch": 32}


@pytest.mark.usefixtures("_forks")
def test_batches_are_confirmed_on_two_ranks(run, capsys, tmp_path):
    before, file = digest(run), tmp_path / "calibration.json"
    measured = replace(TWO, buckets=(Bucket(4810, 0, 0.2),))
    file.write_text(Calibration(PLAIN, {"mlp": measured}, 2, {"device": "none"}).to_json())
    calibrated = ("--calibration", file, "--ranks", "1,2", "--ranks-per-host", 1, "--network", "ndr400")
    ask(run, *calibrated, "--confirm", "--np", 2, "--launcher", "gloo", "--candidates", 2, "--samples", 2000)
    text = capsys.readouterr().out
    assert "branches of 2000 samples from the newest checkpoint:" in text
    assert "samples reached the loss first, which " in text
    assert digest(run) == before


@pytest.mark.slow
def test_sigterm_ends_the_branch_and_removes_its_folder(run, tmp_path):
    before, folders = digest(run), tmp_path / "temporary"
    folders.mkdir()
    command = [forked_python(), "-m", "hvd_adam.advise", str(run), "--measure"]
    environ = {**os.environ, "TMPDIR": str(folders)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stderr.readline().startswith(b"measured ")  # the next branch has started, or starts now
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not [*folders.glob("hvd_adam-branch-*")] and digest(run) == before


@pytest.mark.usefixtures("_forks")
def test_a_branch_that_fails_gives_its_reason_in_one_line(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    text = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(text.replace("model: mlp", "model: cnn"))
    with pytest.raises(
        UserError, match=r"training with 32 samples in an update ended with exit code 2: .*--model"
    ) as e:
        ask(broken, "--measure", "--batches", "32")
    assert "\n" not in str(e.value)


def test_a_schedule_at_its_end_cannot_be_confirmed(run, tmp_path):
    ended = tmp_path / "ended"
    shutil.copytree(run, ended)
    state = storage.load(run)
    state["optimizer"]["param_groups"][0]["lr"] = 1e-3 * state["schedule"]["peak"]
    storage.save(ended / "checkpoints", 45, state)
    with pytest.raises(UserError, match=r"the learning rate has decayed to 2e-06, of 0.002: resume the run"):
        ask(ended, "--confirm")


def test_a_checkpoint_of_another_batch_is_refused(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    state = storage.load(run)
    state["progress"]["global_batch_size"] = 64
    storage.save(other / "checkpoints", 45, state)
    with pytest.raises(UserError, match=r"newest checkpoint has 64 samples, but 32 in metrics.jsonl"):
        ask(other, "--measure")


# What is concluded.


def branch(batch, rate, losses):
    return Branch([Point(batch * (n + 1), loss, rate) for n, loss in enumerate(losses)], 0.5)


def test_the_branch_that_reaches_the_common_loss_first_is_soonest():
    branches = {32: branch(32, 32.0, [2.0, 1.5, 1.0, 0.8]), 64: branch(64, 128.0, [2.0, 1.0, 0.5, 0.6])}
    found = verdict(branches, 256, advised=64)
    assert found.loss == 0.8 and found.soonest == 64 and found.agrees
    assert [each.to_loss for each in found.branches] == pytest.approx([4.0, 1.0 + 0.5 * 0.2 / 0.5])
    assert not verdict(branches, 256, advised=32).agrees
    assert [each.seconds for each in found.branches] == [1.0, 0.5]


def test_branches_too_short_to_measure_the_loss_on_the_way_are_not_compared():
    long = {32: branch(32, 32.0, [2.0, 1.5, 0.8]), 64: branch(64, 64.0, [2.0, 1.0, 0.5])}
    assert not verdict(long, 96, advised=64).is_early
    short = {**long, 64: branch(64, 64.0, [0.7, 0.6])}
    found = verdict(short, 96, advised=32)
    assert found.is_early
    assert _verdict(found)[-1].endswith("too short to compare; use --samples with more than 96")


def test_a_branch_that_diverges_is_not_soonest():
    branches = {32: branch(32, 32.0, [2.0, 1.0]), 64: branch(64, 640.0, [None, None])}
    found = verdict(branches, 64, advised=64)
    assert found.soonest == 32 and found.branches[1].to_loss is None and not found.agrees
    with pytest.raises(UserError, match="no branch of --confirm has a finite loss"):
        verdict({64: branches[64]}, 64, advised=64)


def test_the_curve_is_the_lowest_loss_at_the_median_speed():
    points = [Point(10, 2.0, 1.0), Point(20, 3.0, 5.0), Point(30, 1.0, 10.0), Point(40, None, 10.0)]
    assert speed(points) == 10.0
    assert curve(Branch(points, None)) == [(1.0, 2.0), (2.0, 2.0), (3.0, 1.0)]
    assert time_to([(1.0, 2.0), (3.0, 1.0)], 1.5) == 2.0
    assert time_to([(1.0, 2.0)], 2.5) == 1.0 and time_to([(1.0, 2.0)], 1.5) == float("inf")


def test_batches_next_to_the_best_are_trained_until_both_are_worse():
    own = Setting(2, 16, 1, 32)
    times = ((16, 3.0), (32, 2.0), (64, 1.0), (128, 1.5))
    rows = [Row(2, b // 2, 1, b, 1.0, 1.0, 1.0, time, time) for b, time in times]
    rows += [Row(2, 16, 2, 64, 1.0, 1.0, 1.0, 1.1, 1.1), Row(4, 16, 1, 64, 1.0, 1.0, 1.0, 0.1, 0.1)]
    settings = settings_by_batch(rows, own)
    assert [*settings] == [16, 32, 64, 128] and settings[64] == Setting(2, 32, 1, 64) and settings[32] == own
    divided = Setting(2, 8, 2, 32)  # for its noise scale
    assert settings_by_batch(rows, divided)[32] == own and settings_by_batch(rows[:1], divided)[32] == divided
    assert next_batch([16, 32, 64, 128], [32, 64], 64) == 128
    assert next_batch([16, 32, 64, 128], [32, 64, 128], 128) is None
    assert next_batch([16, 32, 64, 128], [32, 64], 32) == 16
    assert spread([own], 4) == [own] and spread(range(7), 4) == [0, 2, 4, 6]
