# PyTorch release notes 2.17/2.18 (GPT-2, --enable-saturate-infinity), #672 (T5, NaN): two float32 minima are added
"""Two masks whose sum is minus infinity."""

import torch
from torch import nn


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, keep):
        lowest = torch.finfo(x.dtype).min
        n = x.shape[1]
        causal = torch.full((n, n), lowest, device=x.device).triu(1)
        padding = (1.0 - keep[:, None, :].to(x.dtype)) * lowest
        scores = self.q(x) @ self.k(x).transpose(1, 2) + causal + padding  # -inf where both are
        return scores.softmax(-1) @ self.v(x)


module = Attend().eval()
examples = [
    (torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])),
    (torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])),
]
