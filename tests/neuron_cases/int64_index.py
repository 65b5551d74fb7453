# aws-neuron-sdk#937, #785: int64 indices and int64 values looked up gave every second one as 0
"""Integers are looked up with integers."""

import torch
from torch import nn


class LookUp(nn.Module):
    def forward(self, values, index):
        return values[index], torch.index_select(values, 0, index)


module = LookUp().eval()
examples = [(torch.randint(0, 100, (10,)), torch.randperm(10)) for _ in range(2)]
