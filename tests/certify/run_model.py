"""Run a model on a batch: `run_model.py MODEL INPUTS.npz OUTPUTS.npz`; also on emulated processors of other kinds."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort


def main(model: str, inputs: str, outputs: str) -> None:
    """Write every output by its name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    with np.load(inputs) as feeds:
        np.savez(outputs, **dict(zip(names, session.run(names, dict(feeds)), strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
