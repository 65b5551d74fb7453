# aws-neuron-sdk#1323: the attention of YOLO26 on Inf2 is wrong until its split is written as slices
"""The head of YOLO26, which splits into unequal parts."""

import torch
from torch import nn


class Conv(nn.Module):
    def __init__(self, i, o, k=1, s=1):
        super().__init__()
        self.c, self.b = nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o)

    def forward(self, x):
        return nn.functional.silu(self.b(self.c(x)))


class C2f(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.m, self.o = Conv(d, d), Conv(d // 2, d // 2, 3), Conv(d + d // 2, d)

    def forward(self, x):
        y = list(self.a(x).chunk(2, 1))
        y.append(self.m(y[-1]))
        return self.o(torch.cat(y, 1))


class Sppf(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.o, self.p = Conv(d, d // 2), Conv(d * 2, d), nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.a(x)]
        for _ in range(3):
            y.append(self.p(y[-1]))
        return self.o(torch.cat(y, 1))


class Attention(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.h, self.hd = heads, d // heads
        self.kd = self.hd // 2
        self.qkv, self.pe, self.proj = (
            nn.Conv2d(d, d + heads * self.kd * 2, 1),
            nn.Conv2d(d, d, 3, 1, 1, groups=d),
            nn.Conv2d(d, d, 1),
        )

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).view(B, self.h, self.kd * 2 + self.hd, H * W).split([self.kd, self.kd, self.hd], dim=2)
        a = (q.transpose(-2, -1) @ k * self.kd**-0.5).softmax(-1)
        return self.proj((v @ a.transpose(-2, -1)).view(B, C, H, W) + self.pe(v.reshape(B, C, H, W)))


class Yolo(nn.Module):
    def __init__(self, d=16, classes=3):
        super().__init__()
        self.body = nn.Sequential(Conv(3, d, 3, 2), Conv(d, d, 3, 2), C2f(d), Sppf(d))
        self.at = Attention(d)
        self.box, self.cls, self.k = nn.Conv2d(d, 4, 1), nn.Conv2d(d, classes, 1), 5
        ys, xs = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
        self.register_buffer("anchors", torch.stack((xs, ys)).view(2, -1))

    def forward(self, image):
        f = self.body(image)
        f = f + self.at(f)
        lt, rb = self.box(f).flatten(2).chunk(2, 1)
        boxes = torch.cat((self.anchors - lt, self.anchors + rb), 1).transpose(1, 2) * 4
        scores = self.cls(f).flatten(2).transpose(1, 2).sigmoid()
        best, where = scores.amax(-1).topk(self.k)
        return boxes.gather(1, where[..., None].expand(-1, -1, 4)), best


module = Yolo().eval()
examples = [(torch.randn(1, 3, 32, 32),) for _ in range(2)]
