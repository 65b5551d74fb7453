# aws-neuron-sdk#901: a Viterbi decoder that builds Python lists, then torch.FloatTensor
"""A path that is built as a Python list."""

import torch
from torch import nn


class Viterbi(nn.Module):
    def __init__(self, tags=3):
        super().__init__()
        self.step = nn.Parameter(torch.randn(tags, tags))

    def forward(self, emissions):
        score, back = emissions[0], []
        for row in emissions[1:]:
            best, where = (score[:, None] + self.step).max(dim=0)
            score = best + row
            back.append(where)
        path = [score.argmax().item()]
        for where in reversed(back):
            path.append(where[path[-1]].item())
        return torch.FloatTensor(path[::-1])


module = Viterbi().eval()
examples = [(torch.randn(5, 3),) for _ in range(2)]
