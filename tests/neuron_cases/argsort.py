# aws-neuron-sdk#868: argsort of integers on a Neuron device
"""Integers are sorted."""

import torch
from torch import nn


class Rank(nn.Module):
    def forward(self, scores):
        order = torch.argsort(scores, dim=0)
        return order


module = Rank().eval()
examples = [(torch.randint(0, 100, (10, 1)),) for _ in range(3)]
