# aws-neuron-samples hf_pretrained_perceiver_language / vision inference
"""Perceiver."""

import torch
from torch import nn
from transformers import PerceiverConfig, PerceiverForImageClassificationLearned

c = PerceiverConfig(
    num_latents=8,
    d_latents=16,
    d_model=24,
    num_blocks=1,
    num_self_attends_per_block=2,
    num_self_attention_heads=2,
    num_cross_attention_heads=1,
    image_size=16,
    num_labels=4,
)


class P(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = PerceiverForImageClassificationLearned(c)

    def forward(self, inputs):
        return self.model(inputs=inputs).logits


module = P().eval()
examples = [(torch.randn(1, 3, 16, 16),) for _ in range(2)]
