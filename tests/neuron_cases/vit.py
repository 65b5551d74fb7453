# aws-neuron-samples hf_pretrained_vit_inference_on_inf2
"""ViT."""

import torch
from transformers import ViTConfig, ViTForImageClassification

c = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
    num_labels=5,
)


class Wrap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = ViTForImageClassification(c)

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


module = Wrap().eval()
examples = [(torch.randn(1, 3, 32, 32),) for _ in range(2)]
