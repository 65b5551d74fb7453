# optimum-neuron supported architectures: DeBERTa-v2 (INF2 only)
"""DeBERTa."""

import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

c = DebertaV2Config(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
)
c.return_dict = False
module = DebertaV2ForSequenceClassification(c).eval()


def ex(n):
    m = torch.ones(1, 16, dtype=torch.long)
    m[:, n:] = 0
    return torch.randint(200, (1, 16)), m


examples = [ex(9), ex(14), ex(16)]
