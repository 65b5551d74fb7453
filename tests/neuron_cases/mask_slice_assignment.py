# huggingface/transformers#30259: causal_mask[..., :n] = causal_mask[..., :n].masked_fill(...) is a compiler error
"""A slice of a mask that is overwritten with itself, masked."""

import torch
from torch import nn


class Mask(nn.Module):
    def forward(self, scores, keep):
        lowest = torch.finfo(scores.dtype).min
        n = keep.shape[-1]
        causal = torch.full((scores.shape[-2], n + 2), lowest, device=scores.device).triu(1)[None, None].clone()
        padding = causal[..., :n].eq(0.0) * keep[:, None, None, :].eq(0.0)
        causal = causal.expand(keep.shape[0], 1, -1, -1).clone()
        causal[..., :n] = causal[..., :n].masked_fill(padding, lowest)
        return scores + causal


module = Mask().eval()
examples = [
    (torch.randn(2, 1, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])),
    (torch.randn(2, 1, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])),
]
