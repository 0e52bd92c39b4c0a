"""Images as uint8 tensors: how they are decoded, and kept in the user's cache folder for the next run."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from accaware.files import write_whole

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}
CACHE_VERSION = 1
_AHEAD = 1024  # images that may wait in memory to be written
T = TypeVar("T")


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour, of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "none": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 [N, 3, H, W]; `labels`: int64 [N], or uint8 [N, 3, s H, s W] for super-resolution."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> Images:
        """The images that `index` selects."""
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        """On `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))


# decoding ------------------------------------------------------------------------------------------------------------


def decode(encoded: bytes, size: int, resize: int | None = None) -> np.ndarray[Any, Any]:
    """One image, uint8 [size, size, 3]: its shorter side becomes `resize` (None: `size`), and its centre is cropped."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    if image.size != (size, size) or resize is not None:
        shorter = resize or size
        width, height = (max(shorter, round(side * shorter / min(image.size))) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def decode_all(encoded: Iterable[bytes], size: int) -> Tensor:
    """[N, 3, size, size]."""
    return stack(decode(item, size) for item in encoded)


def stack(images: Iterable[np.ndarray[Any, Any]]) -> Tensor:
    """[H, W, 3] arrays -> [N, 3, H, W] tensor."""
    stacked = np.stack(list(images))
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


def concatenate(parts: Sequence[Images]) -> Images:
    """The images of all parts."""
    return Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))


def require_folder(folder: Path) -> None:
    """Raise `ValueError` where there is none."""
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# cache ---------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/accaware, else ~/.cache/accaware."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accaware"


def cached(files: Sequence[Path], kind: str, read: Callable[[], Images]) -> Images:
    """What `read` returns, kept in the cache under the paths, sizes and times of `files`."""
    path = _place((kind, stats(files)), "safetensors")
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
        _not_kept(error)
    return images


def mapped(items: Sequence[T], size: int, read: Callable[[T], np.ndarray[Any, Any]], key: object) -> Tensor:
    """uint8 [N, 3, size, size] of what `read` makes of every item, [size, size, 3]; kept in the cache under `key`.

    The file in the cache is mapped into memory, so that the images may be larger than it; processes share its pages.
    """
    path, shape = _place(key, "npy"), (len(items), 3, size, size)
    if path.exists():
        try:
            return torch.from_numpy(np.load(path, mmap_mode="c"))
        except (OSError, ValueError):
            pass
    beside = path.with_suffix(f".{platform.node()}-{os.getpid()}")  # hosts may share the cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(beside, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # where the disk is full, writing to mapped memory would end the process
            with beside.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, beside.stat().st_size)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        _not_kept(error)
        return torch.from_numpy(_fill(np.empty(shape, np.uint8), items, read))
    try:
        _fill(pixels, items, read).flush()
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _fill(pixels: Any, items: Sequence[T], read: Callable[[T], np.ndarray[Any, Any]]) -> Any:
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(items), _AHEAD):
            for row, image in enumerate(pool.map(read, items[first : first + _AHEAD]), first):
                pixels[row] = image.transpose(2, 0, 1)
    return pixels


def stats(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes with the files: paths, sizes and times."""
    found = [(file, file.stat()) for file in files]
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def _place(key: object, suffix: str) -> Path:
    digest = hashlib.sha256(repr((CACHE_VERSION, key)).encode()).hexdigest()
    return cache_folder() / f"{digest[:32]}.{suffix}"


def _not_kept(error: OSError) -> None:
    warnings.warn(f"decoded images are not kept: {first_line(error)}", stacklevel=3)
