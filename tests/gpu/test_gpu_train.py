"""The commands on a GPU: training in half precision, exact resume, evaluation, doctor.

Hazards: loss scaling that skips all updates or none; a resumed run that differs in a bit; random generators of the
GPU that are not saved; a checkpoint that cannot be loaded without a GPU; a loop that synchronizes on every update;
a batch that is used before its copy to the GPU is complete.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cifar_files import write_cifar10
from helpers.on_ranks import on_ranks
from helpers.training_runs import checkpoint, events, succeeded, train

from hvd_adam.config import TrainConfig
from hvd_adam.data import Datasets, ImageData
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.training.trainer import Trainer


def printed(done):
    """Returns the JSON object in a launcher's output."""
    text = succeeded(done).stdout
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


@pytest.mark.parametrize(
    "options",
    [
        "--precision bf16 --channels-last",
        "--precision fp16 --max-grad-norm 1 --accumulate 2",
        "--precision bf16 --compile --deterministic",
    ],
)
def test_training_reaches_its_accuracy_in_every_precision(options, tmp_path):
    done = train(*f"--epochs 4 --device cuda {options}".split(), ranks=1, folder=tmp_path / "run")
    succeeded(done)
    assert "1 rank(s) on cuda" in done.stdout
    assert events(tmp_path / "run")[-1]["test_accuracy"] > 0.9
    saved = checkpoint(tmp_path / "run")
    assert all(value.device.type == "cpu" for value in saved["model"].values())
    model = torch.nn.ParameterList(list(saved["model"].values()))
    torch.optim.Adam(model.parameters()).load_state_dict(saved["optimizer"])
    found = printed(train("--checkpoint", tmp_path / "run", "--json", ranks=1, module="hvd_adam.evaluate"))
    # Another batch size may select other kernels: the result may differ by one or two images of 355.
    assert found["test_accuracy"] == pytest.approx(events(tmp_path / "run")[-1]["test_accuracy"], abs=0.006)


@pytest.mark.parametrize("options", ["--precision bf16", "--precision fp16 --accumulate 2 --dropout 0.3"])
def test_a_stopped_run_ends_bit_for_bit_as_an_uninterrupted_one(options, tmp_path):
    write_cifar10(tmp_path / "data")
    fixed = "--dataset cifar10 --model cnn --epochs 3 --batch-size 20 --deterministic --device cuda --dropout 0.2"
    # A constant rate, because the end of a decay depends on --max-steps.
    argv = [*fixed.split(), "--lr-decay", "constant", "--data-dir", tmp_path / "data", *options.split()]
    succeeded(train(*argv, ranks=1, folder=tmp_path / "whole"))
    succeeded(train(*argv, "--max-steps", 7, ranks=1, folder=tmp_path / "parts"))
    succeeded(train(*argv, ranks=1, folder=tmp_path / "parts"))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["progress"]["step"] == parts["progress"]["step"] > 7
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    for number, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, parts["optimizer"]["state"][number][name]), (number, name)
    assert whole["loss_scaler"] == parts["loss_scaler"]


@on_ranks(1)
def test_no_update_of_the_training_loop_synchronizes_with_the_device(cluster):
    place = Path(tempfile.mkdtemp())
    write_cifar10(place / "data")
    options = {"device": "cuda", "precision": "bf16", "channels_last": True, "model": "cnn", "dataset": "cifar10"}
    sizes = {"batch_size": 10, "epochs": 1, "log_every": 1000}
    trainer = Trainer(TrainConfig(**options, **sizes, data_dir=str(place / "data"), output_dir=str(place / "run")))
    update, evaluate, log_step = trainer._update, trainer._evaluate, trainer._log_step

    def updating(*arguments):
        update(*arguments)
        # The first updates compile kernels and build the tables. Later ones must not synchronize.
        torch.cuda.set_sync_debug_mode("error" if trainer.progress.step > 3 else "default")

    def evaluating():
        torch.cuda.set_sync_debug_mode("default")
        assert trainer.progress.step > 10
        return evaluate()

    def logging():  # at the end of the epoch, too: reads the loss
        torch.cuda.set_sync_debug_mode("default")
        log_step()

    trainer._update, trainer._evaluate, trainer._log_step = updating, evaluating, logging
    trainer.run()
    assert trainer.progress.scores is not None


def test_the_doctor_reports_gpu_driver_and_nccl_as_ok():
    checks = {
        check["name"]: check for check in printed(train("--json", ranks=1, module="hvd_adam.doctor"))["checks"]
    }
    for name in ("driver", "GPUs", "NCCL"):
        assert checks[name]["status"] == "ok", checks[name]
    # A warning if it was built with --without-mpi.
    assert checks["Horovod"]["status"] == "ok" or "need MPI" in checks["Horovod"]["found"], checks["Horovod"]


def test_batches_of_workers_and_of_images_on_the_host_are_those_of_a_cpu():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16)).astype(np.uint8)
    labels = np.arange(40) % 2
    on_host = ImageData("noise", ("a", "b"), images, labels, images, labels, crop=14)
    samples = list(zip(torch.from_numpy(images), labels.tolist(), strict=True))
    in_workers = Datasets(samples, samples, ("a", "b"), mean=(0.5,) * 3, std=(0.2,) * 3)

    def batches(device):
        for loader in (DeviceLoader(on_host, device), WorkerLoader(in_workers, device, workers=2)):
            yield from loader.train_batches(0, 0, global_batch_size=8)
            yield from loader.test_batches(9)

    for ours, theirs in zip(batches(torch.device("cuda", 0)), batches(torch.device("cpu")), strict=True):
        assert ours[0].is_cuda and torch.equal(ours[1].cpu(), theirs[1])
        torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-6, atol=1e-6)
