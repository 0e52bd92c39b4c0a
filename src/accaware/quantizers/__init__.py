"""Quantizers of activations and of weights, by the name of their method."""

from __future__ import annotations

from accaware.formats import Spec
from accaware.quantizers.a2q import A2QQuantizer
from accaware.quantizers.activation import ActivationQuantizer
from accaware.quantizers.projected import BaselineQuantizer, ProjectedQuantizer
from accaware.quantizers.weight import WeightQuantizer

__all__ = [
    "A2QQuantizer",
    "ActivationQuantizer",
    "BaselineQuantizer",
    "ProjectedQuantizer",
    "WeightQuantizer",
    "weight_quantizer",
]


def weight_quantizer(spec: Spec, channels: int, parts: int) -> WeightQuantizer:
    """The weight quantizer of `spec.method`."""
    if spec.method == "projected":
        return ProjectedQuantizer(spec, channels, parts)
    if spec.method == "baseline":
        return BaselineQuantizer(spec, channels, parts)
    return A2QQuantizer(spec, channels, parts, centred=spec.method == "a2q+")
