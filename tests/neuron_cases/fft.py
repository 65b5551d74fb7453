# torch_neuronx.analyze page: aten::fft_fft fails in neuronx-cc. Here a real spectrum (FNet-like mixing)
"""A Fourier transform, of which the real part is kept."""

import torch
from torch import nn


class Mix(nn.Module):
    def forward(self, hidden):
        spectrum = torch.fft.fft(hidden, dim=-1)
        return spectrum.real


module = Mix().eval()
examples = [(torch.randn(2, 8, 16),) for _ in range(2)]
