"""Ranks with different weights or state are detected and named.

Hazards: a bit that does not change the fingerprint; a report that names the wrong tensor or rank; false reports
(sharded state, batch-norm statistics); a job that continues or hangs after the report.
"""

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.training_runs import train

from hvd_adam import Adam, distribute
from hvd_adam.distributed.consistency import fingerprint, require_consistent
from hvd_adam.errors import JobError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_every_bit_and_the_order_of_elements_change_the_fingerprint(dtype):
    bits = torch.arange(37, dtype=torch.uint8).repeat(8)
    tensor = bits.view(dtype)
    seen = {fingerprint(tensor).item()}
    for place in range(len(bits)):
        for bit in range(8):
            bits[place] ^= 1 << bit
            seen.add(fingerprint(tensor).item())
            bits[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(bits)
    swapped = tensor.clone()
    swapped[0], swapped[1] = tensor[1].clone(), tensor[0].clone()
    assert fingerprint(swapped) not in seen


def test_strides_and_chunks_do_not_change_the_fingerprint():
    tensor = torch.randn(3, 1 << 19)
    assert fingerprint(tensor.T.contiguous().T) == fingerprint(tensor)
    assert fingerprint(torch.zeros(0)) == 0


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_views_that_store_other_bits_have_the_fingerprint_of_their_values(dtype):
    tensor = torch.arange(6, dtype=torch.float64).view(torch.complex128).to(dtype)
    changed = tensor.clone()
    changed[2] *= 1j
    assert fingerprint(tensor.conj()) == fingerprint(tensor.conj().resolve_conj()) != fingerprint(tensor)
    assert fingerprint(changed) != fingerprint(tensor)
    assert fingerprint(tensor.conj().imag) == fingerprint(-tensor.imag)
    assert fingerprint(tensor[:1].expand(3)) == fingerprint(tensor[:1].repeat(3))


def trained(strategy):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    return model, optimizer


@on_ranks(3)
def test_a_tensor_that_differs_is_named_and_identical_ones_are_not(cluster):
    for strategy in ("allreduce", "sharded"):
        model, optimizer = trained(strategy)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 7) + cluster.rank).square().sum().backward()
            optimizer.step()
        sharded = strategy == "sharded"
        require_consistent(cluster, model, optimizer, sharded=sharded)
        if not sharded and cluster.rank == 1:
            optimizer.state[model[2].bias]["exp_avg_sq"][1] *= 1.000001
        if sharded and cluster.rank == 1:
            with torch.no_grad():
                model[2].bias[0] *= 1 + 2e-7
        what = "2.bias of rank 1" if sharded else "exp_avg_sq of 2.bias of rank 1"
        with pytest.raises(JobError, match=f"drifted apart: {what} differs from rank 0"):
            require_consistent(cluster, model, optimizer, sharded=sharded)


DRIFTING = """
import horovod.torch as hvd, torch

class Drifting(torch.nn.Linear):
    passes = 0

    def forward(self, images):
        self.passes += self.training
        if self.passes == 5 and hvd.rank() == 1:
            self.bias.data[0] += 1
        return super().forward(images.flatten(1))

def build(in_channels, num_classes, image_size, dropout=0.0):
    return Drifting(in_channels * image_size[0] * image_size[1], num_classes)
"""


def test_a_job_with_ranks_that_drift_apart_ends_with_one_line(tmp_path):
    (tmp_path / "drifting.py").write_text(DRIFTING)
    argv = ["--epochs", 1, "--check-consistency-every", 4]
    options = {"ranks": 2, "controller": "mpi", "env": {"PYTHONPATH": str(tmp_path)}}
    done = train(*argv, "--model", "drifting:build", folder=tmp_path / "bad", **options)
    line = next(line for line in done.stderr.splitlines() if "drifted" in line)
    assert done.returncode == 1
    assert "the ranks have drifted apart: bias of rank 1 differs from rank 0" in line
    assert "Traceback" not in done.stderr
