# aws-neuron-samples tv_pretrained_resnet50_inference_on_trn1
"""ResNet."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

c = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 2, 1, 1], layer_type="bottleneck", num_labels=5
)
c.return_dict = False
module = ResNetForImageClassification(c).eval()
examples = [(torch.randn(1, 3, 64, 64),) for _ in range(2)]
