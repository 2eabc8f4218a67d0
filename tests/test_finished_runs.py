"""What a run prints and records at its end, and when it is started again after it.

Hazards: a throughput of 0; a record of the end that is overwritten; a short epoch without a training loss; a
checkpoint that is recorded under another step; a command that does not resume as promised.
"""

import json
import re
import shutil

import pytest
from helpers.forked_commands import ForkedCommands
from helpers.training_runs import events, one_line, succeeded

OPTIONS = "--dataset synthetic --synthetic-shape 1x4x4 --synthetic-samples 96 --model mlp --batch-size 32".split()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with ForkedCommands(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory):
    """A finished run of 3 epochs of 3 updates: its process and folder."""
    folder = tmp_path_factory.mktemp("finished")
    done = commands.run("hvd_adam.train", *OPTIONS, "--epochs", 3, "--output-dir", "run", cwd=folder)
    return succeeded(done), folder


def test_epochs_with_fewer_updates_than_log_every_log_a_training_loss(finished):
    _, folder = finished
    assert [event["step"] for event in events(folder / "run", "step")] == [3, 6, 9]
    assert all(event["loss"] > 0 for event in events(folder / "run", "step"))


def test_the_last_accuracy_is_printed_once(finished):
    done, folder = finished
    accuracy = f"{events(folder / 'run')[-1]['test_accuracy']:.4f}"
    last = done.stdout[done.stdout.index("epoch 3  step 9/9  test loss") :]
    assert last.count("test accuracy") == 1 and f"test accuracy {accuracy}" in last


def test_checkpoint_events_have_the_step_of_their_path(finished):
    _, folder = finished
    found = events(folder / "run", "checkpoint")
    assert [event["step"] for event in found] == [int(event["path"][-8:]) for event in found]
    assert [(event["step"], event["epoch"]) for event in found][-1] == (9, 3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--epochs 3", "already finished: 9 of 9 updates; raise --epochs to continue"),
        ("--epochs 5 --max-steps 9", "already finished: 9 of 9 updates; raise --max-steps to continue"),
        ("--epochs 3 --max-steps 9", "already finished: 9 of 9 updates; raise --epochs and --max-steps"),
        ("--epochs 3 --max-steps 99", "raise --epochs to continue"),
    ],
)
def test_a_finished_run_that_is_started_again_reports_it_and_keeps_its_record(more, words, commands, finished):
    _, folder = finished
    before = (folder / "run" / "metrics.jsonl").read_text()
    done = succeeded(commands.run("hvd_adam.train", *OPTIONS, *more.split(), "--output-dir", "run", cwd=folder))
    assert words in done.stdout
    assert "throughput" not in done.stdout and "resuming" not in done.stdout
    assert done.stdout.count("test accuracy") == 1
    assert (folder / "run" / "metrics.jsonl").read_text() == before


