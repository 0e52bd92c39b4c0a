"""What a model is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["call", "feeds", "operand"]


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a tensor, on a tuple of its arguments, or on a mapping of its keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def operand(layer: str, args: tuple[Any, ...]) -> Tensor:
    """What `layer`, its name, was called with. Raises `ValueError` where its input came by keyword."""
    if not args:
        raise ValueError(f"{layer}: called with its input by keyword; a layer takes it by position, as in {layer}(x)")
    return cast(Tensor, args[0])


def feeds(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """What to `call` the model with, batch by batch, on `device`.

    batches: tensors, mappings of keyword arguments, or tuples (lists) that start with either. The rows of a mapping
    with an `attention_mask` [B, L] come by their lengths, those of the same length together and without their padding,
    which is no data. Raises `TypeError` for one batch that stands where several should.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be several, such as a list of them, not one {type(batches).__name__}")
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(inputs, Mapping):
            yield inputs.to(device)
            continue
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        mask = inputs.get("attention_mask")
        yield from [inputs] if mask is None or bool(mask.all()) else _by_length(inputs, mask.bool())


def _by_length(inputs: dict[str, Any], mask: Tensor) -> Iterator[dict[str, Any]]:
    lengths = mask.sum(1)
    for length in set(lengths.tolist()):
        rows = lengths == length

        def part(value: Any, rows: Tensor = rows, length: int = length) -> Any:
            if not isinstance(value, Tensor) or value.shape[:1] != mask.shape[:1]:
                return value
            if value.shape[:2] != mask.shape:
                return value[rows]
            return value[rows][mask[rows]].reshape(-1, length, *value.shape[2:])

        if length:
            yield {name: part(value) for name, value in inputs.items()}
