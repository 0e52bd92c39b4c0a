"""BSDS300 (Martin et al. 2001) for super-resolution by a factor of 3: 200 training and 100 test images.

Training images are 480x321 (portraits are transposed), test images the central 321x321; their low-resolution
counterparts are bicubic, a third as wide.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from accaware.experiments.images import Images, cache_folder, cached, first_line, require_folder

URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz"
#: Over the names and SHA-256 sums of the 300 images, which do not change when somebody packs them again.
SHA256 = "8ae88543a2248457b4fd713d5b459131b637113241bf52057fc3798184096e66"
SCALE = 3
WIDTH, HEIGHT = 480, 321


def bsds300(folder: Path | None = None) -> tuple[Images, Images]:
    """Training and test images: pixels uint8 [N, 3, h, w], labels uint8 [N, 3, 3 h, 3 w].

    folder: holds train/*.jpg and test/*.jpg, also under images/ or BSDS300/images/, as in the original archive; None
    downloads that. Raises `ValueError` where images are missing, damaged or too small.
    """
    root = download() if folder is None else folder
    require_folder(root)
    found = [p for p in (root, root / "images", root / "BSDS300" / "images") if (p / "train").is_dir()]
    if not found or not (found[0] / "test").is_dir():
        raise ValueError(f"data folder {root} needs images/train and images/test")
    return _split(found[0] / "train", (WIDTH, HEIGHT)), _split(found[0] / "test", (HEIGHT, HEIGHT))


def _split(folder: Path, size: tuple[int, int]) -> Images:
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise ValueError(f"data folder {folder} holds no *.jpg")
    return cached(files, f"bsds300-{size}", lambda: pairs(files, size))


def pairs(files: Sequence[Path], size: tuple[int, int]) -> Images:
    """The central (width, height) of every image, and its bicubic third. Raises `ValueError` for a smaller image."""
    from PIL import Image

    low, high = [], []
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"data file {file} cannot be read: {first_line(error)}") from error
        if image.height > image.width:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        if min(left, top) < 0:
            raise ValueError(
                f"data file {file} is {image.width}x{image.height}; at least {size[0]}x{size[1]} is needed"
            )
        image = image.crop((left, top, left + size[0], top + size[1]))
        third = image.resize((size[0] // SCALE, size[1] // SCALE), Image.Resampling.BICUBIC)
        high.append(np.asarray(image))
        low.append(np.asarray(third))
    return Images(_tensor(low), _tensor(high))


def _tensor(images: Sequence[object]) -> Tensor:
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())  # type: ignore[arg-type]


def download(url: str = URL, sha256: str = SHA256) -> Path:
    """The folder of the images in the cache, downloaded where it is missing.

    Raises `ValueError` without a connection, and where the images are not those that are expected.
    """
    place = cache_folder() / "BSDS300"
    if place.is_dir():
        return place
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            archive = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"BSDS300 cannot be had from {url} ({first_line(error)}); give --data-dir") from error
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as beside:
        try:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(beside, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{url} is no archive: {first_line(error)}") from error
        images = Path(beside) / "BSDS300" / "images"
        if (found := digest(images)) != sha256:
            raise ValueError(f"the images of {url} have the checksum {found}, not {sha256}")
        shutil.move(images.parent, place)
    return place


def digest(images: Path) -> str:
    """SHA-256 over name and SHA-256 of every SPLIT/NAME.jpg, in the order of the names."""
    total = hashlib.sha256()
    for file in sorted(images.glob("*/*.jpg")):
        total.update(file.relative_to(images).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
