# optimum-neuron supported architectures: Swin
"""Swin."""

import torch
from transformers import SwinConfig, SwinForImageClassification

c = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5)


class Wrap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SwinForImageClassification(c)

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


module = Wrap().eval()
examples = [(torch.randn(1, 3, 32, 32),) for _ in range(2)]
