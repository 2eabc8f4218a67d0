"""A model of which each batch uses one branch."""

import torch


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.never = (torch.nn.Linear(6, 3).double() for _ in range(3))

    def forward(self, inputs, branch):
        return getattr(self, branch)(inputs)
