"""Two networks for super-resolution by a factor of 3, from RGB images in [0, 1] to RGB images.

They enlarge by nearest neighbours followed by a convolution: the integers of a nearest-neighbour copy are those that it
copies, so nothing but convolutions accumulates.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from accaware.layers import QuantIdentity

SCALE = 3


def _initialise(model: nn.Module) -> None:
    """He et al. 2015."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class ESPCN(nn.Module):
    """The network of Shi et al. (arXiv 1609.05158) as A2Q and A2Q+ train it: three convolutions, then a resize one.

    Feature maps of 64, 64 and 32 channels with batch-norm.
    """

    keep: ClassVar = {"conv1": 8, "conv4": 8}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.conv4 = nn.Conv2d(32, 3, 3, padding=1)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, 3 H, 3 W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.conv4(F.interpolate(x, scale_factor=SCALE, mode="nearest"))


class Double(nn.Sequential):
    """Two 3x3 convolutions, each with batch-norm and ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            *(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        )


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) of three levels whose skips are added, not concatenated.

    Levels of 32, 64 and 128 channels; max-pools on the way down, resize convolutions on the way up and to the output.
    `QuantIdentity` marks what a skip shares with the next level.
    """

    keep: ClassVar = {"down1.0": 8, "head": 8}

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Double(3, 32), Double(32, 64), Double(64, 128)
        self.skip1, self.skip2 = QuantIdentity(), QuantIdentity()
        self.up2, self.up1 = _resize(128, 64), _resize(64, 32)
        self.merge2, self.merge1 = Double(64, 64), Double(32, 32)
        self.head = nn.Conv2d(32, 3, 3, padding=1)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, 3 H, 3 W], for any H and W of at least 4."""
        skip1 = self.skip1(self.down1(x))
        skip2 = self.skip2(self.down2(F.max_pool2d(skip1, 2)))
        x = self.down3(F.max_pool2d(skip2, 2))
        x = self.merge2(self.up2(F.interpolate(x, size=skip2.shape[-2:], mode="nearest")) + skip2)
        x = self.merge1(self.up1(F.interpolate(x, size=skip1.shape[-2:], mode="nearest")) + skip1)
        return self.head(F.interpolate(x, scale_factor=SCALE, mode="nearest"))


def _resize(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
