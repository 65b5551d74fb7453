# aws-neuron-sdk#757 (yolov5): tensors in a list, made in the first eager call, stay on the CPU
"""Grids that an earlier call left on the host."""

import torch
from torch import nn


class Detect(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)])
        self.grids = [torch.empty(0), torch.empty(0)]

    def forward(self, image):
        out = []
        for i, conv in enumerate(self.convs):
            boxes = conv(image[..., :: i + 1, :: i + 1])
            h, w = boxes.shape[-2:]
            if self.grids[i].shape[-2:] != boxes.shape[-2:]:
                ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                self.grids[i] = torch.stack((xs, ys)).float()
            xy = boxes[:, :2].sigmoid() * 2 + self.grids[i]
            out.append(torch.cat((xy, boxes[:, 2:].sigmoid()), 1).flatten(2).transpose(1, 2))
        return torch.cat(out, 1)


module = Detect().eval()
with torch.no_grad():
    module(torch.randn(1, 3, 8, 8))  # yolov5 has to run once before it is traced
examples = [(torch.randn(1, 3, 8, 8),) for _ in range(2)]
