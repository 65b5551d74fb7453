# aws-neuron-sdk#641 (FlauBERT, XLM): the third input is langs, the caller means token_type_ids
"""A third input that is not what its caller thinks."""

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.languages, self.types = nn.Embedding(20, 8), nn.Embedding(2, 8), nn.Embedding(2, 8)

    def forward(self, input_ids, attention_mask=None, langs=None, token_type_ids=None):
        h = self.words(input_ids) * attention_mask[..., None]
        if langs is not None:
            h = h + self.languages(langs)
        if token_type_ids is not None:
            h = h + self.types(token_type_ids)
        return h


module = Encoder().eval()
examples = [
    (torch.randint(20, (1, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.randint(2, (1, 6))),
    (torch.randint(20, (1, 6)), torch.tensor([[1, 1, 1, 0, 0, 0]]), torch.randint(2, (1, 6))),
]
