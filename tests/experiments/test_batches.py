"""Batches: a pure function of seed, epoch and step; augmentation against a loop over images."""

from __future__ import annotations

import threading

import pytest
import torch

from accaware.experiments.batches import (
    EvalBatches,
    TrainBatches,
    calibration_images,
    generator,
    normalize,
    seed_of,
)
from accaware.experiments.images import NORMALIZATIONS, Images
from accaware.experiments.tasks import augment
from experiments.helpers import random_images

NORM = NORMALIZATIONS["cifar10"]


def numbered(count: int) -> Images:
    """Images whose label is their row."""
    return Images(random_images(count, 3, size=16).pixels, torch.arange(count))


def test_normalisation_is_that_of_the_formula() -> None:
    pixels = random_images(4, 0, size=8).pixels
    got = normalize(pixels, NORM)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for colour in range(3):
        wanted = (pixels[:, colour].double() / 255 - NORM.mean[colour]) / NORM.std[colour]
        torch.testing.assert_close(got[:, colour].double(), wanted, atol=2e-6, rtol=0)


def test_augmentation_crops_and_flips_each_image() -> None:
    pixels = random_images(40, 0, size=32).pixels
    got = augment(pixels, 1 / 16, generator(5))
    offsets = set()
    for before, after in zip(pixels, got, strict=True):
        padded = torch.zeros(3, 36, 36, dtype=torch.uint8)
        padded[:, 2:34, 2:34] = before
        windows = {(y, x, f): padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5) for f in (0, 1)}
        found = [k for k, w in windows.items() if torch.equal(w.flip(2) if k[2] else w, after)]
        assert len(found) == 1
        offsets.add(found[0])
    assert {y for y, _, _ in offsets} == {x for _, x, _ in offsets} == set(range(5))
    assert {flip for *_, flip in offsets} == {0, 1}


def test_a_batch_depends_on_seed_epoch_and_step_only() -> None:
    images = numbered(50)
    one, two = TrainBatches(images, 8, 3, NORM), TrainBatches(images, 8, 3, NORM)
    streamed = list(one.stream(0, 13))
    torch.manual_seed(99)
    for step in (12, 5, 0):
        x, labels = two.batch(step)
        assert torch.equal(x, streamed[step][0])
        assert torch.equal(labels, streamed[step][1])
    for (x, labels), (x2, labels2) in zip(two.stream(7, 13), streamed[7:], strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(labels, labels2)
    assert not torch.equal(TrainBatches(images, 8, 4, NORM).batch(0)[1], streamed[0][1])


def test_the_next_batch_is_made_while_one_is_used() -> None:
    made = threading.Event()

    class Watched(Images):
        asked = 0

        def rows(self, index: torch.Tensor | slice) -> Images:
            Watched.asked += 1
            if Watched.asked == 2:
                made.set()
            return super().rows(index)

    images = numbered(50)
    stream = TrainBatches(Watched(images.pixels, images.labels), 8, 3, NORM).stream(0, 3)
    next(stream)
    assert made.wait(30)
    assert len(list(stream)) == 2


def test_an_epoch_visits_every_row_once_and_each_epoch_differs() -> None:
    batches = TrainBatches(numbered(48), 8, 0, NORM)
    first, second = (torch.cat([y for _, y in batches.stream(e * 6, e * 6 + 6)]) for e in (0, 1))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(48))
    assert first.tolist() != second.tolist()


def test_each_epoch_and_step_augments_in_its_own_way() -> None:
    one = random_images(3, 3, size=16).pixels[:1].expand(48, -1, -1, -1)
    batches = TrainBatches(Images(one, torch.arange(48)), 8, 0, NORM)
    seen = {x.numpy().tobytes() for x, _ in batches.stream(0, 18)}
    assert len(seen) == 18


def test_the_processes_share_the_batch_out() -> None:
    images = numbered(50)
    whole = TrainBatches(images, 8, 0, NORM).batch(3)
    parts = [TrainBatches(images, 8, 0, NORM, part, 2).batch(3) for part in (0, 1)]
    for index in (0, 1):
        together = torch.stack([parts[0][index], parts[1][index]], 1).flatten(0, 1)
        assert torch.equal(together, whole[index])
    with pytest.raises(ValueError, match="batch_size 9 must be divisible by the 2 processes"):
        TrainBatches(images, 9, 0, NORM, 0, 2)


@pytest.mark.parametrize("size", [0, 51])
def test_a_batch_fits_the_data(size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 50\] \(the training set\), not {size}"):
        TrainBatches(numbered(50), size, 0, NORM)


def test_evaluation_visits_every_row_in_order() -> None:
    images = numbered(10)
    batches = EvalBatches(images, 4, NORM)
    assert len(batches) == 3
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in batches]), normalize(images.pixels, NORM))


def test_calibration_images_are_drawn_without_replacement() -> None:
    drawn = calibration_images(numbered(50), 20, 1).labels.tolist()
    assert len(set(drawn)) == 20
    assert drawn != list(range(20))
    assert drawn == calibration_images(numbered(50), 20, 1).labels.tolist()
    assert len(calibration_images(numbered(50), 1000, 1)) == 50


def test_keys_give_different_seeds() -> None:
    keys = [(s, *k) for s in range(5) for k in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (1,))]
    seeds = {seed_of(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
