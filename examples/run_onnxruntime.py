"""Run an exported network with onnxruntime and numpy alone: python run_onnxruntime.py net.onnx [data.npz]

data.npz holds `images` as the network was trained to read them (normalized, float32) and maybe `labels`; without it,
one row of random numbers runs. Dialects qdq, qcdq and qoperator; qonnx files run in qonnx.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort


def main(path: str, data: str | None = None) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    if data is None:
        shape = [size if isinstance(size, int) else 1 for size in image.shape]  # the rows have no fixed number
        arrays = {"images": np.random.default_rng(0).standard_normal(shape, np.float32)}
    else:
        arrays = dict(np.load(data))
    images, labels = arrays["images"].astype(np.float32), arrays.get("labels")
    batches = [images[start : start + 100] for start in range(0, len(images), 100)]
    outputs = np.concatenate([session.run(None, {image.name: batch})[0] for batch in batches])
    if labels is None:
        print(outputs)
    else:
        print(f"top-1 {100 * (outputs.argmax(1) == labels).mean():.2f} % of {len(labels)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
