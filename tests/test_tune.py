"""`--tune`: options are chosen by measurement before the first update, and nothing else is changed.

Hazards: a tuned run that differs from one with the same options in a bit (random generators, weights, loss scale);
options that round gradients although that was not allowed; a choice that differs between ranks; a resumed run that
measures again, and chooses something else; an option of the user's that is overridden.
"""

import os
import re

import pytest
import torch
import yaml
from helpers.training_runs import checkpoint, events, succeeded, train

from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.automatic.trial import Lap
from hvd_adam.distributed.launch_env import forget_tune_file
from hvd_adam.errors import UserError
from hvd_adam.training.tuning.options import Choice, command_line, stages
from hvd_adam.training.tuning.tune import Tuning

RUN = ("--model", "mlp", "--max-steps", 4, "--eval-every", 20, "--batch-size", 16)
MIB = 2**20


def stages_of(
    compressions=("none", "int4"), strategies=("allreduce", "sharded"), ranks=2, threads=1, size=40 * MIB
):
    compared = stages(compressions, strategies, ranks=ranks, threads=threads, gradient_bytes=size)
    return [[dict(options) for options in stage] for stage in compared]


def test_strategies_and_compressions_are_compared_together_the_defaults_first():
    pairs, buckets = stages_of()
    assert pairs == [
        {},
        {"strategy": "sharded"},
        {"compression": "int4"},
        {"strategy": "sharded", "compression": "int4"},
    ]
    assert buckets == [{}, {"bucket_mib": 2.0}, {"bucket_mib": 32.0}]


def test_sizes_that_make_the_same_buckets_are_not_compared():
    assert stages_of(size=3 * MIB)[1] == [{}, {"bucket_mib": 2.0}]
    assert len(stages_of(size=MIB)) == 1


def test_one_rank_compares_threads_only():
    assert stages_of(ranks=1, threads=8) == [[{}, {"threads": 7}, {"threads": 4}, {"threads": 1}]]
    assert stages_of(ranks=1, threads=2) == [[{}, {"threads": 1}]]
    assert stages_of(ranks=1) == []


class Machine(Tuning):
    """Has the times of updates by command line, in place of measurements."""

    def __init__(self, seconds, allowed="any", compared=None):
        self.seconds, self._allowed, self._stages = seconds, allowed, lambda: compared
        self._cluster = type("Cluster", (), {"size": 2})

    def updates(self, options, number):
        return [Lap(self.seconds[command_line(options)], 0.0)] * number


def test_each_stage_continues_with_the_fastest_of_the_one_before():
    seconds = {"the defaults": 0.5, "--strategy sharded": 0.6, "--compression int4": 0.2}
    seconds |= {"--strategy sharded --compression int4": 0.25}
    seconds |= {"--compression int4 --bucket-mib 2": 0.1, "--compression int4 --bucket-mib 32": 0.3}
    choice = Machine(seconds, compared=stages_of()).choose()
    assert choice == Choice("any", 2, {"compression": "int4", "bucket_mib": 2.0}, seconds)
    assert choice.summary() == (
        "tune: uses --compression int4 --bucket-mib 2: 100 ms an update, 500 with the defaults "
        "(5.00 times as fast)"
    )


def test_what_gains_less_than_two_percent_is_not_chosen():
    seconds = {"the defaults": 0.0500, "--strategy sharded": 0.0495}
    choice = Machine(seconds, compared=stages_of(["none"], size=MIB)).choose()
    assert choice.options == {}
    assert choice.summary() == "tune: nothing measured is faster than the defaults, 50 ms an update"


def test_one_rank_with_one_thread_is_trained_with_the_defaults():
    choice = Machine({}, compared=[]).choose()
    assert choice.options == {}
    assert choice.summary() == "tune: uses the defaults: there is nothing to compare on one rank with one thread"


