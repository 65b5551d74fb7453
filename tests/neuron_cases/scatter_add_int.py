# NCC_EVRF016, NCC_EVRF060: scatter with a sum of integers
"""Integers are added up where an index says."""

import torch
from torch import nn


class Histogram(nn.Module):
    def forward(self, bins):
        ones = torch.ones_like(bins)
        return torch.zeros(2, 10, dtype=bins.dtype, device=bins.device).scatter_add(1, bins, ones)


module = Histogram().eval()
examples = [(torch.randint(0, 10, (2, 20)),) for _ in range(2)]
