# aws-neuron-sdk#1265: wav2vec2, hubert (weight norm as a parametrization) end the process on torch-neuronx 2.9
"""A weight that is computed from two others in every call."""

import torch
from torch import nn


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv1d(16, 16, 8, padding=4, groups=4)
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)

    def forward(self, hidden):
        return nn.functional.gelu(self.conv(hidden.transpose(1, 2))[:, :, :-1]).transpose(1, 2)


module = Positional().eval()
examples = [(torch.randn(1, 20, 16),) for _ in range(2)]
