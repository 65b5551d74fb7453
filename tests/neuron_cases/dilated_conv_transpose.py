# NCC_EVRF010: input and kernel dilation at once: a transposed convolution with a stride and a dilation
"""A transposed convolution with a stride and a dilation."""

import torch
from torch import nn

module = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, dilation=2), nn.ReLU()).eval()
examples = [(torch.randn(1, 3, 6, 6),) for _ in range(2)]
