"""Data as whole uint8 tensors: CIFAR-10, ImageNet and other folders of images, BSDS300.

Images are decoded once and kept in the user's cache folder; from there on a data set is two tensors in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accaware.experiments.bsds300 import bsds300
from accaware.experiments.images import (
    SUFFIXES,
    Images,
    cached,
    concatenate,
    decode,
    decode_all,
    first_line,
    mapped,
    require_folder,
    stats,
)
from accaware.experiments.tasks import CLASSIFICATION, SUPER_RESOLUTION, Task

SPLIT_SEED = 0
CIFAR10_SIZE = 32  # pixels


@dataclass(frozen=True)
class Dataset:
    """Training images, and those that accuracy is measured on: `split` says whether these are "test" or "val".

    `classes`: None where the labels are images.
    """

    train: Images
    evaluation: Images
    split: str
    classes: int | None
    task: Task = CLASSIFICATION


def load(
    name: str,
    folder: Path | None = None,
    *,
    val_size: int = 0,
    image_size: int = 32,
    resize: int | None = None,
    limit_train: int | None = None,
) -> Dataset:
    """The data set `name`: "cifar10" or "imagenet" (from `folder`, else from the hub), "bsds300" (from `folder`, else
    by download), or "folder" (as ImageNet's: train/CLASS/*, and test/CLASS/* or val/CLASS/*).

    With `val_size` > 0 that many rows, chosen by a fixed seed that no option changes, leave the training set and take
    the place of the test set. `image_size` and `resize` apply to "imagenet" and "folder". `limit_train` keeps the first
    rows only. Raises `ValueError` for an unknown name, and for a folder that is missing, empty or unreadable.
    """
    train, test = _read(name, folder, image_size, resize)
    task = SUPER_RESOLUTION if name == "bsds300" else CLASSIFICATION
    classes = int(max(train.labels.max(), test.labels.max())) + 1 if task is CLASSIFICATION else None
    split = "test"
    if val_size:
        train, test = _split(train, val_size)
        split = "val"
    if limit_train is not None:
        if not 1 <= limit_train <= len(train):
            raise ValueError(f"limit_train must lie in [1, {len(train)}], not {limit_train}")
        train = train.rows(slice(limit_train))
    return Dataset(train, test, split, classes, task)


def _read(name: str, folder: Path | None, image_size: int, resize: int | None) -> tuple[Images, Images]:
    if name == "cifar10":
        return cifar10_from_hub() if folder is None else cifar10_from_folder(folder)
    if name == "imagenet" and folder is None:
        return imagenet_from_hub(image_size, resize)
    if name in ("folder", "imagenet"):
        if folder is None:
            raise ValueError("data 'folder' needs the folder: --data-dir")
        return images_from_folder(folder, image_size, resize)
    if name == "bsds300":
        return bsds300(folder)
    raise ValueError(f"unknown data {name!r}; known are cifar10, imagenet, bsds300, folder")


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
    require_folder(folder)
    return _parquet_split(folder, "train"), _parquet_split(folder, "test")


def _parquet_split(folder: Path, split: str) -> Images:
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"data folder {folder} holds no {split}-*.parquet")
    return cached(files, "cifar10", lambda: concatenate([_read_parquet(file) for file in files]))


def _read_parquet(file: Path) -> Images:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["img", "label"])
        encoded = pa.chunked_array(table["img"]).combine_chunks().field("bytes").to_pylist()
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
        return Images(decode_all(encoded, CIFAR10_SIZE), labels)
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"data file {file} cannot be read: {first_line(error)}") from error


def cifar10_from_hub() -> tuple[Images, Images]:
    """Training and test images of `uoft-cs/cifar10` through `datasets`, which keeps its own copy of the download."""
    return _cifar10_from_hub("train"), _cifar10_from_hub("test")


def _cifar10_from_hub(split: str) -> Images:
    rows, labels = _hub_rows("uoft-cs/cifar10", split, "img")
    return Images(decode_all([row["bytes"] for row in rows["img"]], CIFAR10_SIZE), labels)


def _hub_rows(name: str, split: str, column: str) -> tuple[Any, Tensor]:
    """The rows of a data set on the hub, their images not decoded, and their labels."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
        rows = rows.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # the hub's client raises dozens of types
        raise ValueError(f"{name} cannot be had from the hub ({first_line(error)}); give --data-dir") from error
    return rows, torch.tensor(list(rows["label"]), dtype=torch.int64)


# ImageNet ------------------------------------------------------------------------------------------------------------


def imagenet_from_hub(size: int, resize: int | None) -> tuple[Images, Images]:
    """Training and validation images of `ILSVRC/imagenet-1k`, to which the hub gives access on request (HF_TOKEN)."""
    return _imagenet_from_hub("train", size, resize), _imagenet_from_hub("validation", size, resize)


def _imagenet_from_hub(split: str, size: int, resize: int | None) -> Images:
    rows, labels = _hub_rows("ILSVRC/imagenet-1k", split, "image")
    key = ("imagenet-1k", split, len(labels), size, resize)
    pixels = mapped(range(len(labels)), size, lambda row: decode(rows[row]["image"]["bytes"], size, resize), key)
    return Images(pixels, labels)


# image folders -------------------------------------------------------------------------------------------------------


def images_from_folder(folder: Path, size: int, resize: int | None = None) -> tuple[Images, Images]:
    """Images of folder/train/CLASS/* and folder/test/CLASS/* (or val): shorter side to `resize`, centre cropped.

    `size`: of the crop, and of the shorter side where `resize` is None. Classes are numbered in alphabetical order of
    their folders, which both parts must agree on.
    """
    require_folder(folder)
    parts = {p.name: p for p in folder.iterdir() if p.is_dir()}
    test = parts.get("test") or parts.get("val")
    if "train" not in parts or test is None:
        raise ValueError(f"data folder {folder} needs subfolders train/CLASS and test/CLASS")
    names = _classes(parts["train"])
    if _classes(test) != names:
        raise ValueError(f"data folder {folder}: train and {test.name} hold different classes")
    return _image_split(parts["train"], names, size, resize), _image_split(test, names, size, resize)


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not names:
        raise ValueError(f"data folder {folder} holds no class folders")
    return names


def _image_split(folder: Path, names: Sequence[str], size: int, resize: int | None) -> Images:
    by_class = [[f for f in sorted((folder / n).iterdir()) if f.suffix.lower() in SUFFIXES] for n in names]
    if empty := [name for name, files in zip(names, by_class, strict=True) if not files]:
        raise ValueError(f"data folder {folder / empty[0]} holds no images")
    files = [file for group in by_class for file in group]
    labels = torch.tensor([label for label, group in enumerate(by_class) for _ in group], dtype=torch.int64)

    def read(file: Path) -> np.ndarray[Any, Any]:
        try:
            return decode(file.read_bytes(), size, resize)
        except (OSError, ValueError) as error:
            raise ValueError(f"data file {file} cannot be read: {first_line(error)}") from error

    return Images(mapped(files, size, read, ("folder", size, resize, stats(files))), labels)
