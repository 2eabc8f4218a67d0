"""`hvd_adam.train` with a model, data, a loss and metrics of the user's own, outside the package.

Hazards: a resumed run that differs in a bit (mixup, moving average, groups, frozen statistics, transforms); a
checkpoint that cannot be evaluated; averages that depend on how samples are divided; a mistake in the user's code
that is answered by a traceback, by some ranks only, or by a hang.
"""

import json
import shlex

import pytest
import torch
from helpers.forked_commands import ForkedCommands
from helpers.own_code import write
from helpers.training_runs import checkpoint, events, one_line, succeeded, train

from hvd_adam.checkpoint import storage

OWN = ["--dataset", "mine:data", "--data.args", '{"count": 60}', "--model", "mine:build"]
OWN += ["--model.args", '{"width": 6}', "--loss", "mine:loss", "--metrics", "mine:error,mine:close"]
OPTIONS = "--mixup 0.4 --ema 0.8 --freeze encoder.* --transforms mine:halved --weight-decay 0.1 --accumulate 2"
OPTIONS += " --weight-decay-on matrices --strategy sharded --batch-size 4 --epochs 4 --checkpoint-every 2"
OPTIONS += " --log-every 1 --lr-scaling none --keep 9"  # 60 samples: 3 updates per epoch, 12 in total


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write(folder)
    return folder


def start(place, name, *argv, stop="", controller="gloo"):
    environ = {"PYTHONPATH": str(place), **({"STOP": stop} if stop else {})}
    return train(*OWN, *argv, ranks=2, controller=controller, folder=place / name, env=environ)


@pytest.fixture(scope="module")
def runs(place):
    """Two folders of the same run: uninterrupted, and killed in the middle of an epoch and resumed."""
    whole = succeeded(start(place, "whole", *OPTIONS.split()))
    killed = start(place, "killed", *OPTIONS.split(), stop="SIGKILL:1:15")  # in update 8, the second of its epoch
    assert killed.returncode != 0
    resumed = succeeded(start(place, "killed", *OPTIONS.split()))
    assert "resuming after 6 updates" in resumed.stdout
    return place / "whole", place / "killed", whole


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]


def test_a_killed_run_of_own_code_ends_bit_for_bit_as_an_uninterrupted_one(runs):
    one, other = checkpoint(runs[0]), checkpoint(runs[1])
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(state[name], other["optimizer"]["state"][number][name]) for name in state)
    assert one["progress"] == other["progress"] and one["progress"]["step"] == 12
    for kind in ("step", "eval"):
        assert without_times(events(runs[0], kind)) == without_times(events(runs[1], kind))


def test_own_metrics_are_recorded_and_printed_and_the_lowest_loss_is_the_best(runs):
    assert events(runs[0])[0]["loss_function"] == "mine:loss"
    evaluations = events(runs[0], "eval")
    assert len(evaluations) == 4
    assert all(line["test_accuracy"] is None and line["images"] == 33 for line in evaluations)
    assert all(0 <= line["test_close"] <= 1 < line["test_error"] for line in evaluations)
    assert events(runs[0])[-1]["test_error"] == evaluations[-1]["test_error"]
    assert f"test error {evaluations[-1]['test_error']:.4f}" in runs[2].stdout
    assert "the best checkpoint is the one with the lowest test loss" in runs[2].stdout
    best = min(evaluations, key=lambda line: line["test_loss"])
    assert (runs[0] / "checkpoints" / "best").read_text().strip() == f"step-{best['step']:08d}"


def test_the_checkpoint_has_what_the_options_ask_for(runs):
    state = checkpoint(runs[0])
    model, average = state["model"], state["ema"]
    assert not torch.equal(model["head.1.weight"], average["head.1.weight"])
    # A frozen normalization keeps its statistics; one that is trained does not.
    assert not model["encoder.1.running_mean"].any() and model["norm.running_mean"].any()
    assert torch.equal(model["encoder.0.weight"], average["encoder.0.weight"])
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert decays == [0.1, 0.0]
    assert state["config"]["model_args"] == {"width": 6} and state["config"]["data_args"] == {"count": 60}


@pytest.fixture(scope="module")
def commands(place):
    with ForkedCommands(place) as running:
        yield running