def test_a_run_that_ended_within_an_epoch_beyond_a_smaller_length_has_finished(commands, tmp_path):
    argv = ["hvd_adam.train", *OPTIONS, "--output-dir", "run", "--epochs"]
    succeeded(commands.run(*argv, 3, "--max-steps", 4, cwd=tmp_path))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = succeeded(commands.run(*argv, 1, cwd=tmp_path))
    assert "already finished: 4 of 3 updates" in done.stdout and "epoch 2" not in done.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_that_was_stopped_within_an_epoch_beyond_a_smaller_length_is_evaluated_once(commands, tmp_path):
    argv = ["hvd_adam.train", *OPTIONS, "--output-dir", "run", "--epochs"]
    stopped = [1000, "--checkpoint-every", 1, "--lr-decay", "constant", "--max-time", "0.01"]
    assert commands.run(*argv, *stopped, cwd=tmp_path).returncode == 75
    step = events(tmp_path / "run", "checkpoint")[-1]["step"]
    shorter = [1000, "--lr-decay", "constant", "--max-steps", max(1, step - 1)]
    done = succeeded(commands.run(*argv, *shorter, cwd=tmp_path))
    assert "no longer finite" not in done.stdout + done.stderr
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "already finished" in succeeded(commands.run(*argv, *shorter, cwd=tmp_path)).stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_that_was_killed_before_its_end_was_recorded_records_it(commands, finished, tmp_path):
    _, folder = finished
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text("".join(line for line in before.splitlines(True) if json.loads(line)["event"] != "end"))
    done = succeeded(commands.run("hvd_adam.train", *OPTIONS, "--epochs", 3, "--output-dir", "run", cwd=folder))
    assert "no longer finite" not in done.stdout + done.stderr
    end = events(folder / "run")[-1]
    assert (end["event"], end["images_per_second"]) == ("end", None)
    assert end["test_accuracy"] == json.loads(before.splitlines()[-1])["test_accuracy"]
    metrics.write_text(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "name"), [([], "latest"), (["--which=newest"], "latest"), (["--which=best"], "best")]
)
def test_evaluate_names_the_checkpoint_that_it_takes(which, name, commands, finished):
    checkpoints = finished[1] / "run" / "checkpoints"
    older = checkpoints / sorted(path.name for path in checkpoints.glob("step-*"))[0]
    (checkpoints / "best").write_text(older.name + "\n")
    expected = checkpoints / (checkpoints / name).read_text().strip()
    for path in (finished[1] / "run", checkpoints):
        done = succeeded(commands.run("hvd_adam.evaluate", "--checkpoint", path, *which))
        assert done.stdout.startswith(f"checkpoint {expected}\n")
    done = succeeded(commands.run("hvd_adam.evaluate", "--checkpoint", finished[1] / "run", *which, "--json"))
    assert json.loads(done.stdout)["checkpoint"] == str(expected)


def test_best_is_refused_for_one_checkpoint_and_for_a_run_without_one(commands, finished, tmp_path):
    checkpoints = finished[1] / "run" / "checkpoints"
    for path in (checkpoints / "latest", next(checkpoints.glob("step-*"))):
        done = commands.run("hvd_adam.evaluate", "--checkpoint", path, "--which", "best")
        assert f"--which best has no effect on {path}, which is one checkpoint" in one_line(done)
    (tmp_path / "latest").write_text("step-00000001\n")
    done = commands.run("hvd_adam.evaluate", "--checkpoint", tmp_path, "--which", "best")
    assert "has no best checkpoint" in one_line(done)


def test_more_epochs_continue_a_finished_run(commands, finished, tmp_path):
    _, folder = finished
    done = commands.run("hvd_adam.train", *OPTIONS, "--epochs", 4, "--output-dir", "run", cwd=folder)
    assert "resuming after 9 updates" in succeeded(done).stdout and "already finished" not in done.stdout
    assert events(folder / "run", "step")[-1]["step"] == 12


@pytest.mark.parametrize("emptied", [True, False])
def test_a_run_without_its_record_resumes_from_its_checkpoints(emptied, commands, finished, tmp_path):
    _, folder = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    if emptied:
        (tmp_path / "run" / "metrics.jsonl").touch()
    updates = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step-"))
    argv = ["hvd_adam.train", *OPTIONS, "--epochs", 5, "--output-dir", "run"]
    assert "holds a run already" in one_line(commands.run(*argv, "--resume", "never", cwd=tmp_path))
    succeeded(commands.run(*argv, cwd=tmp_path))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [updates]


@pytest.mark.parametrize("output", [[], ["--output-dir", "mine"]])
def test_a_stopped_run_names_the_command_that_resumes_it(output, commands, tmp_path):
    argv = [*OPTIONS, "--epochs", 1000, "--max-time", "0.01", *output]
    done = commands.run("hvd_adam.train", *argv, cwd=tmp_path)
    assert done.returncode == 75, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("stopped after"))
    folder = re.search(r", (\S+)/checkpoints/step-\d+: ", line)[1]
    assert ("--output-dir" in line) == (not output)
    again = commands.run("hvd_adam.train", *argv[: len(OPTIONS) + 4], "--output-dir", folder, cwd=tmp_path)
    assert "resuming after" in again.stdout
