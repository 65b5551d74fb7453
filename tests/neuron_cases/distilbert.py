# aws-neuron-samples hf_pretrained_distilbert_Inference_on_trn1
"""DistilBERT."""

import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM

c = DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
c.return_dict = False
module = DistilBertForMaskedLM(c).eval()


def ex(n):
    m = torch.ones(1, 16, dtype=torch.long)
    m[:, n:] = 0
    return torch.randint(200, (1, 16)), m


examples = [ex(9), ex(14), ex(16)]
