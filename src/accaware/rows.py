"""Rows: which taps of a weight tensor one accumulator adds.

A weight becomes [channels, parts, taps]: a part is what one register sums from its start to its spill, that is a whole
output channel, or one phase of a strided transposed convolution, or one tile of either. Short parts are padded with
zeros, which no budget feels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accaware.formats import Order

__all__ = ["Rows", "convolution_rows", "residues_of_taps", "transposed_rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A fixed gather of a weight tensor into rows and back.

    `index`: [C, phases, K] positions in the flattened weight, -1 where a phase has fewer taps than the longest one;
    None where row c simply is weight[c]. `tile`: products per inner sum, or None.
    """

    shape: tuple[int, ...]
    index: Tensor | None
    channels: int
    phases: int
    fan_in: int
    tile: int | None = None

    @property
    def tiles(self) -> int:
        """Inner sums per phase."""
        return -(-self.fan_in // self.tile) if self.tile else 1

    @property
    def parts(self) -> int:
        """Inner sums per output channel."""
        return self.phases * self.tiles

    def split(self, weight: Tensor) -> Tensor:
        """weight -> [C, parts, T]."""
        if self.index is None:
            rows = weight.reshape(self.channels, 1, self.fan_in)
        else:
            index = self.index.to(weight.device)
            rows = torch.where(index < 0, 0, weight.reshape(-1)[index.clamp(min=0)])
        if self.tiles == 1:
            return rows
        assert self.tile is not None
        padded = torch.nn.functional.pad(rows, (0, self.tiles * self.tile - self.fan_in))
        return padded.reshape(self.channels, self.parts, self.tile)

    def merge(self, rows: Tensor) -> Tensor:
        """[C, parts, T] -> weight; the inverse of `split`."""
        rows = self.join(rows)
        if self.index is None:
            return rows.reshape(self.shape)
        index = self.index.to(rows.device)
        used = index >= 0
        return rows.new_zeros(self._numel()).index_put((index[used],), rows[used]).reshape(self.shape)

    def join(self, rows: Tensor) -> Tensor:
        """[C, parts, T] -> [C, phases, K]: tiles strung together, their padding cut off."""
        return rows.reshape(self.channels, self.phases, -1)[..., : self.fan_in]

    def valid(self, device: torch.device) -> Tensor | None:
        """[C, parts, T] of bool: which entries are taps; None where all are."""
        if self.tiles == 1 and (self.index is None or bool((self.index >= 0).all())):
            return None
        return self.split(torch.ones(self.shape, device=device)) > 0

    def _numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def convolution_rows(shape: Sequence[int], order: Order = "chw", tile: int | None = None) -> Rows:
    """Rows of a linear layer [out, in] or a convolution [out, in/groups, *kernel], taps numbered in `order`."""
    shape = tuple(shape)
    fan_in = int(torch.Size(shape[1:]).numel())
    index = None
    if order == "hwc" and len(shape) > 2:
        positions = torch.arange(torch.Size(shape).numel()).reshape(shape)
        index = positions.movedim(1, -1).reshape(shape[0], 1, fan_in)
    return Rows(shape, index, shape[0], 1, fan_in, _inner(tile, fan_in))


def transposed_rows(
    shape: Sequence[int],
    groups: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    order: Order = "chw",
    tile: int | None = None,
) -> Rows:
    """Rows of a transposed convolution, weight [in, out/groups, *kernel].

    Along one dimension, output o sums the taps k with (o + padding - k * dilation) divisible by the stride, so the
    taps fall into phases by (k * dilation) mod stride, and each output sums the taps of one phase only.
    """
    shape = tuple(shape)
    kernel = shape[2:]
    positions = torch.arange(torch.Size(shape).numel()).reshape(groups, shape[0] // groups, shape[1], *kernel)
    positions = positions.movedim(2, 1).flatten(0, 1)  # [out, in/groups, *kernel]
    residues = residues_of_taps(kernel, stride, dilation)
    phases = []
    for phase in itertools.product(*residues):
        taps = positions
        for dim, (residue, size, s, d) in enumerate(zip(phase, kernel, stride, dilation, strict=True)):
            taps = taps.index_select(dim + 2, torch.tensor([k for k in range(size) if k * d % s == residue]))
        phases.append((taps.movedim(1, -1) if order == "hwc" else taps).flatten(1))
    fan_in = max(p.shape[1] for p in phases)
    index = torch.stack([torch.nn.functional.pad(p, (0, fan_in - p.shape[1]), value=-1) for p in phases], dim=1)
    return Rows(shape, index, index.shape[0], len(phases), fan_in, _inner(tile, fan_in))


def residues_of_taps(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[list[int]]:
    """Along every dimension the values that (k * dilation) mod stride takes, ascending: one for each phase."""
    return [sorted({k * d % s for k in range(size)}) for size, s, d in zip(kernel, stride, dilation, strict=True)]


def _inner(tile: int | None, fan_in: int) -> int | None:
    return tile if tile is not None and tile < fan_in else None
