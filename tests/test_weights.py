"""The weights of a run: frozen ones, groups for the decay, the start from another run, and the moving average.

Hazards: a pattern that matches nothing; statistics of a frozen layer that move; a bias that decays; a weight of
another shape that is loaded; an average that counts skipped updates.
"""

import pytest
import torch
from torch import nn

from hvd_adam.checkpoint import storage
from hvd_adam.errors import UserError
from hvd_adam.training.weights.batchnorm_guard import BatchNormSnapshot
from hvd_adam.training.weights.ema import ModelAverage
from hvd_adam.training.weights.trainable import freeze, keep_frozen_statistics, parameter_groups
from hvd_adam.training.weights.warm_start import warm_start


def model(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, outputs), nn.BatchNorm1d(outputs))


def test_patterns_freeze_parameters_and_the_statistics_of_frozen_layers():
    net = model()
    freeze(net, "0.*, 1.weight")
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        "0.weight",
        "0.bias",
        "1.weight",
    ]
    keep_frozen_statistics(net.train())
    assert net[1].training  # its bias is trained
    freeze(net, "1.*")
    keep_frozen_statistics(net.train())
    assert not net[1].training and net[3].training


@pytest.mark.parametrize(
    ("patterns", "words"), [("0.*,absent", "--freeze absent matches no"), ("*", "leave some")]
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, words):
    with pytest.raises(UserError, match=words):
        freeze(model(), patterns)


def test_only_matrices_decay_where_that_is_asked_for():
    net = model()
    matrices, others = parameter_groups(net, "matrices")
    assert [p.shape for p in matrices["params"]] == [(4, 3), (2, 4)] and "weight_decay" not in matrices
    assert len(others["params"]) == 6 and others["weight_decay"] == 0
    (every,) = parameter_groups(net, "all")
    assert len(every["params"]) == 8


def test_a_warm_start_takes_what_fits_and_names_the_rest(tmp_path):
    saved = model(outputs=5).state_dict() | {"old.weight": torch.zeros(7)}
    storage.save(tmp_path, 1, {"model": {name: torch.full_like(t, 2) for name, t in saved.items()}})
    net = model()
    before = net[2].weight.clone()
    line = warm_start(net, str(tmp_path))
    assert "8 of 14 tensors" in line and "2.weight (5, 4) -> (2, 4)" in line
    assert "old.weight (7,) is not used" in line and "and 1 more are new" in line
    assert net[0].weight.eq(2).all() and torch.equal(net[2].weight, before)
    with pytest.raises(UserError, match=r"no weight of it fits the model: weight \(3, 3\)"):
        warm_start(nn.Linear(3, 3), str(tmp_path))


@pytest.mark.parametrize("device_decides", [False, True])
def test_the_average_follows_its_formula_and_skips_skipped_updates(device_decides, monkeypatch):
    net = model().double()
    average = ModelAverage(net, 0.9)
    average.start(None, saved=False)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    if device_decides:  # as on a GPU, where reading the flag would wait for the device
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    for skipped in (False, True, False):
        for value in net.state_dict().values():
            value.add_(1)
        average.update(torch.tensor(skipped))
        for name, value in net.state_dict().items():
            if not value.is_floating_point():
                expected[name] = value.clone()
            elif not skipped:
                expected[name].mul_(0.9).add_(value, alpha=0.1)
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)
        else:
            assert value == net.state_dict()[name]


class Replacing(nn.Module):
    """A module that assigns a new tensor to its buffer in each forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.zeros(1))

    def forward(self, x):
        self.running = 0.5 * self.running + 0.5 * x.mean()
        return x - self.running


def test_buffers_that_a_module_replaces_are_averaged_and_restored():
    net = Replacing()
    average, snapshot = ModelAverage(net, 0.5), BatchNormSnapshot(net)
    net(torch.full((4, 1), 8.0))
    average.update(None)
    assert net.running == 4 and average.model.running == 2
    snapshot.save()
    net(torch.full((4, 1), float("nan")))
    snapshot.restore(torch.tensor(True))
    assert net.running == 4
