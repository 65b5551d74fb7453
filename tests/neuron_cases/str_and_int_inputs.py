# aws-neuron-sdk#1101 (Kokoro: str and int inputs), #682 (keyword inputs)
"""Inputs that are no tensors."""

import torch
from torch import nn


class Voice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, tokens, speed=1, style=None):
        out = self.fc(tokens) * speed
        return out if style is None else out + style


module = Voice().eval()
examples = [(torch.randn(1, 4), 2, None) for _ in range(2)]
