"""`load_model`, `hvd_adam.predict` and `evaluate --predictions`.

Hazards: an image that is resized, cropped or converted in another way than in the training; probabilities that
depend on the other files, on the number of ranks or of threads; a sample that could not be read shifts those after
it; a file name that breaks a line; a model that needs its data set, or Horovod, to be loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.forked_commands import ForkedCommands
from helpers.on_ranks import launch
from helpers.trained_models import SUMS, lines, train, train_on_digits, train_on_photos, write_digits
from helpers.training_runs import ROOT, one_line, succeeded
from PIL import Image

from hvd_adam import load_model
from hvd_adam.checkpoint import storage
from hvd_adam.data import Datasets, load
from hvd_adam.data.image_folder.files import centered_transform
from hvd_adam.errors import UserError
from hvd_adam.inference.preprocessing import fit

PREDICT, EVALUATE = "hvd_adam.predict", "hvd_adam.evaluate"


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with ForkedCommands(tmp_path_factory.mktemp("predict")) as commands:
        yield commands


@pytest.fixture(scope="module")
def folder(commands):
    train_on_digits(commands)
    train_on_photos(commands)
    train(commands, "sums", *SUMS)
    write_digits(commands.folder / "png")
    return commands.folder


@pytest.fixture(scope="module")
def whole(commands, folder):
    """What is predicted for all digits, by file."""
    done = succeeded(commands.run(PREDICT, "--checkpoint", "digits", "--json", "--top", 99, "png"))
    return {line["file"]: line["predictions"] for line in lines(done.stdout)}


def by_class(predictions):
    return {entry["class"]: entry["probability"] for entry in predictions}


def agree(evaluated, predicted, classes):
    """Checks the lines of an evaluation against predictions, to the last bit."""
    assert len(evaluated) == len(predicted)
    for line, predictions in zip(evaluated, predicted, strict=True):
        assert by_class(predictions) == dict(zip(classes, line["probabilities"], strict=True))
        assert predictions[0]["class"] == line["predicted"]


def test_predictions_of_files_are_those_of_an_evaluation_on_two_ranks_to_the_last_bit(folder, whole):
    options = ["--checkpoint", "digits", "--predictions", "digits.jsonl", "--batch-size", "50"]
    succeeded(launch(["-m", EVALUATE, *options], 2, "gloo", cwd=folder))
    evaluated = lines((folder / "digits.jsonl").read_text())
    labels = load("digits").test_labels.tolist()
    assert [(line["index"], line["target"]) for line in evaluated] == list(enumerate(map(str, labels)))
    agree(evaluated, list(whole.values()), list("0123456789"))


ONE_SAMPLE = """
import torch
from hvd_adam.data import Datasets

def data():
    samples = [(torch.rand(1, 8, 8), n % 2) for n in range(8)]
    return Datasets(samples, samples[:1], ("a", "b"))
