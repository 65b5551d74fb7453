# NCC_EVRF004: complex types (Llama-style rotary embedding)
"""A rotary embedding in complex numbers."""

import torch
from torch import nn


class Rotary(nn.Module):
    def __init__(self, length=6, dim=8):
        super().__init__()
        angles = torch.outer(torch.arange(length).float(), 1 / 10000 ** (torch.arange(0, dim, 2) / dim))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, q):
        pairs = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turn).flatten(-2)


module = Rotary().eval()
examples = [(torch.randn(1, 6, 8),) for _ in range(2)]
