"""What a file says of its own registers: the request that it was made for travels in its metadata.

Under the key "accaware" an ONNX model holds JSON: for every operation its accumulator, its start values and whether it
is part of the request, and the certificate of the network that was exported. The certificate is for reading; `certify`
and `check` prove anew, from the integers of the file.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from accaware.certify.certificate import Certificate
from accaware.certify.targets import Target
from accaware.formats import Accumulator
from accaware.integer.layer import IntegerLayer
from accaware.onnx.read import Product

__all__ = ["KEY", "Carried", "carried", "metadata"]

KEY = "accaware"
SCHEMA = 1
_ASSUMES = (
    "Codes less their zero points; one running sum that starts at the start value, which is subtracted afterwards; "
    "int32 for operations of which the file says nothing."
)


@dataclass(frozen=True, slots=True)
class Carried(Target):
    """The register of one operation, as its file says. preload: integers, row by row, tile by tile; () for all 0."""

    preload: tuple[int, ...] = ()
    inside: bool = True

    def layer(self, product: Product) -> IntegerLayer:
        """The integers that this register adds, from its start values. Raises `ValueError` where those do not fit."""
        layer = replace(Target.layer(self, product), inside=self.inside)
        if not self.preload:
            return layer
        if product.bias is not None and layer.accumulator.tile is None:
            raise ValueError("its register cannot start from both its bias and the start values of the file")
        shape = (len(layer.rows), len(layer.tiles)) if layer.accumulator.tile else (len(layer.rows),)
        if len(self.preload) != np.prod(shape):
            raise ValueError(f"the file has {len(self.preload)} start values for registers {list(shape)}")
        return replace(layer, preload=np.array(self.preload, object).reshape(shape))


def metadata(layers: Mapping[str, IntegerLayer], certificate: Certificate, floats: Iterable[str] = ()) -> str:
    """What a file carries. layers: by the names of their operations in the file. floats: operations without integers,
    which nobody asked for.
    """
    operations = {
        name: {
            "register": asdict(replace(layer.accumulator, preload="none")),
            "preload": layer.preload.ravel().tolist() if layer.preload.any() else [],
            "inside": layer.inside,
        }
        for name, layer in layers.items()
    }
    register = asdict(Accumulator(32))  # of none
    operations |= {name: {"register": register, "preload": [], "inside": False} for name in floats}
    return json.dumps({"schema": SCHEMA, "operations": operations, "certificate": json.loads(certificate.to_json())})


def carried(properties: Mapping[str, str]) -> dict[str, Carried]:
    """The registers by operation that a model's metadata names; nothing where it is of another origin.

    Raises `ValueError` for metadata that `metadata` did not write.
    """
    if KEY not in properties:
        return {}
    try:
        data = json.loads(properties[KEY])
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("operations"), dict):
            raise ValueError(f"it must be of schema {SCHEMA} and name operations")
        return {name: _register(name, entry) for name, entry in data["operations"].items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"metadata {KEY!r} is damaged: {error}") from error


def _register(name: str, entry: Any) -> Carried:
    fields = {"register": dict, "preload": list, "inside": bool}
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise ValueError(f"operation {name!r} must have {', '.join(fields)}")
    for field, kind in fields.items():
        if not isinstance(entry[field], kind):
            raise ValueError(f"{field} of operation {name!r} must be {kind.__name__}, not {reprlib.repr(entry[field])}")
    start = _integers(name, entry["preload"])
    return Carried("file", Accumulator(**entry["register"]), False, "inside", "", _ASSUMES, "", start, entry["inside"])


def _integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    start = tuple(values)
    if any(type(v) is not int for v in start):
        raise ValueError(f"preload of operation {name!r} must be integers")
    return start if any(start) else ()
