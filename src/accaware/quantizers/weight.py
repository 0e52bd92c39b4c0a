"""What every weight quantizer shares: rows in, rows on the grid out, integers for deployment, a first scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from accaware.bounds import Budget
from accaware.formats import IntFormat, Spec
from accaware.projections import holds, project_integers

__all__ = ["WeightQuantizer", "scale_ratios"]

_TINY = 1e-10


def scale_ratios(qmax: int) -> list[float]:
    """Scales to try, relative to max|w| / qmax, for integers up to qmax.

    A narrow budget affords few units, so it wants them large: up to max|w|, where nothing but -1, 0 and 1 is left. Fine
    steps where an ample one has its best scale, coarse ones beyond.
    """
    fine, octaves = torch.logspace(-1.6, 1.5, 94, base=2.0), math.log2(qmax)
    return [*fine.tolist(), *torch.logspace(1.6, octaves, max(0, round(10 * (octaves - 1.5))), base=2.0).tolist()]


class WeightQuantizer(nn.Module):
    """Quantizes rows of weights [C, parts, T] (`accaware.rows.Rows`).

    `scale` is positive, one for each channel [C, 1, 1] or one for the tensor [1, 1, 1]. Subclasses define `forward`
    (differentiable, float) and `integers` (the codes, in the dtype of the rows). `bind` tells what the input codes are
    and with them the budget; nothing is quantized before.
    """

    valid: Tensor | None

    def __init__(self, spec: Spec, channels: int, parts: int) -> None:
        super().__init__()
        self.spec, self.parts, self.where = spec, parts, ""
        self.form = spec.weight_format
        self.codes: IntFormat | None = None
        self.budget: Budget | None = None
        self.register_buffer("valid", None, persistent=False)  # a buffer: it moves with the weights
        self.channels = channels if spec.per_channel else 1

    def bind(self, codes: IntFormat, budget: Budget, valid: Tensor | None, where: str = "") -> None:
        """Fix the input codes, the budget of each part and which entries of the rows are taps (None: all).

        where: the layer's name, for messages. Raises `ValueError` where the method's own bound allows no weight.
        """
        self.codes, self.budget, self.valid, self.where = codes, budget, valid, where

    def step(self) -> Tensor:
        """The scale s > 0."""
        raise NotImplementedError

    def integers(self, rows: Tensor) -> Tensor:
        """[C, parts, T] -> integer codes of the same shape and dtype."""
        raise NotImplementedError

    def initialise(self, rows: Tensor, importance: Tensor | None, init: str) -> Tensor:
        """Choose the first scale (and whatever else is learned) for these rows; returns the rows to start from.

        importance: [C, parts, T] or None, the weight of each tap's squared error. init: "search" for the scale of
        smallest error, "ep" or "none" for max|w| / qmax.
        """
        base = rows.abs().amax((1, 2), keepdim=True)
        base = (base if self.channels > 1 or rows.shape[0] == 1 else base.amax(0, keepdim=True)) / self.form.hi
        base = base.clamp(min=_TINY)
        self.set_step(base)
        if init == "search":
            best = torch.full_like(base, float("inf"))
            scale = base.clone()
            for ratio in scale_ratios(self.form.hi):
                self.set_step(base * ratio)
                error = (self.start(rows) - rows).square()
                error = (error if importance is None else error * importance).sum((1, 2), keepdim=True)
                error = error.sum_to_size(base.shape)
                scale = torch.where(error < best, base * ratio, scale)
                best = torch.minimum(error, best)
            self.set_step(scale)
        return rows

    def set_step(self, scale: Tensor) -> None:
        """Set the scale, [C, 1, 1] or [1, 1, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, rows: Tensor) -> Tensor:
        """What the quantizer would make of these rows at its present scale when training starts."""
        return self.integers(rows) * self.step()

    @torch.no_grad()
    def deploy(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers to deploy: computed in float64, checked in integers, projected where a budget broke.

        Returns the codes [C, parts, T] int64, the scale [C, 1, 1] float64 and which parts were repaired [C, parts].
        Raises `ValueError` for weights or learned scales that are not finite, which have no closest integers.
        """
        assert self.budget is not None
        if not all(bool(values.isfinite().all()) for values in (rows, *self.parameters())):
            at = f"{self.where}: " if self.where else ""
            raise ValueError(f"{at}its weights and their scales must be finite; some are NaN or infinite")
        q = self.integers(rows.double())
        scale = self.step().double().expand(rows.shape[0], 1, 1)
        broken = ~holds(q, self.budget)
        if bool(broken.any()):
            q = torch.where(broken.unsqueeze(-1), project_integers(q, self.budget, self.form.hi), q)
        return q.long(), scale, broken
