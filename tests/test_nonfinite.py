"""All ranks skip an update if the gradient of any rank is not finite.

Hazards: ranks that decide differently; a NaN that remains in weights, moments, step counts or batch-norm
statistics, or that compression, accumulation, clipping or a shard hides; finite gradients that are skipped (large
ones, half-precision sums); a job that skips forever, or loses its checkpoint when it ends.
"""

import math

import pytest
import torch
from helpers.exchanges import scattering
from helpers.on_ranks import on_ranks
from helpers.skipping import check_skipping, made, update
from helpers.training_runs import checkpoint, events, succeeded, train

from hvd_adam import Adam, distribute

OPTIONS = [
    {},
    {"strategy": "sharded"},
    {"compression": "fp16"},
    {"compression": "int8"},
    {"compression": "int4", "max_grad_norm": 1.0},
    {"compression": "bf16", "strategy": "sharded"},
    {"accumulate": 2, "max_grad_norm": 1.0},
]


@on_ranks(2)
def test_one_nonfinite_element_on_one_rank_is_skipped_by_all(cluster):
    for options in OPTIONS:
        check_skipping(cluster, options)


@on_ranks(2, "mpi")
def test_nonfinite_gradients_are_skipped_with_scattered_gradients(cluster):
    with scattering():
        check_skipping(cluster, {"strategy": "sharded"})
        check_skipping(cluster, {"strategy": "sharded", "max_grad_norm": 1.0})


@on_ranks(0)
def test_nonfinite_gradients_are_skipped_on_one_rank(cluster):
    check_skipping(cluster, {})


@on_ranks(2)
def test_a_single_nonfinite_element_is_detected_and_large_finite_ones_are_not_skipped(cluster):
    for dtype, largest in ((torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)):
        model = torch.nn.Linear(40, 40, bias=False).to(dtype)
        optimizer = distribute(Adam(model.parameters()), model)
        for place, value in ((None, largest), (777, math.inf), (1599, math.nan)):
            optimizer.zero_grad()
            model(torch.zeros(1, 40, dtype=dtype)).sum().backward()
            optimizer.synchronize()
            optimizer.zero_grad()
            gradient = torch.full((40, 40), largest / 2, dtype=dtype)
            if place is not None and cluster.rank == 1:
                gradient.view(-1)[place] = value
            (model.weight * gradient).sum().backward()
            optimizer.step()
        assert optimizer.skipped_updates == 2, dtype
        assert model.weight.isfinite().all()


@on_ranks(2)
def test_skipping_can_be_disabled(cluster):
    model, optimizer = made(skip_nonfinite=False)
    update(model, optimizer, math.nan if cluster.rank else 1.0)
    assert model[0].weight.isnan().all()
    assert optimizer.skipped_updates == 0


# The loss of rank 1 is not finite in the training passes that BAD names.
MODEL = """
import os
import torch, horovod.torch as hvd

class Model(torch.nn.Sequential):
    passes = 0

    def forward(self, images):
        self.passes += self.training
        value, first, last = os.environ["BAD"].split(":")
        if self.training and hvd.rank() == 1 and int(first) <= self.passes <= int(last):
            images = images * float(value)
        return super().forward(images)

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    layers = (torch.nn.Linear(inputs, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, num_classes))
    return Model(torch.nn.Flatten(), *layers)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "bad.py").write_text(MODEL)

    def run(bad, *argv):
        environ = {"PYTHONPATH": str(tmp_path), "BAD": bad}
        fixed = ["--epochs", 1, "--model", "bad:build", "--log-every", 1, "--checkpoint-every", 5]
        return train(*fixed, *argv, ranks=2, controller="mpi", folder=tmp_path / "run", env=environ)

    return run


def test_training_continues_after_a_nonfinite_loss_and_logs_its_rank(run, tmp_path):
    succeeded(run("nan:4:5"))
    skips = events(tmp_path / "run", "skip")
    assert [(event["step"], event["skipped"], event["reason"]) for event in skips] == [
        (4, 1, "loss of rank 1 not finite"),
        (5, 2, "loss of rank 1 not finite"),
    ]
    saved = checkpoint(tmp_path / "run")
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert all(entry["step"] == 20 for entry in saved["optimizer"]["state"].values())  # of 22
    assert all(event["loss"] is not None for event in events(tmp_path / "run", "step"))
    assert all(event["test_loss"] is not None for event in events(tmp_path / "run", "eval"))


def test_too_many_skips_in_a_row_end_the_job_and_the_last_checkpoint_is_finite(run, tmp_path):
    done = run("inf:7:99", "--max-skipped", 4)
    assert done.returncode == 1
    assert done.stderr.count("5 updates in a row were skipped, the last one, update 11") == 1
    assert "loss of rank 1 not finite" in done.stderr
    assert "Traceback" not in done.stderr
    saved = checkpoint(tmp_path / "run")
    assert saved["progress"]["step"] in (5, 10)
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert all(entry["step"] <= 6 for entry in saved["optimizer"]["state"].values())
