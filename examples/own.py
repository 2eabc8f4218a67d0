"""A regression for hvd_adam.train: scikit-learn's diabetes data, a network, a loss and a metric."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hvd_adam.data import Datasets


def data(fold: int = 0) -> Datasets:
    """Returns 442 patients: 10 measurements, and the progression of their disease. Every fifth is for testing."""
    measured = load_diabetes()
    rows = torch.tensor(measured.data * 20, dtype=torch.float32)
    progression = torch.tensor(measured.target / 100, dtype=torch.float32)
    test = torch.arange(len(rows)) % 5 == fold
    train_set, test_set = (TensorDataset(rows[part], progression[part]) for part in (~test, test))
    return Datasets(train_set, test_set, classes=(), name="diabetes")


def build(sample_shape: tuple[int, ...], width: int = 64) -> nn.Module:
    """Returns a network with one output per patient."""
    layers = nn.Linear(sample_shape[0], width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 1)
    return nn.Sequential(*layers, nn.Flatten(0))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean over the micro-batch."""
    return F.smooth_l1_loss(outputs, targets)


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the absolute error of each patient."""
    return (outputs - targets).abs()
