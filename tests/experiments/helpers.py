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
from accaware.experiments.images import Images
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


def made_up(value: float, bits: int, layers: Iterable[tuple[str, int, IntFormat]] = (), **changes: Any) -> Run:
    """A run with that value, of an accumulator of so many bits: `changes` name what is not as always.

    layers: name, fan_in and codes of each.
    """
    config = {"command": "train", "acc_bits": [str(bits)], "init": "search", "preload": "none", "lr": 0.01, "out": "x"}
    config |= {"width": 1.0}
    result = {"metric": "top1", "method": "projected", "weight_bits": 4, "act_bits": 4, "seed": 0, "epochs": 1.0}
    result |= {"model": "resnet20", "data": "cifar10", "split": "test", "holds": True, "bits_needed": bits}
    result |= {"sparsity": 0.5, "seconds": 1.0, "steps": 10, "versions": {"accaware": "1"}, "commit": "c0ffee"}
    for name, change in changes.items():
        (config if name in config else result)[name] = change
    result |= {"acc_bits": bits, result["metric"]: value, f"float_{result['metric']}": 91.73}
    about = [{"name": n, "fan_in": k, "codes": [c.lo, c.hi], "utilisation": 0.75} for n, k, c in layers]
    return Run(config, result, about)


def bsds_folder(root: Path) -> Path:
    """Six training and two test images like those of BSDS300, in its folders."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        folder = root / "images" / split
        folder.mkdir(parents=True)
        for index in range(count):
            size = (481, 321) if index % 2 else (321, 481)
            small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
    return root


def imagenet_folder(root: Path, classes: int = 3) -> Path:
    """Images of 80 pixels whose colour tells the class, in ImageNet's folders."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 150, (9, 10, 3), dtype=np.uint8) + np.uint8(50 * label)
                image = Image.fromarray(pixels).resize((90, 80), Image.Resampling.NEAREST)
                image.save(folder / f"{index}.JPEG")
    return root
