"""Iterable data of a given length, for workers: a module of its own, because spawned workers import it."""

import torch
from torch.utils.data import IterableDataset

from hvd_adam.errors import UserError


class Numbers(IterableDataset):
    """`length` tensors of shape `(1,)`, and then an exception if `error` is one of its names."""

    def __init__(self, length: int, error: str = "") -> None:
        self.length, self.error = length, error

    def __iter__(self):
        for number in range(self.length):
            yield torch.full((1,), float(number))
        if self.error == "ValueError":
            raise ValueError("broken sample")
        if self.error == "UserError":
            raise UserError("data.bin is missing: download it")