def tuned(folder, *argv, **options):
    done = succeeded(train(*RUN, *argv, folder=folder, ranks=2, **options))
    return done, events(folder)[0]["tune"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks that was tuned, and then continued; its output, its first choice, its folder."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    first, choice = tuned(folder, "--tune", "any", "--max-steps", 2)
    return first, choice, succeeded(train(*RUN, "--tune", "any", folder=folder, ranks=2)), folder


def test_all_allowed_options_are_measured_and_the_choice_is_recorded(run):
    first, choice, _, folder = run
    assert {"the defaults", "--strategy sharded", "--compression bf16"} <= choice["seconds"].keys()
    assert "--strategy sharded --compression int4" in choice["seconds"]
    assert (choice["allowed"], choice["ranks"]) == ("any", 2)
    assert len(re.findall(r"^.*tune: (?:uses|nothing measured).*$", first.stdout + first.stderr, re.M)) == 1
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["tune"] == "off"
    assert {name: recorded[name] for name in choice["options"]} == choice["options"]


def test_a_tuned_run_equals_one_with_the_same_options_in_every_bit_also_resumed(run, tmp_path):
    _, choice, _, folder = run
    argv = [word for name, value in choice["options"].items() for word in (f"--{name.replace('_', '-')}", value)]
    succeeded(train(*RUN, *argv, folder=tmp_path / "plain", ranks=2))
    found, expected = checkpoint(folder), checkpoint(tmp_path / "plain")
    assert found["progress"]["step"] == 4
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value)
    for number, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, found["optimizer"]["state"][number][key]) for key, value in state.items())


def test_a_resumed_run_takes_its_earlier_choice_without_measuring(run):
    _, choice, resumed, folder = run
    lines = re.findall("tune: (uses .*)", resumed.stdout + resumed.stderr)
    options = command_line(choice["options"])
    assert lines == [f"uses {options}, which this run has chosen: nothing is measured"]
    assert events(folder, "resume")[0]["tune"] == choice


def test_lossless_tuning_measures_nothing_that_rounds_gradients(tmp_path):
    _, choice = tuned(tmp_path / "run", "--tune", "lossless", controller="mpi")
    assert choice["seconds"].keys() <= {
        "the defaults",
        "--strategy sharded",
        "--bucket-mib 2",
        "--strategy sharded --bucket-mib 2",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--tune any --compression int8", "--tune any chooses --compression: give only one of them"),
        ("--tune lossless --strategy sharded --threads 2", "chooses --strategy and --threads"),
        ("--tune any --elastic", "--elastic changes: use --compression auto"),
        ("--tune any --op adasum", "--op adasum leaves --tune any no choice"),
        ("--bucket-mib 0", "--bucket-mib is 0.0: it must be above 0 and finite"),
        ("--threads 0", "--threads is 0: it must be at least 1"),
    ],
)
def test_options_that_tuning_chooses_or_cannot_honour_are_refused(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(TrainConfig, "hvd_adam.train", argv.split())


def test_what_mpirun_makes_of_the_option_is_removed_and_a_file_of_the_users_is_not(monkeypatch):
    name = "OMPI_MCA_mca_base_envar_file_prefix"
    for value, left in (("any", None), ("/home/user/parameters", "/home/user/parameters")):
        monkeypatch.setenv(name, value)
        forget_tune_file()
        assert os.environ.get(name) == left


def test_threads_are_those_of_the_option(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def loss(outputs, targets):\n"
        "    assert torch.get_num_threads() == 3\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    argv = ("--model", "mlp", "--loss", "mine:loss", "--max-steps", 1)
    succeeded(train(*argv, "--threads", 3, folder=tmp_path / "run", env={"PYTHONPATH": str(tmp_path)}, ranks=1))
    assert (
        "AssertionError"
        in train(*argv, folder=tmp_path / "other", env={"PYTHONPATH": str(tmp_path)}, ranks=1).stderr
    )


def test_a_wrong_checkpoint_is_refused_before_anything_is_measured(tmp_path):
    argv = ("--model", "mlp", "--tune", "any", "--resume", tmp_path / "nothing")
    done = train(*argv, folder=tmp_path / "run")
    assert done.returncode == 2 and f"no checkpoint in {tmp_path / 'nothing'}" in done.stderr
    assert "tune" not in done.stdout and not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_copied_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import threading, torch\n"
        "def build(sample_shape, num_classes):\n"
        "    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n"
        "    model.lock = threading.Lock()\n"
        "    return model\n"
    )
    argv = ("--model", "mine:build", "--tune", "any")
    done = train(*argv, folder=tmp_path / "run", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "--tune cannot copy the model" in done.stderr
    assert not (tmp_path / "run").exists()
