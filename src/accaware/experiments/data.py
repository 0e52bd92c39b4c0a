"""Image classification data as whole uint8 tensors: CIFAR-10 (folder of Parquet files, or the hub) and image folders.

Images are decoded once and kept in the user's cache folder; from there on a data set is two tensors in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from accaware.files import write_whole

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}
CACHE_VERSION = 1
SPLIT_SEED = 0


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour, of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 [N, 3, H, W]; `labels`: int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> Images:
        """The images that `index` selects."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training images, and those that accuracy is measured on: `split` says whether these are "test" or "val"."""

    train: Images
    evaluation: Images
    split: str
    classes: int


def load(
    name: str,
    folder: Path | None = None,
    *,
    val_size: int = 0,
    image_size: int = 32,
    limit_train: int | None = None,
) -> Dataset:
    """The data set `name`: "cifar10" (from `folder`, else from the hub) or "folder" (train/CLASS/*, test/CLASS/*).

    With `val_size` > 0 that many rows, chosen by a fixed seed that no option changes, leave the training set and take
    the place of the test set. `image_size` applies to "folder". `limit_train` keeps the first rows only.
    Raises `ValueError` for an unknown name, and for a folder that is missing, empty or unreadable.
    """
    train, test = _read(name, folder, image_size)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    split = "test"
    if val_size:
        train, test = _split(train, val_size)
        split = "val"
    if limit_train is not None:
        if not 1 <= limit_train <= len(train):
            raise ValueError(f"limit_train must lie in [1, {len(train)}], not {limit_train}")
        train = train.rows(slice(limit_train))
    return Dataset(train, test, split, classes)


def _read(name: str, folder: Path | None, image_size: int) -> tuple[Images, Images]:
    if name == "cifar10":
        return cifar10_from_hub() if folder is None else cifar10_from_folder(folder)
    if name == "folder":
        if folder is None:
            raise ValueError("data 'folder' needs the folder: --data-dir")
        return images_from_folder(folder, image_size)
    raise ValueError(f"unknown data {name!r}; known are cifar10, folder")


def _split(train: Images, val_size: int) -> tuple[Images, Images]:
    """The training set without `val_size` rows, and those rows; both keep the order of the file."""
    if not 0 < val_size < len(train):
        raise ValueError(f"val_size must lie in [0, {len(train) - 1}], not {val_size}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return train.rows(order[val_size:].sort().values), train.rows(order[:val_size].sort().values)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


def cifar10_from_folder(folder: Path) -> tuple[Images, Images]:
    """Training and test images of a folder that holds train-*.parquet and test-*.parquet, also in subfolders.

    The schema is that of `uoft-cs/cifar10` on the hub: columns `img` (struct of `bytes` and `path`) and `label`.
    """
    _require_folder(folder)
    return _parquet_split(folder, "train"), _parquet_split(folder, "test")


def _parquet_split(folder: Path, split: str) -> Images:
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"data folder {folder} holds no {split}-*.parquet")
    return _cached(files, "cifar10", lambda: _concatenate([_read_parquet(file) for file in files]))


def _read_parquet(file: Path) -> Images:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["img", "label"])
        encoded = pa.chunked_array(table["img"]).combine_chunks().field("bytes").to_pylist()
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
        return Images(_decode_all(encoded, 32), labels)
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"data file {file} cannot be read: {_first_line(error)}") from error


def cifar10_from_hub() -> tuple[Images, Images]:
    """Training and test images of `uoft-cs/cifar10` through `datasets`, which keeps its own copy of the download."""
    return _hub_split("train"), _hub_split("test")


def _hub_split(split: str) -> Images:
    import datasets

    try:
        rows = datasets.load_dataset("uoft-cs/cifar10", split=split)
        rows = rows.cast_column("img", datasets.Image(decode=False))
    except Exception as error:  # the hub's client raises dozens of types
        raise ValueError(f"CIFAR-10 cannot be had from the hub ({_first_line(error)}); give --data-dir") from error
    labels = torch.tensor(list(rows["label"]), dtype=torch.int64)
    return Images(_decode_all([row["bytes"] for row in rows["img"]], 32), labels)


# image folders -------------------------------------------------------------------------------------------------------


def images_from_folder(folder: Path, size: int) -> tuple[Images, Images]:
    """Images of folder/train/CLASS/* and folder/test/CLASS/* (or val): shorter side to `size`, centre cropped.

    Classes are numbered in alphabetical order of their folders, which both parts must agree on.
    """
    _require_folder(folder)
    parts = {p.name: p for p in folder.iterdir() if p.is_dir()}
    test = parts.get("test") or parts.get("val")
    if "train" not in parts or test is None:
        raise ValueError(f"data folder {folder} needs subfolders train/CLASS and test/CLASS")
    names = _classes(parts["train"])
    if _classes(test) != names:
        raise ValueError(f"data folder {folder}: train and {test.name} hold different classes")
    return _image_split(parts["train"], names, size), _image_split(test, names, size)


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not names:
        raise ValueError(f"data folder {folder} holds no class folders")
    return names


def _image_split(folder: Path, names: Sequence[str], size: int) -> Images:
    by_class = [[f for f in sorted((folder / n).iterdir()) if f.suffix.lower() in SUFFIXES] for n in names]
    if empty := [name for name, files in zip(names, by_class, strict=True) if not files]:
        raise ValueError(f"data folder {folder / empty[0]} holds no images")
    files = [file for group in by_class for file in group]
    labels = torch.tensor([label for label, group in enumerate(by_class) for _ in group], dtype=torch.int64)

    def decode_file(file: Path) -> np.ndarray[Any, Any]:
        try:
            return _decode(file.read_bytes(), size)
        except (OSError, ValueError) as error:
            raise ValueError(f"data file {file} cannot be read: {_first_line(error)}") from error

    def read() -> Images:
        with ThreadPoolExecutor() as pool:
            return Images(_stack(pool.map(decode_file, files)), labels)

    return _cached(files, f"folder-{size}", read)


# decoding ------------------------------------------------------------------------------------------------------------


def _decode(encoded: bytes, size: int) -> np.ndarray[Any, Any]:
    """One image, uint8 [size, size, 3]; an image of another size is resized by its shorter side and cropped."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    if image.size != (size, size):
        width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _decode_all(encoded: Iterable[bytes], size: int) -> Tensor:
    return _stack(_decode(item, size) for item in encoded)


def _stack(images: Iterable[np.ndarray[Any, Any]]) -> Tensor:
    """[H, W, 3] arrays -> [N, 3, H, W] tensor."""
    stacked = np.stack(list(images))
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


def _concatenate(parts: Sequence[Images]) -> Images:
    return Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# cache ---------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/accaware, else ~/.cache/accaware."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accaware"


def _cached(files: Sequence[Path], kind: str, read: Callable[[], Images]) -> Images:
    """What `read` returns, kept in the cache under the paths, sizes and times of `files`."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((CACHE_VERSION, kind, stats)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.safetensors"
    if path.exists():
        try:
            kept = load_file(path)
            return Images(kept["pixels"], kept["labels"])
        except (OSError, SafetensorError, KeyError):
            pass  # a damaged cache file is made again
    images = read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"pixels": images.pixels, "labels": images.labels}))
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {_first_line(error)}", stacklevel=2)
    return images
