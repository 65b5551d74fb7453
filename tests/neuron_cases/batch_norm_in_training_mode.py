# sagemaker-benchmarking-accelerators-pretrained-pytorch-resnet50#1: "set your model to model.eval()"
"""Batch normalization in training mode."""

import torch
from torch import nn

module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # no eval()
examples = [(torch.randn(2, 3, 8, 8),) for _ in range(2)]
