# NCC_EVRF035, JAX known issues: dot of integers
"""A product of integers."""

import torch
from torch import nn


class CountPairs(nn.Module):
    def forward(self, left, right):
        return left @ right.transpose(-1, -2)


module = CountPairs().eval()
examples = [(torch.randint(0, 9, (2, 3, 4)), torch.randint(0, 9, (2, 5, 4))) for _ in range(2)]
