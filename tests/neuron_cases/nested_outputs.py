# torch_neuronx.trace takes nested outputs in AWS's T5 and GPT-2 samples: (logits, ((k, v), (k, v)))
"""Nested results."""

import torch
from torch import nn


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.v, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.o(x), ((self.k(x), self.v(x)),)


module = Step().eval()
examples = [(torch.randn(1, 4),) for _ in range(2)]
