"""Messages for arguments that are not accepted.

Hazards: an internal error of the parser as the message; a suggestion that is no option; a file without its line; a
line that is blamed for a value of the command line; a folder named `~`.
"""

import json
from dataclasses import fields

import pytest

from hvd_adam.argument_checks import SYNONYMS
from hvd_adam.arguments import parse
from hvd_adam.bench.config import CheckpointConfig
from hvd_adam.config import EvaluateConfig, TrainConfig
from hvd_adam.errors import UserError


def message(*argv, config=TrainConfig, name="hvd_adam.train"):
    with pytest.raises(UserError) as refusal:
        parse(config, name, argv)
    assert "\n" not in str(refusal.value)
    assert "<" not in str(refusal.value) and "NestedArg" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--batchsize 8", "--batchsize is not an option: did you mean --batch-size?"),
        ("--learning-rate 1", "did you mean --lr?"),
        ("--learning_rate=1", "did you mean --lr?"),
        ("--epoch 3 --batchsize 8", "did you mean --batch-size?"),
        ("-lr 0.1", "-lr is not an option: did you mean --lr?"),
        ("—lr 0.1", "—lr is not an option: did you mean --lr?"),
        ("--weigth-decay 0.1", "did you mean --weight-decay"),
        ("--gradient-accumulation-steps 2", "did you mean --accumulate?"),
        ("--np 2", "the launcher sets the number of ranks"),
        ("--zzz 2", "--zzz is not an option (see python -m hvd_adam.train --help)"),
        ("cifar10", "cifar10 belongs to no option"),
        ("--amsgrad true", "--amsgrad takes no value: write --amsgrad or --no-amsgrad"),
        ("--no-amsgrad=true", "--amsgrad takes no value"),
        ("--model.width 64", "--model.width is not an option: --model has one value"),
        ("--lr.a=3", "--lr.a is not an option: --lr has one value"),
        ("--config.lr 3", "--config.lr is not an option"),
    ],
)
def test_an_unknown_option_is_answered_with_what_may_be_meant(argv, words):
    assert words in message(*argv.split())


def test_every_synonym_leads_to_an_option():
    configs = (TrainConfig, EvaluateConfig)
    known = {name.replace("_", "-") for config in configs for name in (item.name for item in fields(config))}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


@pytest.mark.parametrize("option", ["--weight_decay", "--epochs", "--dataset", "--output-dir", "--config"])
@pytest.mark.parametrize("equals", [True, False])
def test_an_empty_value_is_named(option, equals):
    argv = [f"{option}="] if equals else [option, ""]
    assert f"{option.replace('_', '-')} has an empty value" in message(*argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nepoch: 3\n", "line 2: epoch is not an option: did you mean epochs?"),
        ("learning_rate: 0.1\n", "line 1: learning_rate is not an option: did you mean lr?"),
        ("epochs: 3\n\nmodel:\n  width: 3\n", "line 3: model has nested values"),
        ("lr: 1\nseed: 3\nlr: 2\n", "line 3: lr is given twice"),
        ("lr:\n", "line 1: lr has an empty value"),
        ("model: a:b\nmodel_args: 3\n", "line 2: --model-args is 3: it must be a mapping"),
        ("lr: null\n", "line 1: --lr is null: it must be a number"),
        ("seed: 3\nepochs: lots\n", "line 2: --epochs is lots: it must be a whole number"),
        ("seed: 3\nlr: -1\n", "line 2: --lr is -1"),
        ("betas: [0.9]\n", "line 1: --betas must be two numbers"),
        ("betas: 5\n", "line 1: --betas must be two numbers"),
        ("device: tpu\n", "line 1: --device is tpu: it must be one of auto, cpu, cuda"),
        ("amsgrad: maybe\n", "line 1: amsgrad is maybe: it must be true or false"),
        ("seed: 1\ncommit_every: 3\n", "line 2: --commit-every 3 has no effect without --elastic"),
        ("lr: [1\nfoo: 3\n", "line 2: this is not valid YAML"),
        ("- 3\n", "has no options"),
        ("", "has no options"),
        ("output_dir: $NOT_SET_HERE/x\n", "line 1: --output-dir is $NOT_SET_HERE/x: the variable NOT_SET_HERE is"),
    ],
)
def test_an_error_in_a_file_names_file_and_line(text, words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for argv in (["--config", str(path)], [f"--config={path}"]):
        found = message(*argv)
        assert words in found and str(path) in found


@pytest.mark.parametrize("spelling", ["--model-args", "--model_args", "--model.args"])
def test_arguments_of_functions_are_mappings_on_the_command_line_and_in_files(spelling, tmp_path):
    given = {"width": 64, "layers": [1, 2], "norm": {"kind": "batch", "eps": 0.1}, "bias": None}
    (tmp_path / "run.yaml").write_text(f"model: own:build\nmodel_args: {json.dumps(given)}\n")
    from_file = parse(TrainConfig, "hvd_adam.train", ["--config", str(tmp_path / "run.yaml")])
    argv = ["--model", "own:build", spelling, json.dumps(given)]
    assert from_file.model_args == parse(TrainConfig, "hvd_adam.train", argv).model_args == given
    argv = ["--config", str(tmp_path / "run.yaml"), f"{spelling}={{width: 2}}"]
    assert parse(TrainConfig, "hvd_adam.train", argv).model_args == {"width": 2}  # not merged with the file's


def test_a_value_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 0.1\n")
    assert message("--config", str(tmp_path / "run.yaml"), "--lr", "-1").startswith("--lr is -1.0")


@pytest.mark.parametrize(
    "config",
    [f"{option}: {{}}" for option in ("data_dir", "output_dir", "resume")],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_home_and_variables_are_expanded_in_paths(config, from_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    option = config.partition(":")[0]
    needed = ["--dataset", "cifar10"]
    if from_file:
        (tmp_path / "run.yaml").write_text(config.format("~/$PLACE/${PLACE}"))
        argv = ["--config", "~/run.yaml"]
    else:
        argv = [f"--{option}=~/$PLACE/${{PLACE}}"]
    assert getattr(parse(TrainConfig, "hvd_adam.train", [*needed, *argv]), option) == f"{tmp_path}/here/here"


def test_paths_of_the_other_commands_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--checkpoint=~/run", "--data-dir=~/data"]
    config = parse(EvaluateConfig, "hvd_adam.evaluate", argv)
    assert (config.checkpoint, config.data_dir) == (f"{tmp_path}/run", f"{tmp_path}/data")
    bench = parse(CheckpointConfig, "hvd_adam.bench checkpoint", ["--folder=~/", "--plot=~/a.png"])
    assert (bench.folder, bench.plot) == (f"{tmp_path}/", f"{tmp_path}/a.png")


def test_every_option_for_a_path_is_declared_as_one():
    words = ("folder of", "run folder", "path of", "directory", "PNG file")
    for config in (TrainConfig, EvaluateConfig, CheckpointConfig):
        for item in fields(config):
            if item.name != "which" and any(word in item.metadata["help"] for word in words):
                assert item.metadata["path"], item.name


@pytest.mark.parametrize("path", ["$NOT_SET_HERE/x", "${NOT_SET_HERE}", "~no-such-user/x"])
def test_a_path_that_cannot_be_expanded_is_refused(path):
    assert f"--output-dir is {path}" in message("--output-dir", path)


def test_both_spellings_of_print_config_print_it(capsys):
    for option in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit) as end:
            parse(TrainConfig, "hvd_adam.train", ["--epochs", "7", option])
        assert end.value.code == 0
        assert "epochs: 7\n" in capsys.readouterr().out
