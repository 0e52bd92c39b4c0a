"""The ResNets of He et al. (arXiv 1512.03385) for ImageNet, and their CIFAR form, under torchvision's parameter names.

A state dict of torchvision's resnet18, resnet34 or resnet50 loads as it is: `conv1`, `bn1`, `layer1.0.conv1`, ...,
`layer2.0.downsample.0`, `fc`. As there, the stride of a bottleneck lies in its 3x3 convolution.

The CIFAR form has a 3x3 stem of stride 1 and no max-pool. `QuantIdentity` marks the residual stream, as in
`resnet_cifar`; for ImageNet it keeps 8 bits, which the convolutions that read it then round to their own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accaware.layers import QuantIdentity


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a 1x1 convolution changes the shape of the shortcut where needed."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.out_quant = QuantIdentity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.out_quant(F.relu(y + self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = _shortcut(in_channels, 4 * channels, stride)
        self.out_quant = QuantIdentity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, 4 channels, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.out_quant(F.relu(y + self.downsample(x)))


class ResNet(nn.Module):
    """Four stages of `blocks` blocks with 64, 128, 256 and 512 channels (times the block's expansion)."""

    keep: ClassVar = {"conv1": 8, "fc": 8}

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv1, self.maxpool = self._stem()
        self.bn1 = nn.BatchNorm2d(64)
        self.out_quant = QuantIdentity()
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.fc = nn.Linear(512 * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stem(self) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Float images [B, 3, H, W] -> logits [B, classes]."""
        x = self.out_quant(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ImageNetResNet(ResNet):
    """With a 7x7 stem of stride 2 and a max-pool, for images of 224 pixels; residual streams at 8 bits."""

    keep: ClassVar = {"conv1": 8, "fc": 8, "*out_quant": 8}

    def _stem(self) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, padding=1)


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)))


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def resnet18_cifar(classes: int = 10) -> ResNet:
    """ResNet18 for images of 32 pixels, 11.2 M parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet18(classes: int = 1000) -> ImageNetResNet:
    """11.7 M parameters."""
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet34(classes: int = 1000) -> ImageNetResNet:
    """21.8 M parameters."""
    return ImageNetResNet(BasicBlock, (3, 4, 6, 3), classes)


def resnet50(classes: int = 1000) -> ImageNetResNet:
    """25.6 M parameters."""
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), classes)
