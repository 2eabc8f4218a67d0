"""What a newcomer gets wrong, and the words of the answer: commands, exit codes and messages, in one table.

Hazards: a traceback; a wrong run with exit code 0; a message without the option, the value or the remedy.
"""

import shlex

import pytest
from helpers.forked_commands import ForkedCommands

MINE = """
import numpy as np
import torch
from hvd_adam.data import ImageData

def data(shape=(1, 4, 4), dtype=np.uint8, labels=2, classes=("a", "b"), count=64):
    images = np.zeros((count, *shape), dtype)
    numbers = np.arange(count, dtype=np.int64) % labels
    return ImageData("mine", classes, images, numbers, images, numbers)

good = lambda data_dir: data()
channels_last = lambda data_dir: data((32, 32, 3))
floats = lambda data_dir: data(dtype=np.float32)
many_labels = lambda data_dir: data(labels=3)
one_class = lambda data_dir: data(classes=("a",), labels=1)
empty = lambda data_dir: data(count=0)
a_list = lambda data_dir: [1, 2]
without_keyword = lambda: data()
with_size = lambda size: data()
number = 3

def three_logits(in_channels, num_classes, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size[0] * image_size[1], 3))

not_a_model = lambda **wanted: "model"
"""

# Arguments of hvd_adam.train: the words that its message must contain. The exit code is 2.
TRAIN = {
    # Names of options.
    "--batchsize 8": ["--batchsize is not an option", "--batch-size"],
    "--learning-rate 0.1": ["--learning-rate", "did you mean --lr?"],
    "--learning_rate=0.1": ["did you mean --lr?"],
    "--optimizr adam": ["--optimizr is not an option"],
    "--num-epochs 3": ["did you mean --epochs?"],
    "--wd 0.1": ["did you mean --weight-decay?"],
    "--grad-clip 1": ["did you mean --max-grad-norm?"],
    "--warmup-steps 10": ["did you mean --warmup-epochs?"],
    "--fp16": ["did you mean --precision?"],
    "--save-dir out": ["did you mean --output-dir?"],
    "--np 2": ["--np", "horovodrun"],
    "-lr 0.1": ["-lr is not an option", "--lr"],
    "–-lr 0.1": ["did you mean --lr?"],
    "cifar10": ["cifar10 belongs to no option"],
    "--model.width 64": ["--model.width is not an option", "--model-args '{\"width\": 64}'"],
    # Values.
    "--weight_decay ''": ["--weight-decay has an empty value"],
    "--output-dir=": ["--output-dir has an empty value"],
    "--lr much": ["--lr is much: it must be a number"],
    "--lr": ["--lr needs a value", "a number"],
    "--lr -1e-3": ["write a negative one as --lr=-1e-3"],
    "--tune": ["--tune needs a value: it must be one of off, lossless, any"],
    "--config recipe:digts": ["recipe:digts: there is no such recipe", "did you mean digits?"],
    "--dataset imagefolder --data-dir nowhere": ["--data-dir nowhere is not a folder"],
    "--dataset imagefolder --data-dir folder": ["folder has no folders", "at least 2 classes"],
    "--dataset imagefolder --image-size 4": ["--image-size is 4", "at least 8"],
    "--dataset imagefolder --max-corrupt -1": ["--max-corrupt is -1", "0 or above"],
    "--dataset imagefolder --workers -1": ["--workers is -1", "0 or above"],
    "--workers 4": ["--workers 4 has no effect"],
    "--lr -1": ["--lr is -1.0", "0 or above"],
    "--lr nan": ["--lr is nan"],
    "--lr 1e400": ["--lr is inf", "a finite number"],
    "--lr 0,1": ["--lr is 0,1: it must be a number"],
    "--epochs 2.5": ["--epochs is 2.5: it must be a whole number"],
    "--epochs 0": ["--epochs is 0", "at least 1"],
    "--epochs 1 2": ["2 belongs to no option", "--epochs takes one value"],
    "--epochs 99999999999999999999": ["--epochs is 1e+20", "below 2⁶³"],
    f"--seed {10**400}": ["--seed is too large: it must be below 2⁶³"],
    "--batch-size 1e2": ["--batch-size is 1", "it must be a whole number"],
    "--betas 0.9": ["--betas is 0.9: it must be two numbers"],
    "--betas 0.9 0.999": ["--betas is 0.9"],
    "--betas 0.9,1.0": ["two numbers in [0, 1)"],
    "--device gpu": ["--device is gpu: it must be one of auto, cpu, cuda"],
    "--precision half": ["--precision is half: it must be one of fp32"],
    "--amsgrad true": ["--amsgrad takes no value"],
    "--seed -1": ["--seed is -1"],
    "--synthetic-shape 3x32": ["CHANNELSxHEIGHTxWIDTH"],
    "--model mine:three_logits --model.args width=64": ["--model-args is width=64", "a mapping"],
    "--loss mse": ["--loss is mse", "package.module:function"],
    "--metrics top5": ["--metrics is top5"],
    "--metrics a:error,b:error": ["test_error is recorded already"],
    "--mixup 0": ["--mixup is 0.0", "above 0"],
    "--ema 1": ["--ema is 1.0", "(0, 1)"],
    "--label-smoothing 1": ["--label-smoothing is 1.0"],
    # Combinations.
    "--model.args '{width: 64}'": ["--model-args", "has no effect without --model package.module:function"],
    "--loss mine:number --label-smoothing 0.1": ["--label-smoothing 0.1 has no effect"],
    "--weight-decay-on matrices": ["has no effect without --weight-decay"],
    "--data-dir photos": ["--data-dir photos has no effect", "--dataset"],
    "--no-download": ["--no-download has no effect"],
    "--synthetic-samples 9": ["--synthetic-samples 9 has no effect", "--dataset synthetic"],
    "--model mlp --dropout 0.5": ["--dropout 0.5 has no effect"],
    "--sync-batchnorm": ["--sync-batchnorm has no effect"],
    "--decoupled-weight-decay": ["--decoupled-weight-decay has no effect", "--weight-decay"],
    "--commit-every 5": ["--commit-every 5 has no effect", "--elastic"],
    "--lr-decay step": ["--lr-decay-epochs"],
    "--batch-size 8 --global-batch-size 16": ["exclude each other"],
    "--op adasum --strategy sharded": ["--op adasum", "--strategy allreduce"],
    # Files and paths.
    "--config nowhere.yaml": ["--config", "nowhere.yaml"],
    "--config folder": ["--config", "folder"],
    "--config unknown.yaml": ["unknown.yaml, line 2: learning_rate is not an option", "lr"],
    "--config nested.yaml": ["nested.yaml, line 1: model has nested values"],
    "--config broken.yaml": ["broken.yaml, line 2", "not valid YAML"],
    "--config twice.yaml": ["twice.yaml, line 2: lr is given twice"],
    "--config range.yaml": ["range.yaml, line 1: --epochs is 0"],
    "--config none.yaml": ["none.yaml, line 1: lr has an empty value"],
    "--config quotes.yaml": ["quotes.yaml, line 2: output_dir has an empty value"],
    "--config no_betas.yaml": ["no_betas.yaml, line 1: --betas is null: it must be two numbers"],
    "--config list.yaml": ["list.yaml, line 1: amsgrad is [true]: it must be true or false"],
    "--config words.yaml": ["words.yaml, line 1: --dataset is ['digits']: it must be text"],
    "--config list_key.yaml": ["list_key.yaml, line 1: [epochs, lr] is not an option"],
    "--config tag.yaml": ["tag.yaml, line 2: data_dir has the tag !path"],
    "--config bell.yaml": ["bell.yaml", "not valid YAML", "#x0007"],
    "--config deep.yaml": ["deep.yaml", "not valid YAML"],
    "--config picture.yaml": ["picture.yaml", "UTF-8"],
    "--config empty.yaml": ["empty.yaml has no options"],
    "--config '*.yaml'": ["--config *.yaml: no such file"],
    "--config -": ["--config -: no such file"],
    "--output-dir '$UNSET_VARIABLE/run'": ["the variable UNSET_VARIABLE is not set"],
    "--output-dir unknown.yaml/run": ["cannot write to the run folder"],
    "--init-from nowhere": ["no checkpoint in nowhere"],
    "--config dotted.yaml": ["dotted.yaml, line 1: model.args is not an option", "model-args"],
    "--resume nowhere": ["no checkpoint in", "nowhere"],
    # Data and models.
    "--dataset cifar": ["data set 'cifar' is not known", "cifar10"],
    "--dataset cifar10 --no-download": ["cifar-10-python.tar.gz"],
    "--dataset mine.good": ["data set 'mine.good' is not known"],
    "--dataset absent:good": ["cannot import absent"],
    "--dataset mine:goood": ["goood"],
    "--dataset mine:number": ["not a function"],
    "--dataset mine:without_keyword --data-dir photos": [
        "--data-dir photos has no effect",
        "no parameter data_dir",
    ],
    "--dataset mine:with_size": ["needs the parameter size", '--data-args \'{"size"'],
    "--dataset mine:good --data-args '{size: 3}'": ["--data-args has size", "it has data_dir"],
    "--dataset mine:a_list": ["hvd_adam.data.ImageData"],
    "--dataset mine:channels_last": ["(64, 32, 32, 3)", "transpose(0, 3, 1, 2)"],
    "--dataset mine:floats": ["uint8", "float32"],
    "--dataset mine:many_labels": ["labels run from 0 to 2"],
    "--dataset mine:one_class": ["at least 2"],
    "--dataset mine:empty": ["empty"],
    "--dataset mine:good --batch-size 65": ["65", "64 training samples"],
    "--positive-class zebra": ["zebra"],
    "--model resnet19": ["resnet18"],
    "--model CNN": ["did you mean cnn?"],
    "--dataset DIGITS": ["did you mean digits?"],
    "--model mine:not_a_model": ["torch.nn.Module"],
    "--loss mine:number": ["not a function"],
    "--loss mine:absent": ["absent"],
    "--freeze layer.*": ["--freeze layer.* matches no parameter"],
    "--dataset mine:good --model mine:three_logits": ["(1, 3)", "(1, 2)"],
}

