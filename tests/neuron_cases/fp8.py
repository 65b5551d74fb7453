# NCC_ESPP047, NCC_EVRF051: float8_e4m3fn weights on Inf2
"""A weight of eight bits."""

import torch
from torch import nn


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8).to(torch.float8_e4m3fn))

    def forward(self, x):
        return x @ self.weight.to(torch.float32)


module = Quantized().eval()
examples = [(torch.randn(2, 8),) for _ in range(2)]
