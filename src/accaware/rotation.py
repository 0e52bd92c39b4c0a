"""Rotation of the inputs of linear layers, which spreads outliers over many taps (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hadamard", "turned"]

_LARGEST = 256  # features that are mixed: more cost more and spread outliers hardly further


def hadamard(features: int) -> Tensor:
    """An orthogonal matrix [b, b], b the largest power of 2, up to 256, that divides `features`.

    It is Hadamard's, its rows with the signs of the Rudin-Shapiro sequence: the transform of these is flat, so the mean
    of all inputs, which after a ReLU or GELU is large, is spread too.
    """
    size = min(features & -features, _LARGEST)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor([(-1.0) ** (i & i >> 1).bit_count() for i in range(size)])
    turn: Tensor = signs.unsqueeze(1) * matrix / size**0.5
    return turn


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., K] with every b neighbouring features times the matrix [b, b], at least in float32; x . w stays."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(torch.unflatten(x, -1, (-1, len(rotation))), rotation.to(x)).flatten(-2)
