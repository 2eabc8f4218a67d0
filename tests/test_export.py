"""`hvd_adam.export`: files that other programs load, with the outputs of the model.

Hazards: a file that needs this package, or only one size of the batch; normalization that is left out or applied
twice; a file that is there, but not whole or wrong; an error of an exporter that fills the screen.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.forked_commands import ForkedCommands
from helpers.trained_models import train, train_on_digits
from helpers.training_runs import ROOT, one_line, succeeded

from hvd_adam import load_model
from hvd_adam.checkpoint import storage
from hvd_adam.errors import UserError
from hvd_adam.export import formats

EXPORT = "hvd_adam.export"

# Each reads "images" of a file, and writes its logits and its metadata; nothing else may be imported.
READ = """
import json, sys
file, images, blocked = sys.argv[1:]
sys.modules.update(dict.fromkeys(["hvd_adam", "torchvision", *blocked.split()]))
"""
READ_TORCH = (
    READ
    + """
import torch
metadata = dict.fromkeys(["classes", "shape", "mean", "std", "resize", "model", "model_args", "precision"], "")
program = torch.export.load(file, extra_files=metadata).module()
logits = [program(torch.tensor(batch, dtype=torch.uint8)).tolist() for batch in json.load(open(images))]
texts = {name: text if isinstance(text, str) else text.decode() for name, text in metadata.items()}
print(json.dumps([logits, texts]))
"""
)
READ_ONNX = (
    READ
    + """
