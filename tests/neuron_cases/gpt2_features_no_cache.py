# the same without use_cache, with a mask
"""GPT-2 without a cache."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

c = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = GPT2Model(c)

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


module = Features().eval()


def ex(n):
    m = torch.ones(1, 16, dtype=torch.long)
    m[:, n:] = 0
    return torch.randint(200, (1, 16)), m


examples = [ex(9), ex(14), ex(16)]
