# aws-neuron-sdk#717: masked_select
"""As many results as a mask has ones."""

import torch
from torch import nn


class Keep(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, mask):
        return torch.masked_select(self.fc(x), mask)


module = Keep().eval()
examples = [(torch.randn(3, 6), torch.rand(3, 6) > 0.5) for _ in range(2)]
