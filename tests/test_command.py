"""The command line: the options it accepts, and one line with exit code 2, in no time, for bad arguments.

Hazards: a slow import before the arguments are known to be good; a traceback or a page of usage for a typo;
options that are accepted and ignored; impossible combinations that fail hours later.
"""

import os
import subprocess
import sys

import pytest
import yaml

from hvd_adam.cli import parse
from hvd_adam.config import EvaluateConfig, TrainConfig
from hvd_adam.errors import UserError


def train_config(*argv):
    return parse(TrainConfig, "hvd_adam.train", argv)


def test_options_have_the_names_and_types_that_users_expect():
    config = train_config(
        *"--dataset cifar10 --batch-size 64 --lr 0.01 --betas 0.8,0.99 --amsgrad --no-download".split(),
        *"--max-grad-norm 1 --lr-decay step --lr-decay-epochs 30,60 --warmup-epochs 0.5".split(),
    )
    assert (config.dataset, config.batch_size, config.lr, config.betas) == ("cifar10", 64, 0.01, (0.8, 0.99))
    assert (config.amsgrad, config.download, config.max_grad_norm) == (True, False, 1.0)
    assert (config.milestones(), config.warmup_epochs) == ((30.0, 60.0), 0.5)


@pytest.mark.parametrize("spelling", ["0.8,0.99", "[0.8, 0.99]", "0.8 0.99"])
def test_betas_in_the_usual_spellings(spelling):
    assert train_config("--betas", spelling).betas == (0.8, 0.99)


def test_underscores_and_pytorchs_precision_names_are_understood():
    assert train_config("--batch_size=8", "--precision", "float64").precision == "fp64"
    assert train_config("--batch_size=8", "--precision=bfloat16").batch_size == 8


def test_the_command_line_overrides_a_configuration_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"lr": 0.5, "epochs": 3, "betas": [0.5, 0.6], "amsgrad": True}))
    config = train_config("--config", str(path), "--lr", "0.25")
    assert (config.lr, config.epochs, config.betas, config.amsgrad) == (0.25, 3, (0.5, 0.6), True)
    path.write_text("epoch: 3\n")
    with pytest.raises(UserError, match=r"run.yaml, line 1: epoch is not an option: did you mean epochs\?"):
        train_config("--config", str(path))


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}", "--conf {}"])
def test_the_command_line_overrides_a_configuration_file_that_stands_after_it(spelling, tmp_path):
    done = run("hvd_adam.train", "--print_config")  # every option, output_dir and elastic included
    (tmp_path / "run.yaml").write_text(done.stdout)
    (tmp_path / "more.yaml").write_text("epochs: 3\nkeep: 7\n")
    # As the launch scripts add them, in front of the user's.
    added = ["--output-dir", "runs/slurm-12/3", "--seed", "3", "--elastic", "--epochs", "5"]
    files = f"{spelling} {spelling}".format(tmp_path / "run.yaml", tmp_path / "more.yaml").split()
    config = train_config(*added, *files, "--seed", "4")
    assert (config.output_dir, config.elastic, config.epochs) == ("runs/slurm-12/3", True, 5)
    assert (config.seed, config.keep) == (4, 7)
    assert train_config(*added, *files, "--no-elastic").elastic is False


def test_a_configuration_file_without_a_name_is_refused():
    for argv in (["--lr", "1", "--config"], ["--config", "--lr", "1"]):
        with pytest.raises(UserError, match="--config"):
            train_config(*argv)


