"""Reading data: the pixels, the splits, the cache, and what is wrong with a folder."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from accaware.experiments.data import load
from accaware.experiments.images import Images, cache_folder
from experiments.helpers import random_images

pytestmark = pytest.mark.usefixtures("cache")


def rows(images: Images) -> set[bytes]:
    return {pixels.numpy().tobytes() for pixels in images.pixels}


def test_the_pixels_and_labels_of_a_folder_are_those_written(cifar: Path) -> None:
    read = load("cifar10", cifar)
    for got, wanted in ((read.train, random_images(96, 1)), (read.evaluation, random_images(40, 2))):
        assert torch.equal(got.pixels, wanted.pixels)
        assert torch.equal(got.labels, wanted.labels)
    assert (read.split, read.classes) == ("test", 3)


def test_validation_rows_leave_the_training_set(cifar: Path) -> None:
    every, read = load("cifar10", cifar), load("cifar10", cifar, val_size=30)
    assert (len(read.train), len(read.evaluation), read.split) == (66, 30, "val")
    assert not rows(read.train) & rows(read.evaluation)
    assert rows(read.train) | rows(read.evaluation) == rows(every.train)


def test_the_validation_split_never_changes(cifar: Path) -> None:
    first, second = load("cifar10", cifar, val_size=30), load("cifar10", cifar, val_size=30)
    assert torch.equal(first.evaluation.pixels, second.evaluation.pixels)
    smaller = load("cifar10", cifar, val_size=20)
    assert rows(smaller.evaluation) < rows(first.evaluation)


@pytest.mark.parametrize("size", [96, 1000, -1])
def test_a_validation_split_leaves_something_to_train_on(cifar: Path, size: int) -> None:
    with pytest.raises(ValueError, match=rf"val_size must lie in \[0, 95\], not {size}"):
        load("cifar10", cifar, val_size=size)


def test_the_cache_is_used_until_the_files_change(cifar: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(cifar, folder)
    load("cifar10", folder)
    kept = sorted(cache.iterdir())
    assert len(kept) == 2
    load("cifar10", folder)
    assert sorted(cache.iterdir()) == kept
    shutil.copy(folder / "test-00000-of-00001.parquet", folder / "train-00001-of-00002.parquet")
    assert len(load("cifar10", folder).train) == 50 + 40


def test_a_damaged_cache_is_made_again(cifar: Path, cache: Path) -> None:
    wanted = load("cifar10", cifar).train.pixels
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(load("cifar10", cifar).train.pixels, wanted)


def test_without_a_place_for_the_cache_data_are_read_with_a_warning(cifar: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="decoded images are not kept"):
        assert len(load("cifar10", cifar).train) == 96


def test_a_corrupt_file_is_named(cifar: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar, tmp_path / "copy")
    bad = tmp_path / "copy" / "test-00000-of-00001.parquet"
    bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet cannot be read"):
        load("cifar10", bad.parent)


def test_a_corrupt_image_is_an_error_of_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"img": [{"bytes": b"no image", "path": "x"}], "label": [0]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read: cannot identify image"):
        load("cifar10", tmp_path)


def test_a_parquet_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read"):
        load("cifar10", tmp_path)


def test_empty_and_missing_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no train-\*.parquet"):
        load("cifar10", tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load("cifar10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown data 'mnist'; known are cifar10, imagenet, bsds300, folder"):
        load("mnist", tmp_path)
    with pytest.raises(ValueError, match="needs the folder"):
        load("folder")


def test_the_hub_gives_the_same_as_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"train": random_images(5, 1), "test": random_images(4, 2)}

    class Rows(dict[str, Any]):
        def cast_column(self, name: str, kind: Any) -> Rows:
            assert (name, kind) == ("img", "bytes")
            return self

    def load_dataset(name: str, split: str) -> Rows:
        assert name == "uoft-cs/cifar10"
        return Rows(img=[{"bytes": png(p)} for p in wanted[split].pixels], label=wanted[split].labels.tolist())

    fake = types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: "bytes")
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    read = load("cifar10")
    assert torch.equal(read.train.pixels, wanted["train"].pixels)
    assert torch.equal(read.evaluation.labels, wanted["test"].labels)


def test_imagenet_comes_from_the_hub_or_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = {"train": random_images(5, 1, size=20), "validation": random_images(4, 2, size=20)}

    class Rows:
        def __init__(self, images: Images) -> None:
            self.images = images

        def cast_column(self, name: str, kind: Any) -> Rows:
            assert (name, kind) == ("image", "bytes")
            return self

        def __getitem__(self, at: str | int) -> Any:
            return self.images.labels.tolist() if at == "label" else {"image": {"bytes": png(self.images.pixels[at])}}

    def load_dataset(name: str, split: str) -> Rows:
        assert name == "ILSVRC/imagenet-1k"
        return Rows(wanted[split])

    fake = types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: "bytes")
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    for _ in range(2):  # decoded, and from the cache
        read = load("imagenet", image_size=16, resize=20)
        assert torch.equal(read.train.pixels, wanted["train"].pixels[:, :, 2:18, 2:18])
        assert torch.equal(read.evaluation.labels, wanted["validation"].labels)
    assert len(load("imagenet", image_folder(tmp_path / "d")).train) == 6


def test_without_the_hub_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network\nmore lines")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be had from the hub \(no network\); give --data-dir"):
        load("cifar10")


def png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


# image folders


def image_folder(root: Path, size: tuple[int, int] = (32, 32)) -> Path:
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(["ant", "bee"]):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", size, (label * 100, index, 7)).save(folder / f"{index}.png")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    return root


def test_an_image_folder_has_a_class_for_each_subfolder(tmp_path: Path) -> None:
    read = load("folder", image_folder(tmp_path / "d"))
    assert read.classes == 2
    assert read.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read.evaluation.labels.tolist() == [0, 0, 1, 1]
    assert read.train.pixels[:, :, 0, 0].tolist() == [[label * 100, i, 7] for label in (0, 1) for i in (0, 1, 2)]


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (20, 24), (16, 16), (17, 300)])
def test_images_are_resized_and_cropped(tmp_path: Path, size: tuple[int, int]) -> None:
    read = load("folder", image_folder(tmp_path / "d", size), image_size=16)
    assert read.train.pixels.shape == (6, 3, 16, 16)
    assert read.train.pixels[4, :, 8, 8].tolist() == [100, 1, 7]


def test_the_crop_is_central(tmp_path: Path) -> None:
    strip = np.zeros((16, 48, 3), np.uint8)
    strip[:, 16:32] = 200
    folder = image_folder(tmp_path / "d", (16, 16))
    Image.fromarray(strip).save(folder / "test" / "ant" / "0.png")
    assert (load("folder", folder, image_size=16).evaluation.pixels[0] == 200).all()


def test_images_of_a_folder_are_mapped_from_the_cache(tmp_path: Path, cache: Path) -> None:
    folder = image_folder(tmp_path / "d")
    first = load("folder", folder).train.pixels.clone()  # no map of a file that is about to shrink
    kept = sorted(cache.iterdir())
    assert [path.suffix for path in kept] == [".npy"] * 2
    path = folder / "train" / "ant" / "0.png"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(load("folder", folder).train.pixels, first), "nothing is decoded again"
    for cached in kept:
        cached.write_bytes(cached.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"ant/0\.png cannot be read"):
        load("folder", folder)
    assert sorted(cache.iterdir()) == kept, "a failure leaves nothing behind"
    path.write_bytes(content)
    assert torch.equal(load("folder", folder).train.pixels, first)


def test_without_a_place_for_the_cache_a_folder_is_read_with_a_warning(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="decoded images are not kept"):
        assert len(load("folder", image_folder(tmp_path / "d")).train) == 6


def test_a_full_disk_is_noticed_before_images_are_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.warns(UserWarning, match="not kept: .*No space left"):
        assert len(load("folder", image_folder(tmp_path / "d")).train) == 6
    assert list(cache.iterdir()) == []


def test_what_is_wrong_with_an_image_folder_is_said(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d")
    bad = root / "train" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"bee/1.png cannot be read"):
        load("folder", root)
    shutil.rmtree(root / "test" / "bee")
    with pytest.raises(ValueError, match="train and test hold different classes"):
        load("folder", root)
    (root / "test" / "bee").mkdir()
    bad.unlink()
    with pytest.raises(ValueError, match=r"test/bee holds no images"):
        load("folder", root)
    shutil.rmtree(root / "test")
    with pytest.raises(ValueError, match="needs subfolders train/CLASS and test/CLASS"):
        load("folder", root)


def test_limit_train_keeps_the_first_rows(cifar: Path) -> None:
    assert torch.equal(load("cifar10", cifar, limit_train=7).train.pixels, load("cifar10", cifar).train.pixels[:7])
    with pytest.raises(ValueError, match=r"limit_train must lie in \[1, 96\], not 97"):
        load("cifar10", cifar, limit_train=97)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "accaware"
