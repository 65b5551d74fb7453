# aws-neuron-sdk#1140, #1323 (yolo26), pytorch/xla#8640, PyTorch release notes: split in the last dimension
"""A split into unequal parts."""

import torch
from torch import nn


class GateAndValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        gate, value = self.fc(x).split([2, 4], dim=-1)
        return gate.sigmoid().mean(dim=-1, keepdim=True) * value


module = GateAndValue().eval()
examples = [(torch.randn(2, 4),) for _ in range(2)]