def test_a_printed_configuration_can_be_read_back(tmp_path):
    done = run("hvd_adam.train", "--epochs", "7", "--positive-class", "3", "--print_config")
    (tmp_path / "run.yaml").write_text(done.stdout)
    assert train_config("--config", str(tmp_path / "run.yaml")) == train_config(
        "--epochs", "7", "--positive-class", "3"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--foo 1", "--foo is not an option"),
        ("--batch-size x", "--batch-size is x: it must be a whole number"),
        ("--batch-size 1.5", "--batch-size is 1.5: it must be a whole number"),
        ("--lr much", "--lr is much: it must be a number"),
        ("--lr", "--lr needs a value: it must be a number .write a negative one as --lr=-1e-3"),
        ("--betas", "--betas needs a value: it must be two numbers, as in 0.9,0.999 .see"),
        ("--config", "--config needs a value: it must be a YAML file or recipe:NAME"),
        ("--lr -1", "--lr is -1.0: it must be 0 or above"),
        ("--lr nan", "--lr is nan: it must be a number"),
        ("--betas 0.9,1.0", r"--betas is 0.9,1: it must be two numbers in \[0, 1\)"),
        ("--betas 0.9", "--betas is 0.9: it must be two numbers, as in 0.9,0.999"),
        ("--eps=-1e-8", "--eps is -1e-08"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--accumulate 0", "--accumulate is 0: it must be at least 1"),
        ("--epochs 0", "--epochs is 0: it must be at least 1"),
        ("--max-grad-norm 0", "--max-grad-norm is 0.0: it must be above 0"),
        ("--stall-timeout 0", "--stall-timeout is 0.0: it must be above 0"),
        ("--seed -1", "--seed is -1"),
        ("--dropout 1", "--dropout is 1.0"),
        ("--strategy ring", "--strategy is ring: it must be one of allreduce"),
        ("--compression int2", "--compression is int2: it must be one of none, fp16, bf16, int8, int4"),
        ("--compression auto:some", "one of none, fp16, bf16, int8, int4, auto, auto:lossless, auto:any"),
        ("--compression int4 --precision fp64", "--compression int4 is not for --precision fp64"),
        ("--batch-size 8 --global-batch-size 16", "--batch-size and --global-batch-size exclude each other"),
        ("--op adasum --max-grad-norm 1", "--op adasum combines the ranks' own steps"),
        ("--op adasum --precision fp16", "--op adasum combines the ranks' own steps"),
        ("--op adasum --compression bf16", "--op adasum has no bf16 compression"),
        ("--op adasum --compression int8", "--op adasum has no int8 compression"),
        ("--lr-decay step", "--lr-decay step and --lr-decay-epochs go together"),
        ("--lr-decay-epochs 3", "--lr-decay step and --lr-decay-epochs go together"),
        ("--lr-decay step --lr-decay-epochs 3,2", "--lr-decay-epochs is 3,2: it must be ascending epochs"),
        ("--lr-decay step --lr-decay-epochs x", "--lr-decay-epochs is x: it must be ascending epochs"),
        ("--synthetic-shape ²x3x3", "--synthetic-shape is ²x3x3"),
        pytest.param(f"--synthetic-shape 3x3x{'1' * 5000}", "--synthetic-shape is 3x3x111", id="5000 digits"),
        ("--synthetic-shape 3x32", "--synthetic-shape is 3x32: it must be CHANNELSxHEIGHTxWIDTH"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    ],
)
def test_bad_arguments_are_named_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as error:
        train_config(*argv.split())
    assert "\n" not in str(error.value)


def test_global_batch_follows_from_ranks_and_micro_batches():
    assert train_config("--batch-size", "8", "--accumulate", "2").global_batch(4) == 64
    assert train_config("--global-batch-size", "64").global_batch(4) == 64
    with pytest.raises(UserError, match="--global-batch-size 64 does not divide by 3 ranks × 1 micro-batches"):
        train_config("--global-batch-size", "64").global_batch(3)


def test_evaluate_needs_a_checkpoint():
    with pytest.raises(UserError, match="--checkpoint is missing"):
        parse(EvaluateConfig, "hvd_adam.evaluate", [])


def run(module, *argv):
    command = [sys.executable, "-m", module, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("module", ["hvd_adam.train", "hvd_adam.evaluate"])
def test_help_lists_every_option_with_its_meaning(module):
    done = run(module, "--help")
    assert done.returncode == 0
    assert "--device {auto,cpu,cuda}" in done.stdout
    assert "a GPU where there is one" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--lr", "-1"], 2), (["--foo"], 2)])
def test_pytorch_is_not_loaded_for_help_or_a_bad_argument(argv, code):
    # A fast answer needs the absence of this import: PyTorch takes more than a second.
    script = (
        "import atexit, os, runpy, sys; os._exit = sys.exit; heavy = {'torch', 'horovod', 'numpy'}; "
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)))); "
        f"sys.argv = ['train', *{argv!r}]; runpy.run_module('hvd_adam.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert done.returncode == code
    assert "heavy: []" in done.stdout


def test_a_bad_argument_prints_one_line_on_stderr_and_exits_with_2():
    done = run("hvd_adam.train", "--lr", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hvd_adam.train: error: --lr is -1.0: it must be 0 or above\n"


def test_a_rank_that_is_stopped_while_it_starts_leaves_a_bad_argument_to_rank_0():
    # Rank 0 may have printed the error and exited before this rank has read its arguments.
    script = (
        "import os, signal; from hvd_adam import cli; from hvd_adam.config import TrainConfig; "
        "from hvd_adam.recovery.preemption import install_handlers; install_handlers(); "
        "os.kill(os.getpid(), signal.SIGTERM); cli.run(print, TrainConfig, 'hvd_adam.train', ['--lr', '-1'])"
    )
    environment = {**os.environ, "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("given", "printed", "code"), [("'no data here'", "no data here\n", 1), ("3", "", 3), ("None", "", 0)]
)
def test_the_exit_that_a_function_of_ones_own_asks_for_is_pythons(given, printed, code):
    script = (
        "import sys; from hvd_adam.cli import run; from hvd_adam.config import TrainConfig; "
        f"run(lambda config: sys.exit({given}), TrainConfig, 'hvd_adam.train', [])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == (printed, code)


def test_a_finished_command_exits_even_if_horovods_shutdown_hangs():
    # As Horovod's shutdown does if a rank was killed.
    script = (
        "import atexit, time; from hvd_adam import cli; from hvd_adam.config import TrainConfig; "
        "cli.SHUTDOWN_SECONDS = 0.5; atexit.register(time.sleep, 50); "
        "cli.run(lambda config: print('done'), TrainConfig, 'hvd_adam.train', [])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "done\n")
