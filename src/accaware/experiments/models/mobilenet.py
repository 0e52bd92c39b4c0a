"""MobileNetV1 (Howard et al., arXiv 1704.04861) in its CIFAR form: the stem has stride 1, the rest is the paper's.

A 3x3 stem and thirteen blocks of a depthwise 3x3 and a pointwise 1x1 convolution, each followed by batch-norm and ReLU;
images of 32 pixels end as 2x2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Output channels and stride of each block (table 1 of the paper).
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class Block(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]."""
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class MobileNetV1(nn.Module):
    """`width` multiplies the channels of every layer, rounded to a multiple of 8."""

    keep: ClassVar = {"conv1": 8, "linear": 8}

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        channels = _scaled(32, width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for count, stride in BLOCKS:
            blocks.append(Block(channels, _scaled(count, width), stride))
            channels = _scaled(count, width)
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Float images [B, 3, H, W] -> logits [B, classes]."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width / 8) * 8)
