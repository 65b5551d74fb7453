# NCC_ESFH002, compiler release notes ("treats INT64 as INT32 by truncating"): a hash with a 64-bit constant
"""A hash whose constant has more than 32 bits."""

import torch
from torch import nn


class HashEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 8)

    def forward(self, ids):
        return self.table((ids * 5_000_000_029) % 64)


module = HashEmbedding().eval()
examples = [(torch.randint(1, 30000, (1, 6)),) for _ in range(2)]
