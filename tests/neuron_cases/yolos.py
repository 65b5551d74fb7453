# aws-neuron-sdk#1265, release notes of SDK 2.28: yolos ends the process on torch-neuronx 2.9
"""Yolos, which resizes a weight by bicubic interpolation."""

import torch
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

c = YolosConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=[32, 48],
    patch_size=8,
    num_detection_tokens=5,
    num_labels=3,
)


class Y(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = YolosForObjectDetection(c)

    def forward(self, pixel_values):
        out = self.model(pixel_values=pixel_values)
        return out.logits, out.pred_boxes


module = Y().eval()
examples = [(torch.randn(1, 3, 32, 48),) for _ in range(2)]