def test_evaluate_rebuilds_own_code_and_finds_the_scores_of_the_training(runs, place, commands):
    last, argv = events(runs[0], "eval")[-1], ["--checkpoint", str(runs[0])]
    environ = {"PYTHONPATH": str(place)}
    on_two = train(*argv, ranks=2, controller="gloo", module="hvd_adam.evaluate", env=environ)
    for done in (on_two, commands.run("hvd_adam.evaluate", *argv)):
        assert f"test loss {last['test_loss']:.4f}\n" in succeeded(done).stdout
        assert f"test error {last['test_error']:.4f}\n" in done.stdout
        assert "test samples 33 of sums" in done.stdout and "accuracy" not in done.stdout
    of_weights = succeeded(commands.run("hvd_adam.evaluate", *argv, "--weights", "model"))
    assert f"test loss {last['test_loss']:.4f}\n" not in of_weights.stdout
    best = succeeded(commands.run("hvd_adam.evaluate", *argv, "--which", "best", "--json"))
    lowest = min(line["test_loss"] for line in events(runs[0], "eval"))
    assert json.loads(best.stdout)["test_loss"] == pytest.approx(lowest)  # on two ranks the sum has another order


def test_another_run_starts_with_the_weights_that_fit(runs, commands):
    argv = [*OWN, "--max-steps", "1", "--lr", "0", "--output-dir", "warm", "--init-from", str(runs[0])]
    argv += ["--workers", "0"]  # worker processes import PyTorch, which takes seconds
    argv[argv.index("--data.args") + 1] = '{"count": 60, "features": 7}'
    done = succeeded(commands.run("hvd_adam.train", *argv))
    assert "encoder.0.weight (6, 5) -> (6, 7) is new" in done.stdout
    state = checkpoint(commands.folder / "warm")
    assert state["progress"]["step"] == 1
    averages = checkpoint(runs[0])["ema"]
    assert torch.equal(state["model"]["head.1.weight"], averages["head.1.weight"])
    # The same command resumes the run, although the other run has gone, and does not start again.
    argv[argv.index(str(runs[0]))] = "gone"
    argv[argv.index("--max-steps") + 1] = "2"
    done = succeeded(commands.run("hvd_adam.train", *argv))
    assert "resuming after 1 updates" in done.stdout and "is new" not in done.stdout


def test_an_own_loss_on_classes_keeps_the_accuracy(commands):
    (commands.folder / "hinge.py").write_text(
        "import torch\n"
        "def loss(outputs, targets):\n"
        "    return torch.nn.functional.multi_margin_loss(outputs, targets)\n"
        "def flipped(image):\n"
        "    return image.flip(2) if torch.rand(()) < 0.5 else image\n"
    )
    argv = ["--loss", "hinge:loss", "--transforms", "hinge:flipped", "--max-steps", "30"]
    done = succeeded(commands.run("hvd_adam.train", *argv, "--output-dir", "hinge"))
    assert "lowest test loss" not in done.stdout
    assert events(commands.folder / "hinge", "eval")[-1]["test_accuracy"] > 0.3


UNSENDABLE = """
import torch
from hvd_adam.data import Datasets, UnreadableSample

class Samples(torch.utils.data.Dataset):
    def __init__(self, unreadable=()):
        self.scaled, self.unreadable = (lambda value: value / 2), unreadable

    def __len__(self):
        return 32

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableSample(f"file {index}", "damaged")
        return self.scaled(torch.full((1, 4, 4), index / 32)), index % 2

def whole():
    return Datasets(Samples(), Samples(), ("a", "b"))

def damaged():
    return Datasets(Samples({0}), Samples(), ("a", "b"))
"""
SMALL = ["--model", "mlp", "--batch-size", "8", "--max-steps", "4", "--workers", "0"]


def test_evaluate_reads_data_that_cannot_be_sent_to_workers_as_the_training_did(commands):
    (commands.folder / "unsendable.py").write_text(UNSENDABLE)
    succeeded(commands.run("hvd_adam.train", "--dataset", "unsendable:whole", *SMALL, "--output-dir", "unsent"))
    done = succeeded(commands.run("hvd_adam.evaluate", "--checkpoint", "unsent", "--json"))
    last = events(commands.folder / "unsent", "eval")[-1]
    assert json.loads(done.stdout)["test_loss"] == pytest.approx(last["test_loss"])


SIZES = """
import torch

class Model(torch.nn.Linear):
    def forward(self, images):
        if not self.training:
            print("evaluates", len(images))
        return super().forward(images.flatten(1))

def build(in_channels, num_classes, image_size):
    return Model(in_channels * image_size[0] * image_size[1], num_classes)
"""


def test_an_evaluation_has_batches_of_the_size_that_is_asked_for(commands):
    (commands.folder / "sizes.py").write_text(SIZES)
    argv = "--dataset digits --model sizes:build --max-steps 2 --eval-batch-size 100 --output-dir sizes".split()
    done = succeeded(commands.run("hvd_adam.train", *argv))
    sizes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("evaluates")]
    assert sizes[-4:] == [100, 100, 100, 55]  # after what looks at the outputs of the model


