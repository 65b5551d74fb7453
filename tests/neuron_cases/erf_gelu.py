# aws-neuron-sdk#1081: ESM's gelu is written with erf
"""The error function, called by name."""

import math

import torch
from torch import nn


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        h = self.up(x)
        h = h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))
        return self.down(h)


module = Feed().eval()
examples = [(torch.randn(1, 5, 8),) for _ in range(2)]
