# NCC_EVRF056: max_position_embeddings < sequence length, positions made with arange
"""More tokens than positions."""

import torch
from torch import nn


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 8), nn.Embedding(8, 8)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.tokens(ids) + self.positions(positions)


module = Embed().eval()
examples = [(torch.randint(50, (1, 12)),) for _ in range(2)]
