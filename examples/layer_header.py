"""One layer of a run as the tables that layer.c reads: python layer_header.py runs/p12 layer1.0.conv1 > layer.h"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from accaware.experiments.job import load_run, sample_input
from accaware.integer.network import IntegerOp, integer_network


def header(op: IntegerOp) -> str:
    """The text of layer.h. Layers of one group; rows are taps by input channel, then by place in the kernel."""
    layer = op.layer
    if op.options.get("groups", 1) != 1 or "Transpose" in op.kind or layer.accumulator.tile is not None:
        raise ValueError(f"{layer.name}: layer.c shows one running sum over all inputs, without groups or tiles")
    channels, taps = layer.rows.shape
    lines = [
        f"#define ACC_BITS {layer.accumulator.bits}",
        f"#define CHANNELS {channels}",
        f"#define TAPS {taps}",
        f"static const int8_t WEIGHTS[CHANNELS][TAPS] = {_braces(layer.rows)};",
        f"static const int64_t PRELOAD[CHANNELS] = {_braces(layer.starts[:, 0])};",
        f"static const float RESCALE[CHANNELS] = {_braces(op.rescale.cpu().numpy())};",
        f"static const float SHIFT[CHANNELS] = {_braces(op.shift.cpu().numpy())};",
    ]
    return "\n".join([*lines, ""])


def _braces(values: Any) -> str:
    if np.ndim(values):
        return "{" + ", ".join(map(_braces, values)) + "}"
    return f"{values:.9e}f" if isinstance(values, np.floating) else str(values)


if __name__ == "__main__":
    run, name = Path(sys.argv[1]), sys.argv[2]
    network = integer_network(load_run(run), sample_input(run))
    print(header(network.get_submodule(name)), end="")
