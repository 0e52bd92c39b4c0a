"""Batches made by tensor operations on whole batches.

The order of epoch e and the augmentation of its step i are pure functions of (seed, e, i), and of nothing else: a run
that resumes in the middle of an epoch sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from accaware.experiments.images import Images, Normalization
from accaware.experiments.tasks import CLASSIFICATION, Task

ORDER, AUGMENT, CALIBRATE, STEP = 0, 1, 2, 3  # what a stream of random numbers is for


def seed_of(seed: int, *key: int) -> int:
    """A seed in [0, 2^63) that depends on `seed` and `key` only (all >= 0)."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator whose stream depends on `seed` and `key` only (all >= 0)."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def normalize(pixels: Tensor, normalization: Normalization) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 (pixel / 255 - mean) / std, channels last."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in astuple(normalization))
    x = pixels.to(torch.float32, memory_format=torch.channels_last)
    return x.mul_(1 / (255 * std)).sub_(mean / std)


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of all steps of a run, as a function of the step.

    `part` of `parts`: which rows of every batch this process takes, so that the union over the processes is the batch
    that a single process would see. The last rows of an epoch that do not fill a batch are left out. `crop_pad` and
    `side`: what the task's `augment` takes. `device`: where the batches are made (None: where the images lie).
    Raises `ValueError` where the batch is larger than the data or cannot be shared out evenly.
    """

    images: Images
    batch_size: int
    seed: int
    normalization: Normalization
    part: int = 0
    parts: int = 1
    task: Task = CLASSIFICATION
    crop_pad: float = 0.0625
    side: int = 32
    device: torch.device | None = None

    def __post_init__(self) -> None:
        size, most = self.batch_size, len(self.images)
        if not 1 <= size <= most:
            raise ValueError(f"batch_size must lie in [1, {most}] (the training set), not {size}")
        if size % self.parts:
            raise ValueError(f"batch_size {size} must be divisible by the {self.parts} processes")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return len(self.images) // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in `epoch`, int64 [N]."""
        return torch.randperm(len(self.images), generator=generator(self.seed, ORDER, epoch))

    def batch(self, step: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(float32 [B, 3, H, W], targets) of global step `step`; `order` saves drawing the permutation again."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = (self.order(epoch) if order is None else order)[index * self.batch_size : (index + 1) * self.batch_size]
        chosen = self.images.rows(rows)
        chosen = chosen if self.device is None else chosen.to(self.device)
        random = generator(self.seed, AUGMENT, epoch, index)
        pixels, labels = self.task.augment(chosen.pixels, chosen.labels, self.crop_pad, self.side, random)
        mine = slice(self.part, None, self.parts)
        return normalize(pixels[mine], self.normalization), self.task.target(labels[mine])

    def stream(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps first, ..., last - 1; a thread makes the next one while one is used."""
        batches = self._made(first, last)
        with ThreadPoolExecutor(1) as worker:
            following = worker.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = worker.submit(next, batches, None)
                yield batch

    def _made(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        known, order = -1, torch.empty(0)
        for step in range(first, last):
            epoch = step // self.steps_per_epoch
            if epoch != known:
                known, order = epoch, self.order(epoch)
            yield self.batch(step, order)


@dataclass(frozen=True)
class EvalBatches:
    """All images once, in the order of the file, without augmentation."""

    images: Images
    batch_size: int
    normalization: Normalization
    task: Task = CLASSIFICATION

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.images), self.batch_size):
            chosen = self.images.rows(slice(first, first + self.batch_size))
            yield normalize(chosen.pixels, self.normalization), self.task.target(chosen.labels)


def calibration_images(images: Images, count: int, seed: int) -> Images:
    """`count` rows drawn without replacement, or all of them where there are fewer."""
    order = torch.randperm(len(images), generator=generator(seed, CALIBRATE))
    return images.rows(order[:count])
