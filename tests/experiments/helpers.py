"""Small random data in the formats that the loaders read."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from accaware.experiments.batches import seed_of
from accaware.experiments.data import Images
from accaware.experiments.results import Run
from accaware.formats import IntFormat


def random_images(count: int, key: int, size: int = 32) -> Images:
    """Random pixels whose brightness tells the label (0, 1 or 2)."""
    random = np.random.default_rng(seed_of(0, key))
    labels = random.integers(0, 3, count)
    labels[:3] = [0, 1, 2]
    pixels = random.integers(0, 100, (count, 3, size, size)) + 70 * labels[:, None, None, None]
    return Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))


def write_parquet(file: Path, images: Images) -> None:
    """In the schema of `uoft-cs/cifar10`."""
    rows = []
    for pixels in images.pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "WEBP", lossless=True)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(rows, kind), "label": images.labels.tolist()}), file)


def made_up(value: float, width: int, layers: Iterable[tuple[str, int, IntFormat]] = (), **changes: Any) -> Run:
    """A run with that value and that accumulator: `changes` name what is not as always in its result or configuration.

    layers: name, fan_in and codes of each.
    """
    config = {"command": "train", "acc_bits": [str(width)], "init": "search", "preload": "none", "lr": 0.01, "out": "x"}
    result = {"metric": "top1", "method": "projected", "weight_bits": 4, "act_bits": 4, "seed": 0, "epochs": 1.0}
    result |= {"model": "resnet20", "data": "cifar10", "split": "test", "holds": True, "bits_needed": width}
    result |= {"sparsity": 0.5, "seconds": 1.0, "steps": 10, "versions": {"accaware": "1"}, "commit": "c0ffee"}
    for name, change in changes.items():
        (config if name in config else result)[name] = change
    result |= {"acc_bits": width, result["metric"]: value, f"float_{result['metric']}": 91.73}
    about = [{"name": n, "fan_in": k, "codes": [c.lo, c.hi], "utilisation": 0.75} for n, k, c in layers]
    return Run(config, result, about)
