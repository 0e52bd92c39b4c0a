"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2) with parameter-free shortcuts (option A).

A 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels, global average pooling and one
linear layer: 6n + 2 layers. Parameter names are those of the widely used `conv1`, `layer1.0.conv1`, ..., `linear`.

The residual stream is integer too: a `QuantIdentity` marks it after the stem and after each block, where `prepare_`
puts the one quantizer that all its readers share. Before `prepare_` it is the identity.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accaware.layers import QuantIdentity


class Shortcut(nn.Module):
    """Option A: every second row and column, and new channels that are zero, half of them on either side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch-norm, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut: nn.Module = nn.Identity() if same else Shortcut(in_channels, channels, stride)
        self.out_quant = QuantIdentity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.out_quant(F.relu(y + self.shortcut(x)))


class ResNet(nn.Module):
    """A CIFAR ResNet with `blocks` basic blocks in each of its three stages."""

    keep: ClassVar = {"conv1": 8, "linear": 8}

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.out_quant = QuantIdentity()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Float images [B, 3, H, W] -> logits [B, classes]."""
        x = self.out_quant(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10) -> ResNet:
    """20 layers, 0.27 M parameters."""
    return ResNet(3, classes)


def resnet32(classes: int = 10) -> ResNet:
    """32 layers, 0.46 M parameters."""
    return ResNet(5, classes)


def resnet44(classes: int = 10) -> ResNet:
    """44 layers, 0.66 M parameters."""
    return ResNet(7, classes)


def resnet56(classes: int = 10) -> ResNet:
    """56 layers, 0.85 M parameters."""
    return ResNet(9, classes)