import numpy, onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
batches = [numpy.array(batch, dtype=numpy.uint8) for batch in json.load(open(images))]
logits = [session.run(["logits"], {"images": batch})[0].tolist() for batch in batches]
print(json.dumps([logits, session.get_modelmeta().custom_metadata_map]))
"""
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    preload = ("hvd_adam.export.command", "onnxscript", "torch.onnx", "torch._dynamo")
    with ForkedCommands(tmp_path_factory.mktemp("export"), *preload) as commands:
        yield commands


@pytest.fixture(scope="module")
def folder(commands):
    train_on_digits(commands, "digits", "--model", "mlp")
    train(commands, "normed", "--model", "nets:normed", "--precision", "bf16", "--channels-last")
    return commands.folder


def untrained(folder, name, model):
    """Makes a checkpoint of a model of `nets.py` from that of another one."""
    state = storage.load(folder / "digits")
    state["config"] |= {"model": model}
    weights = {"1.weight": state["model"]["1.weight"][:10], "1.bias": state["model"]["1.bias"][:10]}
    storage.save(folder / name, 3, {**state, "model": weights, "ema": None})


def read(script, file, images, blocked=""):
    """Reads a file in a process without this package: the logits of batches of images, and the metadata."""
    given = file.with_suffix(".json")
    given.write_text(json.dumps([batch.tolist() for batch in images]))
    command = [sys.executable, "-I", "-c", script, file, given, blocked]
    done = succeeded(subprocess.run(command, capture_output=True, text=True, timeout=250))
    logits, metadata = json.loads(done.stdout)
    return [torch.tensor(batch) for batch in logits], {name: json.loads(text) for name, text in metadata.items()}


def images_of(shape):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator) for n in (1, 2, 3, 40)]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["digits", "normed"])
@pytest.mark.parametrize(
    ("form", "script", "blocked"),
    [("torch", READ_TORCH, "onnx"), ("onnx", READ_ONNX, "torch onnx")],
    ids=["torch", "onnx"],
)
def test_an_exported_file_has_the_logits_of_the_model_without_this_package(
    commands, folder, run, form, script, blocked
):
    file = folder / f"{run}.{form}"
    done = succeeded(commands.run(EXPORT, "--checkpoint", run, "--format", form, "--output", file.name))
    assert f"{file.name}: {form}, " in done.stdout
    assert ("trained with --precision bf16; exported in float32" in done.stdout) == (run == "normed")
    model = load_model_of(folder, run)
    images = images_of(model.shape)
    logits, metadata = read(script, file, images, blocked)
    model.precision = "fp32"
    with torch.no_grad():
        for batch, found in zip(images, logits, strict=True):
            expected = model(batch)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert metadata["classes"] == list("0123456789") and metadata["shape"] == [1, 8, 8]
    assert (metadata["mean"], metadata["std"]) == (list(model.mean), list(model.std))
    assert metadata["resize"] == [8, 8] and metadata["precision"] == load_model_of(folder, run).precision
    assert not list(folder.glob(".*"))


def load_model_of(folder, run):
    sys.path.insert(0, str(folder))
    try:
        return load_model(folder / run)
    finally:
        sys.path.remove(str(folder))


def test_safetensors_have_the_weights_that_were_asked_for_and_the_metadata(commands, folder):
    from safetensors import safe_open

    options = ["--checkpoint", "digits", "--format", "safetensors", "--weights", "model", "--output", "digits.st"]
    succeeded(commands.run(EXPORT, *options))
    saved = storage.load(folder / "digits")["model"]
    with safe_open(folder / "digits.st", "pt") as file:
        assert sorted(file.keys()) == sorted(saved)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in saved.items())
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    assert metadata["classes"] == list("0123456789") and metadata["model"] == "mlp"
    assert oct((folder / "digits.st").stat().st_mode)[-3:] == oct(0o666 & ~current_umask())[-3:]


def not_finite(folder):
    """Writes a checkpoint like that of a training which has diverged."""
    state = storage.load(folder / "digits")
    next(iter(state["ema"].values())).fill_(float("nan"))
    storage.save(folder / "nan" / "checkpoints", 3, state)


def test_weights_that_are_not_finite_are_the_same_in_safetensors(commands, folder):
    not_finite(folder)
    argv = ["--checkpoint", "nan", "--format", "safetensors", "--output", "nan.st"]
    assert "weights identical" in succeeded(commands.run(EXPORT, *argv)).stdout


def current_umask():
    os.umask(mask := os.umask(0))
    return mask


BAD = [
    (["--output", "digits"], "--output digits is a folder"),
    (["--output", "nowhere/m.pt2"], "there is no folder nowhere"),
    (["--output", "nets.py"], "--output nets.py exists: choose another name, or replace it with --force"),
    ([], "--output is missing"),
    (["--output", "m" * 300], "cannot be written (File name too long)"),
    (["--output", "null", "--force"], "--output null is not a regular file"),
    (["--output", "digits/checkpoints/step-00000003/state.pt", "--force"], "is a file of the checkpoint itself"),
    (["--output", "digits/checkpoints/latest", "--force"], "is a file of the run's checkpoints folder"),
    (["--output", "digits/metrics.jsonl", "--force"], "--output digits/metrics.jsonl is a file of the run itself"),
    (["--output", "m", "--checkpoint", "nan"], "--format torch: logits are not finite"),
    (["--output", "m", "--format", "tflite"], "--format is tflite: it must be one of torch, onnx, safetensors"),
    (["--output", "m", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
    (["--output", "m", "--checkpoint", "noisy"], "--format torch: logits of the exported model differ by "),
    (["--output", "m", "--checkpoint", "noisy", "--format", "onnx"], "--format onnx: logits of the exported"),
    (["--output", "m", "--checkpoint", "branching"], "the model cannot be exported: GuardOnDataDependentSymNode"),
    (["--output", "m", "--checkpoint", "branching", "--format", "onnx"], "the model cannot be exported: Guard"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_line_and_nothing_is_written(commands, folder, argv, message):
    for model in ("noisy", "branching"):
        if not (folder / model).exists():
            untrained(folder, model, f"nets:{model}")
    if not (folder / "null").exists():
        os.mkfifo(folder / "null")  # as /dev/null, which --force must not replace
        not_finite(folder)
    before = (folder / "nets.py").read_text()
    line = one_line(commands.run(EXPORT, "--checkpoint", "digits", *argv))
    assert message in line and len(line) < 500
    assert (
        not (folder / "m").exists() and not list(folder.glob(".*")) and (folder / "nets.py").read_text() == before
    )


def test_a_release_of_torch_that_cannot_write_the_format_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu121"))
    formats.require_release("torch")
    formats.require_release("safetensors")
    with pytest.raises(UserError, match=r"--format onnx needs torch 2.6 or newer, not 2.5.1\+cu121"):
        formats.require_release("onnx")


@pytest.mark.slow
def test_a_model_that_does_not_classify_images_is_exported_as_weights_only(commands, folder):
    argv = [
        "--dataset",
        "mine:data",
        "--model",
        "mine:build",
        "--model-args",
        '{"width": 4}',
        "--loss",
        "mine:loss",
    ]
    train(commands, "sums", *argv, "--batch-size", 20)
    line = one_line(commands.run(EXPORT, "--checkpoint", "sums", "--output", "m"))
    assert "is not of a classifier of images: use --format safetensors" in line
    succeeded(commands.run(EXPORT, "--checkpoint", "sums", "--format", "safetensors", "--output", "sums.st"))


@pytest.mark.slow
def test_a_file_is_replaced_only_by_one_that_was_checked(commands, folder, monkeypatch):
    (folder / "old.pt2").write_text("old")
    untrained(folder, "random", "nets:noisy")
    options = ["--format", "torch", "--output", "old.pt2", "--force"]
    one_line(commands.run(EXPORT, "--checkpoint", "random", *options))
    assert (folder / "old.pt2").read_text() == "old"
    succeeded(commands.run(EXPORT, "--checkpoint", "digits", *options))
    assert (folder / "old.pt2").stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_file_is_written_leaves_nothing(tmp_path, number):
    code = f"""
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from hvd_adam.checkpoint.output import whole_file
with whole_file("--output", Path("m")) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), {int(number)})
    time.sleep(1000)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, timeout=250
    )
    assert done.returncode == -number and not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra_that_has_it(commands, folder):
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'onnxscript' else find(name, *rest)\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{folder / 'blocked'}:{ROOT}"}
    command = [sys.executable, "-m", EXPORT, "--checkpoint", "digits", "--format", "onnx", "--output", "m"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert "onnxscript is not installed: pip install '.[export]' in the clone of hvd_adam" in one_line(done)


def test_what_differs_is_measured_relative_to_the_largest_logit(folder):
    model = load_model_of(folder, "digits")
    with torch.no_grad():
        assert formats.relative_difference(lambda images: model(images) * 1.001, model, 3) == pytest.approx(
            1e-3, rel=1e-2
        )
