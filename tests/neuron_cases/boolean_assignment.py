# aws-neuron-sdk#1381 (1): rows under a boolean mask are overwritten with their own flip: compiles, wrong values
"""Rows under a mask are overwritten."""

import torch
from torch import nn


class FlipSome(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids, reverse):
        rows = self.table(ids)
        rows[reverse] = rows[reverse].flip(-1)
        return rows


module = FlipSome().eval()
examples = [
    (torch.randint(7, (6,)), torch.tensor([1, 0, 1, 0, 0, 1]).bool()),
    (torch.randint(7, (6,)), torch.tensor([0, 0, 1, 1, 0, 1]).bool()),
]
