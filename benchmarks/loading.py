"""Does reading and augmenting images keep a trainer waiting? Batches of each data set beside the steps they are for.

    python benchmarks/loading.py [--rounds 5] [--images 2000] [--device cpu]

CIFAR-10 for ResNet20, BSDS300 for ESPCN and ImageNet for ResNet50, W4A4 `projected`, at the sizes of images and batches
of the recipes (ImageNet on a CPU: 16). The pixels are random; those of ImageNet lie in a file mapped into memory as the
cache's do, `--images` of them. A thread makes the next batch while a step runs. Also: how many JPEG images of 500 x 375
a second are decoded into that cache, once.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from timing import alternate, report
from torch import Tensor
from training_step import ours, step

import accaware as aa
from accaware.experiments.batches import TrainBatches
from accaware.experiments.images import NORMALIZATIONS, Images, decode, mapped
from accaware.experiments.models import build
from accaware.experiments.tasks import CLASSIFICATION, SUPER_RESOLUTION

SPEC = aa.Spec(4, 4, 12)


def random_pixels(*shape: int) -> Tensor:
    """uint8."""
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "imagenet.npy")
        np.save(file, random_pixels(options.images, 3, 224, 224).numpy())
        photos = torch.from_numpy(np.load(file, mmap_mode="c"))
        low, high = random_pixels(200, 3, 107, 107), random_pixels(200, 3, 321, 321)
        cases = {
            "CIFAR-10, ResNet20": (
                "resnet20",
                Images(random_pixels(50000, 3, 32, 32), torch.zeros(50000).long()),
                128,
                32,
            ),
            "BSDS300, ESPCN": ("espcn", Images(low, high), 16, 48),
            "ImageNet, ResNet50": (
                "resnet50",
                Images(photos, torch.zeros(options.images).long()),
                64 if device.type == "cuda" else 16,
                224,
            ),
        }
        for name, (model, images, size, side) in cases.items():
            task = SUPER_RESOLUTION if model == "espcn" else CLASSIFICATION
            data = images if model == "resnet50" else images.to(device)
            batches = TrainBatches(data, size, 0, NORMALIZATIONS["imagenet"], task=task, side=side, device=device)
            stream, steps = batches.stream(0, 10**9), itertools.count()
            pixels, labels = next(stream)
            network = ours(build(model, None if model == "espcn" else 1000).to(device), SPEC, pixels)
            candidates = {
                "step": step(network, pixels, labels, None, task.loss),
                "waiting for its batch": partial(next, stream),
                "making a batch": lambda batches=batches, steps=steps: batches.batch(next(steps)),
            }
            seconds = alternate(candidates, options.rounds)
            report(f"{name}, batches of {size}", seconds, ["step"])
        decoding(Path(folder))


def decoding(folder: Path, count: int = 400) -> None:
    """Print how fast the cache is filled."""
    buffer = io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    start = time.perf_counter()
    mapped([buffer.getvalue()] * count, 224, lambda jpeg: decode(jpeg, 224, 256), "benchmark")
    Console().print(f"decoded, resized and kept: {count / (time.perf_counter() - start):.0f} images a second")


if __name__ == "__main__":
    main()
