"""`hvd_adam.train` and `hvd_adam.evaluate` end to end on real ranks: command lines, results and errors.

Hazards: loss curves that depend on the number of ranks; several ranks that print the same line; a run folder that
other tools cannot read; bad input that leads to a traceback, a wrong exit code, an incomplete run folder or a rank
that keeps running.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
import yaml
from helpers.cifar_files import write_cifar10
from helpers.forked_commands import ForkedCommands
from helpers.forked_python import forked_python
from helpers.training_runs import ROOT, checkpoint, events, one_line, succeeded, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FAST = ["--epochs", "1", "--log-every", "5"]


def losses(folder):
    return torch.tensor([event["loss"] for event in events(folder, "step")], dtype=torch.float64)


# Results.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains under a launcher, once, and returns the finished process and the run folder."""

    @cache
    def trained(launcher):
        folder = tmp_path_factory.mktemp("trained") / "run"
        if launcher == "launch/mpirun.sh":
            command = ["bash", str(ROOT / launcher), "-np", "2", "--", *FAST, "--output-dir", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        else:
            controller = launcher.rpartition("--")[2]
            ranks = 0 if launcher == "none" else 2
            done = train(*FAST, ranks=ranks, controller=controller, folder=folder, forked=bool(ranks))
        return succeeded(done), folder

    return trained


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that runs a command without a launcher, in a fork of a process that has imported PyTorch."""
    with ForkedCommands(tmp_path_factory.mktemp("commands")) as commands:

        def alone(*argv, folder=None, module="hvd_adam.train"):
            return commands.run(module, *argv, *(["--output-dir", folder] if folder else []))

        yield alone


@pytest.mark.parametrize("launcher", ["none", "horovodrun --mpi", "horovodrun --gloo", "launch/mpirun.sh"])
def test_every_launcher_trains_and_writes_a_complete_run_folder(launcher, trained):
    ranks = 1 if launcher == "none" else 2
    done, folder = trained(launcher)
    assert done.stdout.count("test accuracy") == 1  # from rank 0 only
    assert f"run folder {folder}" in done.stdout
    steps = 1442 // (32 * ranks)
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == {
        *(".lock", "config.yaml", "metrics.jsonl", "curves.png", "checkpoints"),
        *("mistakes.json", f"mistakes-{steps:08d}.png"),
    }
    any_number = {"step", "slow_rank", "slow_rank_end"}  # other tests take the core of a rank
    assert [event["event"] for event in events(folder) if event["event"] not in any_number] == [
        *("start", "eval", "checkpoint", "end"),
    ]
    assert events(folder)[-1]["test_accuracy"] == events(folder, "eval")[-1]["test_accuracy"] > 0.5
    assert events(folder)[-1]["images_per_second"] > 0
    assert events(folder)[0]["world_size"] == ranks
    assert events(folder)[0]["data"]["classes"] == [str(digit) for digit in range(10)]
    assert events(folder, "step")[-1]["step"] == steps
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = (folder / "config.yaml").read_text()
    assert yaml.safe_load(config)["epochs"] == 1
    assert f"# World size: {ranks}\n" in config
    assert re.search(r"^# Command line: \S*python\S* .*-m hvd_adam.train .*--log-every 5", config, re.MULTILINE)

    board = EventAccumulator(str(folder)).Reload()
    tags = {"train/loss", "optim/lr", "optim/grad_norm", "perf/images_per_second", "eval/loss", "eval/accuracy"}
    assert tags | {"eval/balanced_accuracy", "eval/calibration_error"} == set(board.Tags()["scalars"])
    point = board.Scalars("train/loss")[-1]
    assert (point.step, point.value) == (steps, pytest.approx(events(folder, "step")[-1]["loss"]))

    state = checkpoint(folder)
    assert (state["progress"]["step"], state["progress"]["epoch"]) == (steps, 1)
    model = torch.nn.ParameterList([w for w in state["model"].values()])
    torch.optim.Adam(model.parameters()).load_state_dict(state["optimizer"])


def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(tmp_path):
    curves = {}
    for ranks, batch, accumulate in ((1, 64, 1), (2, 32, 1), (4, 16, 1)):
        folder = tmp_path / f"{ranks}x{batch}x{accumulate}"
        sizes = ["--batch-size", batch, "--accumulate", accumulate]
        fixed = ["--max-steps", 30, "--epochs", 3, "--log-every", 1, "--eval-every", 9, "--lr-scaling", "none"]
        succeeded(train(*fixed, *sizes, ranks=ranks, folder=folder))
        curves[folder.name] = losses(folder)
        assert len(curves[folder.name]) == 30
    one = curves.pop("1x64x1")
    assert one[-1] < 0.5 * one[0]
    for name, curve in curves.items():
        assert torch.all((curve - one).abs() <= 1e-3 * one), (name, ((curve - one) / one).abs().max())


def test_float64_weights_do_not_depend_on_the_number_of_ranks(tmp_path):
    weights = []
    for ranks, batch, accumulate in ((0, 64, 1), (2, 16, 2)):
        folder = tmp_path / f"{ranks}"
        sizes = ["--batch-size", batch, "--accumulate", accumulate, "--max-grad-norm", 1, "--model", "mlp"]
        fixed = ["--max-steps", 50, "--epochs", 3, "--lr-scaling", "none", "--precision", "float64"]
        succeeded(train(*fixed, *sizes, ranks=ranks, folder=folder))
        weights.append(checkpoint(folder)["model"])
    for other in weights[1:]:
        for name, weight in weights[0].items():
            assert (weight - other[name]).abs().max() < 1e-9, name


def test_the_same_command_gives_the_same_losses_and_another_seed_does_not(tmp_path):
    fixed = ["--max-steps", 12, "--log-every", 1, "--dropout", 0.5]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        succeeded(train(*fixed, "--seed", seed, folder=tmp_path / name))
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_evaluate_counts_each_image_once_at_any_number_of_ranks(trained):
    _, folder = trained("none")
    end = events(folder)[-1]
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    for ranks, path in (
        (0, folder),
        (0, latest),
        (0, folder / "checkpoints" / "latest"),
        (3, folder / "checkpoints"),
    ):
        done = succeeded(train("--checkpoint", path, "--json", ranks=ranks, module="hvd_adam.evaluate"))
        (line,) = [line for line in done.stdout.splitlines() if "test_loss" in line]
        scores = json.loads(line.partition(">:")[2] or line)
        assert scores["images"] == 355  # not divisible by 3
        assert scores["test_accuracy"] == end["test_accuracy"]
        assert scores["test_loss"] == pytest.approx(end["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        "--precision bf16 --channels-last --weight-decay 0.01 --decoupled-weight-decay --amsgrad "
        "--compression auto:any",
        # A convolution in float16 takes 30 times as long on a CPU as one in float32.
        "--model mlp --lr 3e-3 --precision fp16 --compression fp16 --accumulate 2 --max-grad-norm 1 "
        "--lr-decay linear",
        "--compression bf16 --lr-scaling sqrt --lr-decay step --lr-decay-epochs 0.5 --warmup-epochs 0.25",
    ],
)
def test_options_work_together_on_two_ranks(options, tmp_path):
    succeeded(train(*FAST, *options.split(), ranks=2, folder=tmp_path / "run"))
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]


def test_adasum_trains_under_mpi_without_learning_rate_scaling(tmp_path):
    options = ["--op", "adasum", "--compression", "auto:any"]
    done = succeeded(train(*FAST, *options, ranks=2, controller="mpi", folder=tmp_path / "run"))
    assert done.stdout.count("compression auto:any: uses none: op='adasum' leaves no choice") == 1
    assert {event["compression"] for event in events(tmp_path / "run", "step")} == {"none"}
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]
    assert max(event["lr"] for event in events(tmp_path / "run", "step")) <= 1e-3


def test_the_learning_rate_warms_up_from_lr_to_the_scaled_rate(tmp_path):
    options = ["--lr-decay", "constant", "--warmup-epochs", "0.5", "--log-every", "1", "--epochs", "1"]
    succeeded(train(*options, ranks=2, folder=tmp_path / "run"))
    rates = [event["lr"] for event in events(tmp_path / "run", "step")]
    assert rates[0] == 1e-3
    assert rates[5] == pytest.approx(1e-3 * (1 + 5 / 11))  # half an epoch is 11 of 22 steps
    assert rates[11:] == [2e-3] * 11


def test_batch_norm_evaluates_as_saved_and_compiled_models_save_plain_names(tmp_path):
    folder = tmp_path / "run"
    synthetic = "--dataset synthetic --synthetic-shape 1x8x8 --synthetic-samples 64".split()
    succeeded(
        train(
            *synthetic,
            "--model",
            "resnet18",
            "--sync-batchnorm",
            "--epochs",
            1,
            "--batch-size",
            8,
            ranks=2,
            folder=folder,
        )
    )
    done = succeeded(train("--checkpoint", folder, "--json", module="hvd_adam.evaluate"))
    assert json.loads(done.stdout)["test_accuracy"] == events(folder)[-1]["test_accuracy"]

    folder = tmp_path / "compiled"
    one_thread = {"env": {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}}  # no processes that import torch
    succeeded(train("--model", "mlp", "--compile", "--max-steps", 3, folder=folder, **one_thread))
    assert set(checkpoint(folder)["model"]) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_cifar10_trains_with_all_classes_and_with_one_class_against_the_rest(tmp_path):
    write_cifar10(tmp_path / "data")
    data = ["--dataset", "cifar10", "--data-dir", tmp_path / "data", "--batch-size", 16, *FAST]
    succeeded(train(*data, ranks=2, folder=tmp_path / "ten"))
    assert 0 <= events(tmp_path / "ten")[-1]["test_accuracy"] <= 1
    assert checkpoint(tmp_path / "ten")["data"]["classes"][0] == "airplane"
    done = succeeded(train(*data, "--positive-class", "airplane", folder=tmp_path / "two"))
    assert "test balanced accuracy" in done.stdout
    assert checkpoint(tmp_path / "two")["data"]["classes"] == ["rest", "airplane"]


# Errors.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batch-size 2000", "2000"),
        ("--dataset digit", "digits"),
        ("--model resnet19", "resnet18"),
        ("--model no.such:model", "no.such"),
        ("--positive-class zebra", "zebra"),
        ("--dataset cifar10 --no-download --data-dir {tmp}/empty", "cifar-10-python.tar.gz"),
        ("--device cuda", "sees no GPU"),
        ("--lr-scaling sqrt --accumulate 20", "below 0"),
    ],
)
def test_bad_input_is_reported_in_one_line_and_writes_nothing(alone, argv, message, tmp_path):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = alone(*argv.format(tmp=tmp_path).split(), folder=tmp_path / "run")
    assert message in one_line(done)
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_the_error_names_a_damaged_data_file(alone, tmp_path):
    folder = write_cifar10(tmp_path / "data")
    file = folder / "data_batch_1"
    file.write_bytes(file.read_bytes()[:100])
    done = alone("--dataset", "cifar10", "--data-dir", tmp_path / "data", folder=tmp_path / "run")
    assert "data_batch_1" in one_line(done)


def test_a_run_folder_that_is_unwritable_or_holds_a_run_is_refused(alone, trained, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the run folder" in one_line(alone(folder=tmp_path / "file" / "run"))
    _, folder = trained("none")
    before = (folder / "metrics.jsonl").read_text()
    assert "holds a run already" in one_line(alone(*FAST, "--resume", "never", folder=folder))
    assert (folder / "metrics.jsonl").read_text() == before


def test_paths_that_the_system_refuses_are_reported_as_bad_input(alone, tmp_path):
    long = "x" * 300
    assert "cannot write to the run folder" in one_line(alone(folder=tmp_path / long))
    assert "cannot look into" in one_line(
        alone("--dataset", "cifar10", "--data-dir", long, folder=tmp_path / "run")
    )
    assert "cannot be read" in one_line(alone("--checkpoint", long, module="hvd_adam.evaluate"))


FULL_DISK_MODEL = """
import resource, signal
from hvd_adam.models.zoo import ConvNet

def build(**wanted):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, -1))
    return ConvNet(**wanted)
