"""Accumulator-aware quantization: integer networks whose dot products provably fit a narrow accumulator.

>>> import accaware as aa
>>> spec = aa.Spec(weight_bits=4, act_bits=4, acc_bits=12)

Names load lazily: asking for a bound or a certificate imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from accaware.certify.certificate import Certificate as Certificate
    from accaware.certify.emulation import emulate_file as emulate_file
    from accaware.certify.files import certify_file as certify_file
    from accaware.certify.model import certify as certify
    from accaware.certify.repair import repair_file as repair_file
    from accaware.certify.second import disagreements as disagreements
    from accaware.certify.targets import TARGETS as TARGETS
    from accaware.certify.targets import Target as Target
    from accaware.exporter.write import export as export
    from accaware.formats import Accumulator as Accumulator
    from accaware.formats import IntFormat as IntFormat
    from accaware.formats import Spec as Spec
    from accaware.initialise import bias_correct as bias_correct
    from accaware.initialise import equalize as equalize
    from accaware.integer.convert import integer_layers as integer_layers
    from accaware.integer.convert import wrapping as wrapping
    from accaware.integer.layer import IntegerLayer as IntegerLayer
    from accaware.integer.network import integer_network as integer_network
    from accaware.layers import QuantIdentity as QuantIdentity
    from accaware.prepare import calibrate as calibrate
    from accaware.prepare import penalty as penalty
    from accaware.prepare import prepare_ as prepare_
    from accaware.prepare import reestimate_batchnorm as reestimate_batchnorm
    from accaware.ptq.model import reconstruct as reconstruct

_HOMES = {
    "Accumulator": "formats",
    "Certificate": "certify.certificate",
    "IntFormat": "formats",
    "IntegerLayer": "integer.layer",
    "QuantIdentity": "layers",
    "Spec": "formats",
    "TARGETS": "certify.targets",
    "Target": "certify.targets",
    "bias_correct": "initialise",
    "calibrate": "prepare",
    "certify": "certify.model",
    "certify_file": "certify.files",
    "disagreements": "certify.second",
    "emulate_file": "certify.emulation",
    "equalize": "initialise",
    "export": "exporter.write",
    "integer_layers": "integer.convert",
    "integer_network": "integer.network",
    "penalty": "prepare",
    "prepare_": "prepare",
    "reconstruct": "ptq.model",
    "reestimate_batchnorm": "prepare",
    "repair_file": "certify.repair",
    "wrapping": "integer.convert",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'accaware' has no attribute {name!r}")
    return getattr(importlib.import_module(f"accaware.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
