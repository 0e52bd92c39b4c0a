"""Super-resolution: what is trained on, and how it is judged."""

from __future__ import annotations

import http.client
import io
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from accaware.experiments.batches import EvalBatches, TrainBatches, generator
from accaware.experiments.bsds300 import digest, download, pairs
from accaware.experiments.data import load
from accaware.experiments.images import NORMALIZATIONS, Images
from accaware.experiments.tasks import SUPER_RESOLUTION, paired_crops
from experiments.helpers import bsds_folder

NONE = NORMALIZATIONS["none"]


def test_psnr_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    target, output = torch.rand(2, 3, 20, 21), torch.rand(2, 3, 20, 21)
    output[:, :, :3] = 9.0  # the border does not count, and what lies outside [0, 1] is cut off
    output[0, 0, 10, 10] = 7.0
    got = SUPER_RESOLUTION.score(output, target)
    for one, (x, y) in zip(got, zip(output, target, strict=True), strict=True):
        inner = (x.clamp(0, 1) - y)[:, 3:-3, 3:-3].numpy().astype(np.float64)
        assert float(one) == pytest.approx(10 * math.log10(1 / (inner**2).mean()), rel=1e-6)
    assert float(SUPER_RESOLUTION.score(target, target).min()) == pytest.approx(100)
    with pytest.raises(ValueError, match=r"output has shape \[2, 3, 20, 20\]; \[2, 3, 20, 21\] is needed"):
        SUPER_RESOLUTION.check(output[..., 1:], target)


def test_crops_of_a_pair_show_the_same() -> None:
    low = torch.randint(256, (40, 3, 9, 11), dtype=torch.uint8)
    high = low.repeat_interleave(3, 2).repeat_interleave(3, 3)
    small, large = paired_crops(low, high, 4, generator(1))
    assert torch.equal(large, small.repeat_interleave(3, 2).repeat_interleave(3, 3))
    found = set()
    for before, after in zip(low, small, strict=True):
        for top in range(6):
            for left in range(8):
                for flip in ([], [1], [2], [1, 2]):
                    if torch.equal(before[:, top : top + 4, left : left + 4].flip(flip), after):
                        found.add((top, left, *flip))
    assert len(found) > 30
    assert {len(f) for f in found} == {2, 3, 4}
    with pytest.raises(ValueError, match=r"image_size must lie in \[1, 9\] .*, not 10"):
        paired_crops(low, high, 10, generator(1))


@pytest.mark.usefixtures("cache")
def test_batches_of_pairs(tmp_path: Path) -> None:
    data = load("bsds300", bsds_folder(tmp_path))
    assert (len(data.train), len(data.evaluation), data.classes, data.split) == (6, 2, None, "test")
    assert data.train.pixels.shape[1:] == (3, 107, 160)
    assert data.train.labels.shape[1:] == (3, 321, 480)
    assert (data.evaluation.pixels.shape[1:], data.evaluation.labels.shape[1:]) == ((3, 107, 107), (3, 321, 321))
    batches = TrainBatches(data.train, 4, 0, NONE, task=data.task, side=24)
    x, y = batches.batch(1)
    assert (x.shape, y.shape, y.dtype) == ((4, 3, 24, 24), (4, 3, 72, 72), torch.float32)
    assert torch.equal(x, batches.batch(1)[0])
    assert 0 <= float(y.min()) < float(y.max()) <= 1
    assert float(SUPER_RESOLUTION.score(F.interpolate(x, scale_factor=3, mode="bicubic"), y).mean()) > 20
    assert len(load("bsds300", tmp_path, val_size=2).evaluation) == 2


def test_upscaling_alone_gives_its_usual_quality(shared: Callable[[str], Path]) -> None:
    """Over the central squares of all test images 25.66 dB (bicubic) and 24.49 dB (nearest); here over 20 of them."""
    files = sorted(shared("data/BSDS300/images/test").glob("*.jpg"))[:20]
    images = pairs(files, (321, 321))
    wanted = {"bicubic": 26.061, "nearest": 24.775}
    for mode, value in wanted.items():
        scores = [
            SUPER_RESOLUTION.score(F.interpolate(x, scale_factor=3, mode=mode), y)
            for x, y in EvalBatches(images, 10, NONE, SUPER_RESOLUTION)
        ]
        assert float(torch.cat(scores).mean()) == pytest.approx(value, abs=0.02)


def test_portraits_are_transposed_and_small_images_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    high = pairs([tmp_path / "a.png"], (9, 6)).labels[0]
    assert np.array_equal(high.numpy(), pixels.transpose(2, 1, 0))
    with pytest.raises(ValueError, match=r"a\.png is 9x6; at least 9x9 is needed"):
        pairs([tmp_path / "a.png"], (9, 9))


def archive(folder: Path) -> str:
    """A packed copy of `folder`, as a URL."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, "BSDS300")
    (folder.parent / "packed.tgz").write_bytes(buffer.getvalue())
    return (folder.parent / "packed.tgz").as_uri()


def test_the_download_is_checked_and_kept(tmp_path: Path, cache: Path) -> None:
    folder = bsds_folder(tmp_path / "BSDS300")
    url, right = archive(folder), digest(folder / "images")
    with pytest.raises(ValueError, match=rf"have the checksum {right}, not 0000"):
        download(url, "0000")
    assert list(cache.iterdir()) == []
    assert sorted(p.name for p in (download(url, right) / "images" / "test").iterdir()) == ["0.jpg", "1.jpg"]
    assert download("file:///nowhere", right) == cache / "BSDS300"


def test_a_download_that_is_cut_off_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise http.client.IncompleteRead(b"abc", 10)

    monkeypatch.setattr("urllib.request.urlopen", cut_off)
    with pytest.raises(ValueError, match=r"BSDS300 cannot be had from .*IncompleteRead.*; give --data-dir"):
        download()


def test_what_is_no_archive_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "page.html").write_text("not found")
    with pytest.raises(ValueError, match=r"page\.html is no archive"):
        download((tmp_path / "page.html").as_uri())
    with pytest.raises(ValueError, match=r"BSDS300 cannot be had from .*nowhere.*; give --data-dir"):
        download((tmp_path / "nowhere").as_uri())
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_what_is_no_folder_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs images/train and images/test"):
        load("bsds300", tmp_path)
    folder = bsds_folder(tmp_path)
    damaged = next((folder / "images" / "train").iterdir())
    damaged.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read"):
        load("bsds300", tmp_path)
    for file in (folder / "images" / "test").iterdir():
        file.unlink()
    damaged.unlink()
    with pytest.raises(ValueError, match=r"test holds no \*\.jpg"):
        load("bsds300", tmp_path)


def test_images_stay_a_record() -> None:
    images = Images(torch.zeros(3, 3, 2, 2), torch.arange(3))
    assert len(images.rows(slice(2)).to(torch.device("cpu"))) == 2
