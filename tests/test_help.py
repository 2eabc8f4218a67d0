"""`--help`, `--version` and `--print-config`.

Hazards: an option that is in no group or in two; internals of the parser in the text; an example that is refused.
"""

import shlex
from dataclasses import fields

import pytest

from hvd_adam import __version__
from hvd_adam.arguments import parse
from hvd_adam.bench.config import AdamConfig
from hvd_adam.compare.config import CompareConfig
from hvd_adam.config import AdviseConfig, EvaluateConfig, ExportConfig, PredictConfig, TrainConfig
from hvd_adam.simulate.config import CalibrateConfig, TuneConfig
from hvd_adam.simulate.config import PredictConfig as PredictScalingConfig

COMMANDS = {
    "hvd_adam.train": TrainConfig,
    "hvd_adam.evaluate": EvaluateConfig,
    "hvd_adam.predict": PredictConfig,
    "hvd_adam.export": ExportConfig,
    "hvd_adam.compare": CompareConfig,
    "hvd_adam.advise": AdviseConfig,
    "hvd_adam.simulate calibrate": CalibrateConfig,
    "hvd_adam.simulate predict": PredictScalingConfig,
    "hvd_adam.simulate tune": TuneConfig,
    "hvd_adam.bench adam": AdamConfig,
}


def printed(capsys, name, *argv):
    with pytest.raises(SystemExit) as end:
        parse(COMMANDS[name], name, argv)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_once_and_no_internals(name, capsys):
    text = printed(capsys, name, "--help")
    options = [item for item in fields(COMMANDS[name]) if not item.metadata["positional"]]
    positionals = [word for item in fields(COMMANDS[name]) if (word := item.metadata["positional"])]
    for item in options:
        option = f"  --{item.name.replace('_', '-')}"
        assert sum(line.startswith((f"{option} ", f"{option},")) for line in text.splitlines()) == 1, option
    assert "0x" not in text and "<function" not in text and "two_numbers" not in text and "_" * 3 not in text
    words = "".join(f" {word} [{word} ...]" for word in positionals)
    assert text.startswith(f"usage: python -m {name} [options]{words}\n")
    for option in ("--config", "--print-config", "--version"):
        assert f"  {option}" in text


def test_the_options_of_the_training_are_in_groups_with_the_frequent_ones_first(capsys):
    text = printed(capsys, "hvd_adam.train", "--help")
    titles = ["frequent options", *"data model optimizer schedule distribution".split()]
    titles += ["precision and device", "checkpoints", "logging", "examples"]
    places = [text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert places[0] < text.index("  --lr X") < places[1]
    grouped = " ".join(TrainConfig.GROUPS.values()).split()
    assert sorted(grouped) == sorted(item.name for item in fields(TrainConfig))


@pytest.mark.parametrize("name", [name for name in COMMANDS if "bench" not in name])
def test_the_examples_are_valid_command_lines(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("lr: 0.002\n")
    examples = [line for line in COMMANDS[name].EXAMPLES.splitlines() if f"python -m {name}" in line]
    assert len(examples) >= 2
    for line in examples:
        argv = shlex.split(line.partition(name)[2].partition(">")[0])
        if "--print-config" in argv:
            assert "lr: 0.002" in printed(capsys, name, *argv)
        else:
            parse(COMMANDS[name], name, argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_version(name, capsys):
    assert printed(capsys, name, "--version") == f"hvd_adam {__version__}\n"
