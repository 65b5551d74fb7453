# sagemaker-benchmarking-accelerators-pretrained-pytorch-resnet50#1 (the model was in training mode); dropout only
"""Dropout in training mode."""

import torch
from torch import nn

module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))  # no eval()
examples = [(torch.randn(2, 8),) for _ in range(2)]
