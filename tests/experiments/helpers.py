"""Small random data in the formats that the loaders read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from accaware.experiments.batches import seed_of
from accaware.experiments.data import Images


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