"""


def test_a_rank_without_samples_adds_no_prediction_of_a_model_in_double_precision(commands, folder):
    (folder / "single.py").write_text(ONE_SAMPLE)
    argv = ["--dataset", "single:data", "--model", "mlp", "--precision", "fp64", "--batch-size", 4, "--workers", 0]
    run = train(commands, "single", *argv)
    options = ["--checkpoint", str(run), "--predictions", "single.jsonl"]
    succeeded(launch(["-m", EVALUATE, *options], 2, "gloo", cwd=folder))
    (line,) = lines((folder / "single.jsonl").read_text())
    assert line["index"] == 0 and line["target"] == "a"
    assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-15)  # two roundings of float64


def test_predictions_do_not_depend_on_other_files_nor_on_threads(commands, folder, whole):
    some = [f"png/{number:03d}.png" for number in (300, 7, 8, 33)]
    for files, threads in ((some, "2"), (some[:1], "1")):
        options = ["--checkpoint", "digits", "--json", "--top", 10]
        done = succeeded(commands.run(PREDICT, *options, *files, OMP_NUM_THREADS=threads))
        assert lines(done.stdout) == [{"file": file, "predictions": whole[file]} for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("cache", [[], ["--cache", "cache"]], ids=["files", "cache"])
def test_photos_are_prepared_as_in_the_evaluation_and_damaged_ones_are_left_out(commands, folder, cache):
    run = train_on_photos(commands, "cached", *cache) if cache else folder / "photos"
    file = f"{run.name}.jsonl"
    succeeded(commands.run(EVALUATE, "--checkpoint", run, "--predictions", file, "--batch-size", 3))
    evaluated = lines((folder / file).read_text())
    assert [line["index"] for line in evaluated] == [index for index in range(20) if index != 6]
    assert all(line["path"].split("/")[-2] == line["target"] for line in evaluated)
    paths = [line["path"] for line in evaluated]
    done = succeeded(commands.run(PREDICT, "--checkpoint", run, "--json", "--top", 4, *paths))
    agree(evaluated, [line["predictions"] for line in lines(done.stdout)], ["cat", "dog", "eel", "fox"])


def test_an_evaluation_may_skip_more_unreadable_files_than_the_training(commands, folder):
    command = [EVALUATE, "--checkpoint", "photos", "--json", "--max-corrupt"]
    assert "or tolerate more with --max-corrupt 1 or above" in one_line(commands.run(*command, 0))
    assert json.loads(succeeded(commands.run(*command, 1)).stdout)["images"] == 19
    assert "--max-corrupt is -1: it must be 0 or above" in one_line(commands.run(*command, -1))
    line = one_line(commands.run(EVALUATE, "--checkpoint", "digits", "--max-corrupt", 1))
    assert "--max-corrupt 1 has no effect: the images of digits are in memory" in line


@pytest.mark.parametrize("size", [(40, 50), (91, 50), (37, 37), (20, 33), (256, 301), (9, 400)])
def test_an_image_is_fitted_as_the_test_images_of_a_folder(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for side, crop in ((37, 32), (36, 31), (50, 50)):
        assert torch.equal(fit(image, (side, side), (crop, crop)), centered_transform(side, crop)(image))
    assert fit(image, (20, 30), (18, 30)).shape == (3, 18, 30)
    assert torch.equal(fit(image, size, size), torch.from_numpy(pixels).permute(2, 0, 1))


def test_every_file_is_one_line_whatever_its_name(commands, folder):
    odd = ["-odd.png", "null", "[1] a: b #$x.png", "line\nbreak.png", os.fsdecode(b"byte\xff.png"), "~.png"]
    os.makedirs(folder / "odd" / "below")
    large = Image.open(folder / "png" / "005.png").resize((80, 80), 0).convert("RGBA")
    for name in odd:
        large.save(folder / "odd" / name, "png")
    (folder / "odd" / "below" / "photo.JPG").write_bytes((folder / "images/val/cat/000.jpg").read_bytes())
    (folder / "odd" / "note.txt").write_text("not an image")
    done = succeeded(commands.run(PREDICT, "--checkpoint", folder / "digits", "--", *odd, cwd=folder / "odd"))
    table = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in table] == [name.replace("\n", "\\n").replace("\udcff", "\\udcff") for name in odd]
    assert {len(row) for row in table} == {3} and all(float(row[2]) > 0.1 for row in table)
    done = succeeded(commands.run(PREDICT, "--checkpoint", "digits", "--json", "odd"))
    named = [line["file"].partition("/")[2] for line in lines(done.stdout)]
    assert named == sorted([*(name for name in odd if name != "null"), "below/photo.JPG"])


def test_a_file_on_stdin_keeps_its_place_and_top_lists_the_most_probable(folder, whole):
    command = [sys.executable, "-m", PREDICT, "--checkpoint", "digits", "png/001.png", "-", "--top", "2"]
    with (folder / "png" / "004.png").open("rb") as image:
        done = subprocess.run(command, cwd=folder, stdin=image, capture_output=True, text=True)
    rows = [line.split("\t") for line in succeeded(done).stdout.splitlines()]
    for row, name, file in zip(rows, ("png/001.png", "-"), ("png/001.png", "png/004.png"), strict=True):
        best = whole[file][:2]
        assert row == [name, *(text for p in best for text in (p["class"], f"{p['probability']:.4f}"))]


BAD = [
    (["digits", "-", "png/000.png", "-"], "- is given twice: stdin has one image"),
    (["digits", ""], "cannot read '' (No such file or directory)"),
    (["digits", "missing.png"], "cannot read missing.png (No such file or directory)"),
    (["digits", "png/000.png", "nets.py"], "cannot read nets.py (not an image)"),
    (["photos", "images/val/dog/001.jpg"], "images/val/dog/001.jpg (image file is truncated"),
    (["digits", "digits/tensorboard"], "folder digits/tensorboard has no images"),
    (["nowhere", "png/000.png"], "no checkpoint in nowhere"),
    (["digits", "--top", "0", "png/000.png"], "--top is 0: it must be at least 1"),
    (["digits"], "no file given"),
    (["digits/checkpoints/latest", "--which", "best", "png"], "--which best has no effect"),
    (["photos", "--weights", "ema", "png"], "--weights ema: checkpoint"),
    (["sums", "png/000.png"], "is not of a classifier of images"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_line_and_nothing_is_printed(commands, folder, argv, message):
    (folder / "digits" / "tensorboard").mkdir(exist_ok=True)
    done = commands.run(PREDICT, "--checkpoint", *argv)
    assert message in one_line(done) and not done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_by_the_name_of_the_option(commands, folder):
    line = one_line(commands.run(PREDICT, "--checkpoint", "digits", "--device", "cuda", "png/000.png"))
    assert "--device is cuda, but there is no GPU" in line


def test_a_launcher_with_several_ranks_is_refused(commands, folder):
    done = commands.run(PREDICT, "--checkpoint", "digits", "png", HOROVOD_RANK="0", HOROVOD_SIZE="2")
    assert "started by horovodrun on 2 ranks" in one_line(done)


@pytest.mark.slow
def test_predictions_of_an_evaluation_do_not_replace_a_file_and_need_classes(commands, folder):
    for run, file, message in (
        ("digits", "nets.py", "--predictions nets.py exists"),
        ("digits", "nowhere/p.jsonl", "there is no folder nowhere"),
        ("sums", "sums.jsonl", "the data set has no classes"),
    ):
        done = commands.run(EVALUATE, "--checkpoint", run, "--predictions", file)
        assert message in one_line(done) and not done.stdout
    assert not (folder / "sums.jsonl").exists()


def test_an_evaluation_replaces_no_file_of_a_run_and_writes_two_files_to_two_paths(commands, folder):
    state = folder / "digits/checkpoints/step-00000003/state.pt"
    before = state.read_bytes()
    for argv, message in (
        (["--predictions", state, "--force"], f"--predictions {state} is a file of the checkpoint itself"),
        (["--predictions", "digits/checkpoints/best", "--force"], "is a file of the run's checkpoints folder"),
        (["--predictions", "digits/config.yaml", "--force"], "digits/config.yaml is a file of the run itself"),
        (["--plot", "a.png", "--predictions", "digits/../a.png"], "a.png is also the file of --plot"),
    ):
        done = commands.run(EVALUATE, "--checkpoint", "digits", *argv)
        assert message in one_line(done) and not done.stdout
    assert state.read_bytes() == before and not (folder / "a.png").exists()


def test_a_loaded_model_has_all_that_inference_needs(folder, whole):
    model = load_model(folder / "digits")
    data = load("digits")
    assert not model.training and model.classes == data.classes and model.shape == (1, 8, 8)
    assert model.precision == "fp32" and model.resize == (8, 8) and len(model.mean) == len(model.std) == 1
    images = torch.from_numpy(data.test_images)
    probabilities = model.predict(images[:100])
    assert probabilities.shape == (100, 10)
    assert torch.allclose(model(images[:100]).softmax(1), probabilities, atol=1e-6)
    for index, predictions in enumerate(list(whole.values())[:100]):
        exact = [np.float32(by_class(predictions)[name]) for name in model.classes]
        assert exact == list(probabilities[index].numpy())
    image = Image.open(folder / "png" / "007.png")
    assert torch.equal(model.predict([image, images[3]]), probabilities[[7, 3]])
    assert torch.equal(model.predict(image), probabilities[[7]])
    assert model.predict([]).shape == (0, 10)


def test_the_moving_average_is_loaded_unless_the_weights_are_asked_for(folder):
    run = folder / "digits"
    state = storage.load(run)
    for weights, expected in (("auto", "ema"), ("ema", "ema"), ("model", "model")):
        loaded = load_model(run, weights=weights).model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state[expected].items())
    assert any(not torch.equal(state["ema"][name], value) for name, value in state["model"].items())


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 9, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)],
)
def test_tensors_of_another_dtype_or_shape_are_refused(folder, images):
    with pytest.raises(UserError, match=r"must be torch.uint8 of shape \(n, 1, 8, 8\)") as error:
        load_model(folder / "digits").predict(images)
    assert str(error.value).endswith("; for one image pass image[None]") == (images.ndim == 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("digit.png", "'digit.png', which is not an image: open files with PIL.Image.open"),
        ([Path("a.png")], "open files with PIL.Image.open"),
        (np.zeros((2, 1, 8, 8), np.uint8), "make uint8 tensors of shape (n, 1, 8, 8) with torch.from_numpy"),
        ([np.zeros((8, 8), np.uint8)], "with torch.from_numpy"),
        (None, "a value of type NoneType: pass a Pillow image, a list of them, or a uint8 tensor"),
        ([torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(8, 8)], "float32 of shape (8, 8): it must be"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused_with_the_remedy(folder, images, message):
    with pytest.raises(UserError) as error:
        load_model(folder / "digits").predict(images)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_other_data_is_returned_itself(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    model = load_model(folder / "sums")
    assert type(model).__name__ == "Net" and not model.training
    saved = storage.load(folder / "sums")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_loading_a_model_needs_no_horovod_no_data_and_no_random_numbers(folder):
    code = """