"""


def test_a_full_disk_is_reported_and_leaves_no_partial_checkpoint(tmp_path):
    # Once the model is built, no file may grow past 500 kB; a checkpoint has 5 MB.
    (tmp_path / "full.py").write_text(FULL_DISK_MODEL)
    done = train("--max-steps", 1, "--model", "full:build", "--output-dir", tmp_path / "run", cwd=tmp_path)
    assert "cannot write the checkpoint" in one_line(done)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_diverging_run_logs_a_warning_and_keeps_its_metrics_readable(alone, tmp_path):
    options = ["--lr", "1e30", "--model", "mlp", "--max-steps", "8", "--log-every", "1"]
    done = succeeded(alone(*options, folder=tmp_path / "run"))
    assert "warning: loss is no longer finite (step" in done.stderr
    assert events(tmp_path / "run", "step")[-1]["loss"] is None


def test_updates_skipped_by_the_loss_scaler_are_recorded(alone, tmp_path):
    # GradScaler starts with a scale of 65536, at which float16 gradients of a large loss overflow.
    options = [
        "--precision",
        "fp16",
        "--model",
        "mlp",
        "--max-steps",
        "8",
        "--lr",
        "1e3",
        "--lr-decay",
        "constant",
    ]
    succeeded(alone(*options, folder=tmp_path / "run"))
    skips = events(tmp_path / "run", "skip")
    assert skips
    assert [event["skipped"] for event in skips] == list(range(1, len(skips) + 1))


# Of an argument alone, and of what the model's name must be.
BAD_INPUT = {"--lr -1": "--lr is -1.0: it must be 0 or above", "--model resnet19": "resnet18"}


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("horovodrun.sh --gloo", "--lr -1"),
        ("horovodrun.sh --gloo", "--model resnet19"),
        ("horovodrun.sh --mpi", "--model resnet19"),
        ("mpirun.sh", "--lr -1"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2_under_every_launcher(script, argv, tmp_path):
    command = ["bash", *f"{ROOT}/launch/{script}".split(), "-np", "2", "--", *argv.split()]
    python = forked_python() if "--model" in argv else sys.executable  # what needs no PyTorch is a new process
    environ = {**os.environ, "HVD_ADAM_PYTHON": python}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path, env=environ)
    assert BAD_INPUT[argv] in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_ranks_started_with_different_arguments_are_refused(tmp_path):
    python = [forked_python(), "-m", "hvd_adam.train", "--output-dir", str(tmp_path / "run"), "--seed"]
    root = ["--allow-run-as-root", "-H", "localhost:2", "--quiet"]
    command = ["mpirun", *root, "-np", "1", *python, "1", ":", "-np", "1", *python, "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "the ranks have different arguments: seed is 1 on rank 0 and 2 on rank 1" in one_line(done)
    assert not (tmp_path / "run").exists()


def test_a_bad_argument_on_a_rank_other_than_0_ends_the_job(tmp_path):
    python = [sys.executable, "-m", "hvd_adam.train", "--output-dir", str(tmp_path / "run"), "--lr"]
    root = ["--allow-run-as-root", "-H", "localhost:2", "--quiet"]
    command = ["mpirun", *root, "-np", "1", *python, "1e-3", ":", "-np", "1", *python, "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert "--lr is -1.0: it must be 0 or above [rank 1 on " in done.stderr


def test_a_checkpoint_that_is_foreign_damaged_or_missing_is_refused(alone, tmp_path):
    folder = tmp_path / "run"
    succeeded(alone("--max-steps", 1, "--model", "mlp", folder=folder))
    (step,) = (folder / "checkpoints").glob("step-*")

    def evaluate(*argv):
        return one_line(alone("--checkpoint", folder, *argv, module="hvd_adam.evaluate"))

    assert "no checkpoint in" in one_line(alone("--checkpoint", tmp_path / "no", module="hvd_adam.evaluate"))
    assert "of another model or data set: its classes are" in evaluate("--dataset", "synthetic")
    content = (step / "state.pt").read_bytes()
    (step / "state.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "state.pt does not match its checksum" in evaluate()
    (step / "state.pt").unlink()
    assert "state.pt is missing" in evaluate()
    (step / "manifest.json").write_text("{")
    assert "manifest.json is unreadable" in evaluate()


def test_a_checkpoint_of_a_changed_model_is_refused_with_the_first_difference(tmp_path):
    code = (
        "import torch\ndef build(in_channels, num_classes, image_size):\n return torch.nn.Sequential({layers})\n"
    )
    plain = "torch.nn.Flatten(), torch.nn.Linear(64, 10)"
    (tmp_path / "mine.py").write_text(code.format(layers=plain))
    environ = {"env": {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}}
    succeeded(train("--max-steps", 1, "--model", "mine:build", folder=tmp_path / "run", **environ))
    (tmp_path / "mine.py").write_text(
        code.format(layers="torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False)")
    )
    done = train("--checkpoint", tmp_path / "run", module="hvd_adam.evaluate", **environ)
    assert "of another model or data set: 1.bias is (10,) in it and absent in the model" in one_line(done)
