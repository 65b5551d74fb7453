# aws-neuron-samples hf_pretrained_roberta_inference_on_trn1 (roberta-large)
"""RoBERTa."""

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

c = RobertaConfig(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=1,
)
c.return_dict = False
module = RobertaForMaskedLM(c).eval()


def ex(n):
    m = torch.ones(1, 16, dtype=torch.long)
    m[:, n:] = 0
    ids = torch.randint(3, 200, (1, 16))
    ids[:, n:] = 1
    return ids, m


examples = [ex(9), ex(14), ex(16)]
