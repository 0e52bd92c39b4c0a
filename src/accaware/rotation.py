"""Rotation of the inputs of linear layers, which spreads outliers over many taps (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hadamard", "turned"]


def hadamard(features: int) -> Tensor:
    """An orthogonal matrix [b, b], b the largest power of 2 that divides `features`: Hadamard's, with random signs.

    Without signs, one coefficient would hold the mean of all inputs, which after a ReLU or GELU is large. The signs are
    the same for the same b.
    """
    size = features & -features
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    turn: Tensor = signs * matrix / size**0.5
    return turn


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., K] with every b neighbouring features times the matrix [b, b]; x . w stays where both are."""
    return torch.matmul(x.reshape(*x.shape[:-1], -1, len(rotation)), rotation.to(x.dtype)).flatten(-2)