def test_a_first_sample_that_cannot_be_read_is_one_of_those_that_are_tolerated(commands):
    (commands.folder / "unsendable.py").write_text(UNSENDABLE)
    argv = ["--dataset", "unsendable:damaged", *SMALL, "--output-dir", "tolerated", "--max-corrupt"]
    assert "cannot read file 0 (damaged): repair" in one_line(commands.run("hvd_adam.train", *argv, "0"))
    tolerated = succeeded(commands.run("hvd_adam.train", *argv, "1"))
    assert "cannot read file 0 (damaged): the file is skipped" in tolerated.stderr


WRONG = """
from mine import *

class Parts:
    name = "parts"

    def __init__(self, **parts):
        rows = TensorDataset(torch.zeros(8, 3), torch.zeros(8))
        vars(self).update({"train": rows, "test": rows, "classes": ()} | parts)
        for name in [name for name, part in vars(self).items() if part is None]:
            delattr(self, name)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])

class Single:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(3)

class Texts(Single):
    def __getitem__(self, index):
        return "text", 0

class Halves(Single):
    def __len__(self):
        return 3.5

class Fails(Single):
    def __getitem__(self, index):
        return self.missing

rows = TensorDataset(torch.zeros(8, 3), torch.zeros(8))
without_train = lambda: Parts(train=None)
without_test = lambda: Parts(test=None)
without_classes = lambda: Parts(classes=None)
nameless = lambda: Parts(name=3)
one_class = lambda: Parts(classes=("a",))
stream = lambda: Parts(train=Stream())
numbers = lambda: Parts(test=3)
empty = lambda: Parts(train=TensorDataset(torch.zeros(0, 3), torch.zeros(0)))
single = lambda: Parts(train=Single())
texts = lambda: Parts(train=Texts())
fails = lambda: Parts(train=Fails())
unsized = lambda: Datasets(Stream(), rows, (), name="own")
absent = lambda: Datasets(rows, None, (), name="own")
halves = lambda: Datasets(Halves(), rows, (), name="own")
halves_of_parts = lambda: Parts(train=Halves())
shapes = lambda: Parts(test=TensorDataset(torch.zeros(8, 4), torch.zeros(8)))
parts = lambda: Parts()

a_sum = lambda outputs, targets: outputs.sum().item()
per_sample = lambda outputs, targets: (outputs - targets) ** 2
detached = lambda outputs, targets: (outputs.detach() - targets).mean()
raises = lambda outputs, targets: outputs.no_such_method()
mean = lambda outputs, targets: (outputs - targets).abs().mean()
classes_only = lambda outputs, targets: nn.functional.nll_loss(outputs, targets)
wide = lambda sample_shape: nn.Linear(sample_shape[0], 3)
narrow = lambda sample_shape: nn.Linear(2, 1)
needs_images = lambda in_channels: nn.Linear(in_channels, 1)
cropped = lambda image: image[:, 1:]
floats = lambda image: image.float()
broken = lambda image: image.no_such_method()
"""

