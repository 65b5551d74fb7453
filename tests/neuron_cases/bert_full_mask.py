# AWS BERT tutorial (bert-base-cased-finetuned-mrpc), positional inputs, tuple out
"""BERT whose first mask is full, so that its graph has none."""

import torch
from transformers import BertConfig, BertForSequenceClassification

c = BertConfig(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
c.return_dict = False
module = BertForSequenceClassification(c).eval()


def ex(n):
    m = torch.ones(1, 16, dtype=torch.long)
    m[:, n:] = 0
    return torch.randint(200, (1, 16)), m, torch.randint(2, (1, 16))


examples = [ex(16), ex(9), ex(14)]