# Arguments of `python -m`: the exit code, and the words of the message.
OTHERS = {
    "hvd_adam trainn": (2, ["'trainn'", "train"]),
    "hvd_adam.evaluate": (2, ["--checkpoint is missing"]),
    "hvd_adam.evaluate --checkpoint nowhere": (2, ["no checkpoint in nowhere"]),
    "hvd_adam.evaluate --checkpoint nowhere --best": (2, ["--best is not an option"]),
    "hvd_adam.evaluate --ckpt run": (2, ["did you mean --checkpoint?"]),
    "hvd_adam.evaluate --checkpoint run --which last": (2, ["--which is last: it must be one of newest, best"]),
    "hvd_adam.train --help": (0, ["examples:"]),
    "hvd_adam.train --print-config": (0, ["epochs: 20"]),
}

FILES = {
    "mine.py": MINE,
    "unknown.yaml": "epochs: 1\nlearning_rate: 0.1\n",
    "nested.yaml": "model:\n  width: 64\n",
    "broken.yaml": "lr: [1\nepochs: 3\n",
    "twice.yaml": "lr: 1\nlr: 2\n",
    "range.yaml": "epochs: 0\n",
    "dotted.yaml": "model.args:\n  width: 64\n",
    "none.yaml": "lr:\n",
    "quotes.yaml": "epochs: 1\noutput_dir: ''\n",
    "no_betas.yaml": "betas: null\n",
    "list.yaml": "amsgrad: [true]\n",
    "words.yaml": "dataset: [digits]\n",
    "list_key.yaml": "[epochs, lr]: 1\n",
    "tag.yaml": "epochs: 1\ndata_dir: !path data\n",
    "bell.yaml": "epochs: \x07 1\n",
    "deep.yaml": "epochs: " + 2000 * "[" + 2000 * "]" + "\n",
    "picture.yaml": "\x89PNG",
    "empty.yaml": "",
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slips")
    (folder / "folder").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1" if name == "picture.yaml" else "utf-8")
    with ForkedCommands(folder) as running:
        yield running


@pytest.mark.parametrize("slip", TRAIN)
def test_a_slip_is_answered_in_one_line(slip, commands):
    done = commands.run("hvd_adam.train", *shlex.split(slip))
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("hvd_adam.train: error: ") and done.stderr.count("\n") == 1, done.stderr
    for words in TRAIN[slip]:
        assert words in done.stderr
    assert not (commands.folder / "runs").exists() and not (commands.folder / "~").exists()


@pytest.mark.parametrize("slip", OTHERS)
def test_a_slip_in_another_command_is_answered(slip, commands):
    code, words = OTHERS[slip]
    done = commands.run(*shlex.split(slip))
    output = done.stdout + done.stderr
    assert done.returncode == code and "Traceback" not in output, output
    assert all(word in output for word in words), output


def test_the_table_has_sixty_slips():
    assert len(TRAIN) + len(OTHERS) >= 60