# Arguments after those of OWN: words that the message must contain.
WRONG_OWN = {
    "--dataset wrong:without_train": ["without train"],
    "--dataset wrong:without_test": ["without test"],
    "--dataset wrong:without_classes": ["without classes"],
    "--dataset wrong:nameless": ["name is 3"],
    "--dataset wrong:one_class": ["classes is ('a',)"],
    "--dataset wrong:stream": ["train is a Stream", "map-style"],
    "--dataset wrong:numbers": ["test is a int without __len__"],
    "--dataset wrong:empty": ["train is empty"],
    "--dataset wrong:single": ["train[0] is a Tensor", "(input, target)"],
    "--dataset wrong:texts": ["a str as its input"],
    "--dataset wrong:fails": ["train[0] fails: AttributeError", "wrong.py, line"],
    "--dataset wrong:unsized": ["data set own: train is a Stream without __len__", "a length"],
    "--dataset wrong:absent": ["data set own: test is a NoneType without __len__", "map-style"],
    "--dataset wrong:halves": [
        "data set own: train is a Halves whose __len__ fails",
        "'float'",
        "number of samples",
    ],
    "--dataset wrong:halves_of_parts": ["'wrong:halves_of_parts': train is a Halves whose __len__ fails"],
    "--dataset wrong:shapes": ["(3,)", "(4,)", "the same"],
    "--dataset wrong:parts --positive-class a": ["--positive-class", "ImageData"],
    "--dataset wrong:parts --data-dir photos": ["--data-dir photos has no effect", "no parameter data_dir"],
    "--data.args {count:60": ["--data-args is {count:60: it must be a mapping"],
    "--data.args {cuont:60}": ["--data-args is {cuont:60}: it must be a mapping"],
    "--data.args '{cuont: 60}'": ["--data-args has cuont", "did you mean count?"],
    "--model.args '{width: 6, depth: 2}'": ["--model-args has depth", "no parameter depth"],
    "--model.args '{}'": ["'mine:build' needs the parameter width", "--model-args"],
    "--model wrong:needs_images --model.args '{}'": ["needs the parameter in_channels"],
    "--model wrong:narrow --model.args '{}'": ["model 'wrong:narrow'", "(2, 5)", "fails"],
    "--model wrong:wide --model.args '{}'": ["--loss mine:loss", "(2, 3)", "(2,)", "fails"],
    "--loss wrong:a_sum": ["--loss wrong:a_sum", "is a float", "scalar tensor"],
    "--loss wrong:per_sample": ["(2,)", "scalar tensor"],
    "--loss wrong:detached": ["not differentiable"],
    "--loss wrong:raises": ["no_such_method", "wrong.py, line"],
    "--loss wrong:absent": ["absent"],
    "--loss wrong:classes_only": ["--loss wrong:classes_only", "fails"],
    "--metrics wrong:raises": ["--metrics: raises fails", "no_such_method"],
    "--metrics wrong:mean": ["--metrics: mean", "(2,)", "()"],
    "--freeze nothing.*": ["--freeze nothing.*", "encoder.0.weight"],
    "--freeze *": ["--freeze *", "leave some"],
    "--init-from nowhere": ["no checkpoint in nowhere"],
    "--init-from other": ["no weight of it fits"],
}
WRONG_IMAGES = {
    "--dataset wrong:parts --batch-size 4": ["'cnn'", "no classes"],
    "--transforms wrong:cropped": ["uint8 image of shape (1, 8, 8)", "(1, 7, 8)"],
    "--transforms wrong:floats": ["torch.float32"],
    "--transforms wrong:broken": ["--transforms", "fails", "no_such_method", "wrong.py, line"],
    "--loss wrong:classes_only --mixup 1": ["targets of shape (2, 10), torch.float32", "fails"],
    "--metrics mine:error": ["--metrics: error"],
}


WITH_WORKERS = (
    "--dataset wrong:fails",
    "--loss wrong:raises",
    "--metrics wrong:mean",
    "--transforms wrong:broken",
)


@pytest.fixture(scope="module")
def wrong(commands):
    (commands.folder / "wrong.py").write_text(WRONG)
    storage.save(commands.folder / "other" / "checkpoints", 1, {"model": {"layer": torch.zeros(3)}})
    return commands


@pytest.mark.parametrize("slip", [*WRONG_OWN, *WRONG_IMAGES])
def test_a_mistake_in_own_code_is_answered_in_one_line(slip, wrong):
    own = OWN if slip in WRONG_OWN else []
    if "--dataset" in slip:
        own = [part for part in own if part not in ("--data.args", '{"count": 60}')]
    # Worker processes import PyTorch, which takes seconds: only where they are what fails or must be ended.
    workers = [] if slip in (*WITH_WORKERS, *WRONG_IMAGES) else ["--workers", "0"]
    done = wrong.run("hvd_adam.train", *own, *shlex.split(slip), *workers, "--output-dir", "refused")
    message = one_line(done)
    assert all(word in message for word in (WRONG_OWN | WRONG_IMAGES)[slip]), message
    assert not (wrong.folder / "refused").exists()


def test_every_rank_ends_after_a_mistake_that_only_one_makes(place):
    (place / "half.py").write_text(
        "import horovod.torch as hvd\n"
        "from mine import error\n"
        "def uneven(outputs, targets):\n"
        "    values = error(outputs, targets)\n"
        "    return values.mean() if hvd.rank() and len(values) > 2 else values\n"
    )
    argv = ["--metrics", "half:uneven", "--batch-size", "4", "--max-steps", "1", "--workers", "0"]
    done = start(place, "half", *argv, controller="mpi")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: rank 1 on" in done.stderr and "--metrics: uneven must return" in done.stderr


def test_a_label_outside_the_classes_is_one_line(commands):
    (commands.folder / "labels.py").write_text(
        "import torch\n"
        "from hvd_adam.data import Datasets\n"
        "def data():\n"
        "    samples = [(torch.rand(1, 8, 8), 3 if n == 31 else n % 3) for n in range(40)]\n"
        "    return Datasets(samples, samples[:30], ('a', 'b', 'c'), name='own')\n"
    )
    argv = ["--dataset", "labels:data", "--model", "mlp", "--batch-size", "40", "--epochs", "1", "--workers", "0"]
    message = "data set own: training sample 31 has label 3, but with 3 classes labels must lie in 0 to 2"
    assert message in one_line(commands.run("hvd_adam.train", *argv, "--output-dir", "labels"))
