# aws-neuron-sdk#809 (LightGlue): layers stop when enough points are confident; a dict comes out as a tuple
"""Layers that stop where a mean is large enough."""

import torch
from torch import nn


class Matcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.confidence = nn.Linear(8, 1)

    def forward(self, points):
        for layer in self.layers:
            points = layer(points).tanh()
            sure = self.confidence(points).sigmoid() > 0.5
            if sure.float().mean() > 0.95:
                break
        return points


module = Matcher().eval()
examples = [(torch.randn(1, 10, 8),) for _ in range(3)]