import sys
for name in ("horovod", "sklearn", "torchvision", "jsonargparse", "PIL"):
    sys.modules[name] = None
import torch, hvd_adam
state = torch.get_rng_state()
model = hvd_adam.load_model("digits")
assert torch.equal(state, torch.get_rng_state())
print(model.predict(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert succeeded(done).stdout == "torch.Size([3, 10])\n"


def test_checkpoints_of_earlier_versions_work_where_the_data_set_is_known(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    for name in ("digits", "photos", "sums"):
        state = storage.load(folder / name)
        del state["data"]["shape"], state["data"]["resize"]
        storage.save(tmp_path / name, 3, state)
    for name, shape, resize in (("digits", (1, 8, 8), (8, 8)), ("photos", (3, 32, 32), (37, 37))):
        model = load_model(tmp_path / name)
        assert (model.shape, model.resize) == (shape, resize)
    with pytest.raises(UserError, match="does not hold the shape of the inputs"):
        load_model(tmp_path / "sums")


@pytest.mark.slow
def test_a_checkpoint_that_lacks_what_a_command_needs_is_one_line(commands, folder):
    state = storage.load(folder / "digits")
    data = state["data"]
    for changed, message in (
        ({"state_dict": state["model"]}, "was not written by hvd_adam.train: no 'config'"),
        ({**state, "config": ["digits"]}, "no 'config'"),
        ({**state, "data": {**data, "classes": None}}, "no 'data.classes'"),
        ({**state, "data": {"classes": data["classes"]}}, "no 'data.mean'"),
    ):
        storage.save(folder / "changed", 3, changed)
        for argv in ([EVALUATE], [PREDICT, "png/000.png"]):
            assert message in one_line(commands.run(*argv, "--checkpoint", folder / "changed"))
    storage.save(folder / "changed", 3, {**state, "data": {**data, "mean": [], "std": []}})
    line = one_line(commands.run(EVALUATE, "--checkpoint", folder / "changed"))
    assert "is of a training without normalization, which digits has" in line


def test_outputs_that_are_not_finite_are_no_prediction(commands, folder):
    state = storage.load(folder / "digits")
    next(iter(state["ema"].values())).fill_(float("nan"))
    storage.save(folder / "nan", 3, state)
    line = one_line(commands.run(PREDICT, "--checkpoint", "nan", "--json", "png/000.png"))
    assert "its outputs for png/000.png are not finite" in line
    argv = ["--checkpoint", "nan", "--predictions", "nan.jsonl", "--json"]
    scores = json.loads(succeeded(commands.run(EVALUATE, *argv)).stdout, parse_constant=pytest.fail)
    assert scores["test_loss"] is None and scores["unpredicted"] == scores["images"]
    assert lines((folder / "nan.jsonl").read_text())[0] == {
        "index": 0,
        "target": str(load("digits").test_labels[0]),
        "predicted": None,
        "probabilities": None,
    }


OTHER_STATISTICS = """
import torch
from hvd_adam.data import Datasets, load

class Images(torch.utils.data.Dataset):
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __len__(self): return len(self.labels)
    def __getitem__(self, index): return torch.from_numpy(self.images[index].copy()), int(self.labels[index])

def data(mean=None):
    digits = load("digits")
    test = Images(digits.test_images, digits.test_labels)
    return Datasets(test, test, digits.classes, mean=mean and (mean,), std=mean and (mean,))

def brighter(): return data(0.9)

def unknown(): return data()

class Floats(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image / 255, label

def floats():
    digits = data()
    test = Floats(digits.test.images, digits.test.labels)
    return Datasets(test, test, digits.classes, name="floats")
"""


def test_samples_that_the_normalization_of_the_training_leaves_out_are_refused(commands, folder):
    (folder / "scaled.py").write_text(OTHER_STATISTICS)
    done = commands.run(EVALUATE, "--checkpoint", "digits", "--dataset", "scaled:floats")
    assert "scaled:floats: test[0] has an input of dtype float32, but checkpoint digits" in one_line(done)
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["scaled:brighter", "scaled:unknown"])
def test_images_are_normalized_as_in_the_training_whatever_the_data_set_says(commands, folder, dataset):
    (folder / "scaled.py").write_text(OTHER_STATISTICS)
    own, other = (
        json.loads(succeeded(commands.run(EVALUATE, "--checkpoint", "digits", "--json", *argv)).stdout)
        for argv in ([], ["--dataset", dataset])
    )
    assert own == other


@pytest.mark.slow
def test_a_model_that_takes_no_single_sample_is_one_line(commands, folder):
    argv = ["--model", "nets:paired", "--dataset", "scaled:brighter", "--workers", 0, "--loss", "nets:loss"]
    (folder / "scaled.py").write_text(OTHER_STATISTICS)
    run = train(commands, "paired", *argv)
    line = one_line(commands.run(EVALUATE, "--checkpoint", run, "--predictions", "paired.jsonl"))
    assert "fails with inputs of shape (1, 1, 8, 8): ValueError: one image (nets.py" in line
    assert not (folder / "paired.jsonl").exists()


def test_how_images_of_an_own_data_set_are_resized_can_be_declared(folder, tmp_path):
    state = storage.load(folder / "photos")
    state["data"]["resize"] = None  # as of Datasets without it
    storage.save(tmp_path, 3, state)
    model = load_model(tmp_path)
    image = Image.open(folder / "images" / "val" / "cat" / "000.jpg")
    with pytest.raises(UserError, match=r"resize=…"):
        model.predict(image)
    assert model.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 4)
    with pytest.raises(UserError, match=r"resize is 256: it must be \(height, width\)"):
        Datasets([0], [0], (), resize=256)


@pytest.mark.parametrize(
    ("options", "message"), [({"which": "last"}, "which is 'last'"), ({"device": "tpux"}, "tpux")]
)
def test_bad_arguments_of_load_model_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        load_model(folder / "digits", **options)
