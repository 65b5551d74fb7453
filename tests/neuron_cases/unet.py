# aws-neuron-samples pretrained_unet_inference_on_trn1
"""A U-Net."""

import torch
from torch import nn


def block(i, o):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
        nn.Conv2d(o, o, 3, padding=1, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    def __init__(self, f=8):
        super().__init__()
        self.d1, self.d2, self.mid = block(3, f), block(f, 2 * f), block(2 * f, 4 * f)
        self.pool = nn.MaxPool2d(2, 2)
        self.u2, self.u1 = nn.ConvTranspose2d(4 * f, 2 * f, 2, 2), nn.ConvTranspose2d(2 * f, f, 2, 2)
        self.c2, self.c1, self.head = block(4 * f, 2 * f), block(2 * f, f), nn.Conv2d(f, 1, 1)

    def forward(self, image):
        a = self.d1(image)
        b = self.d2(self.pool(a))
        m = self.mid(self.pool(b))
        b = self.c2(torch.cat((self.u2(m), b), 1))
        return torch.sigmoid(self.head(self.c1(torch.cat((self.u1(b), a), 1))))


module = UNet().eval()
examples = [(torch.randn(1, 3, 32, 32),) for _ in range(2)]
