"""How a network fares on a narrow accumulator: overflows of every operation, and outputs beside those of exact sums."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from accaware.certify.certificate import TOOL
from accaware.certify.emulation import Emulated, Emulator, Progress, run_batches

__all__ = ["Measured", "load_data", "measure", "outputs_file", "random_feeds", "top1"]

Arrays = dict[str, NDArray[Any]]

_MOST_DRAWN = 2**28  # elements


@dataclass(frozen=True, eq=False)
class Measured:
    """emulated and exact: the same rows on the accumulator and with exact sums. sha256: of the file.

    equal: rows whose outputs are the same to the bit. top1 and exact_top1: percent, None without labels.
    """

    sha256: str
    target: str
    rows: int
    emulated: Emulated
    exact: Emulated
    equal: int
    top1: float | None = None
    exact_top1: float | None = None

    def table(self) -> str:
        """One line for each operation, then what ran as it is and why, then the outputs; plain text."""
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("operation", "kind"):
            table.add_column(heading)
        for heading in ("register", "sums", "overflows", "per sum"):
            table.add_column(heading, justify="right")
        for count in self.emulated.counts:
            share = count.overflows / max(1, count.sums)
            table.add_row(
                count.name, count.kind, str(count.bits), f"{count.sums:,}", f"{count.overflows:,}", f"{share:.2%}"
            )
        text = StringIO()
        Console(file=text, width=10_000, color_system=None, markup=False, highlight=False, emoji=False).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
        left = [f"warning: {name} runs as it is: {reason}" for name, reason in self.emulated.left.items()]
        return "\n".join([*lines, "", *left, *self._summary()]) + "\n"

    def _summary(self) -> list[str]:
        lines = [
            f"{self.target}: {self.emulated.overflows:,} overflows; "
            f"{self.equal} of {self.rows} rows have the outputs of exact sums"
        ]
        if self.top1 is not None:
            lines.append(f"top-1 {self.top1:.2f}, with exact sums {self.exact_top1:.2f}")
        return lines

    def to_json(self) -> str:
        """Everything but the outputs."""
        return json.dumps(
            {
                "tool": TOOL,
                "sha256": self.sha256,
                "target": self.target,
                "rows": self.rows,
                "equal": self.equal,
                "top1": self.top1,
                "exact_top1": self.exact_top1,
                "overflows": self.emulated.overflows,
                "operations": [asdict(count) for count in self.emulated.counts],
                "left": self.emulated.left,
            },
            indent=1,
        )


def measure(
    emulator: Emulator,
    exact: Emulator,
    feeds: Mapping[str, NDArray[Any]],
    labels: NDArray[Any] | None = None,
    *,
    target: str = "",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Measured:
    """Run the feeds through both. labels: integers [N], for the accuracy of the first output. Raises `ValueError`."""
    done = run_batches(emulator, feeds, batch_size, progress)
    reference = run_batches(exact, feeds, batch_size, progress)
    rows = max(len(array) if np.ndim(array) else 1 for array in feeds.values()) if feeds else 1
    same = np.ones(rows, bool)
    for name, array in done.outputs.items():
        equal = (array == reference.outputs[name]) | (np.isnan(array) if array.dtype.kind == "f" else False)
        by_row = equal.ndim > 0 and len(equal) == rows
        same &= equal.reshape(rows, -1).all(axis=1) if by_row else equal.all()
    found = Measured(emulator.sha256, target, rows, done, reference, int(same.sum()))
    if labels is None:
        return found
    name = emulator.outputs[0]
    return replace(found, top1=top1(done.outputs[name], labels), exact_top1=top1(reference.outputs[name], labels))


def top1(outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Percent of the rows whose largest output is that of the label. outputs: [N, classes]; labels: integers [N].

    Raises `ValueError` where they do not fit.
    """
    if outputs.ndim < 2 or len(outputs) != len(labels):
        raise ValueError(f"{len(labels)} labels do not fit an output of shape {list(outputs.shape)}")
    return float(100 * (outputs.reshape(len(outputs), -1).argmax(axis=1) == labels).mean())


def load_data(path: str | Path, emulator: Emulator, limit: int | None = None) -> tuple[Arrays, NDArray[Any] | None]:
    """Inputs and labels from an .npz: `images`, or an array for every graph input by its name, and maybe `labels`.

    limit: only so many of the first rows. Raises `OSError`, or `ValueError` with the path for anything else in it.
    """
    try:
        with open(path, "rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            arrays = dict(loaded.items()) if hasattr(loaded, "files") else None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an .npz of arrays ({' '.join(str(error).split())[:100]})") from error
    if arrays is None:
        raise ValueError(f"{path}: one array, not an .npz with `images`")
    names = list(emulator.inputs)
    if len(names) == 1 and "images" in arrays:
        arrays[names[0]] = arrays.pop("images")
    if missing := [name for name in names if name not in arrays]:
        what = "`images`" if len(names) == 1 else f"an array '{missing[0]}', which is an input of the graph"
        raise ValueError(f"{path}: it has no {what}; it has {', '.join(arrays) or 'nothing'}")
    feeds = {name: arrays[name][:limit] if arrays[name].ndim else arrays[name] for name in names}
    labels = arrays.get("labels")
    if any(array.ndim and not len(array) for array in feeds.values()):
        raise ValueError(f"{path}: there are no rows")
    if labels is None:
        return feeds, None
    labels = labels[:limit] if labels.ndim else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(feeds[names[0]]):
        raise ValueError(f"{path}: `labels` must be one integer for each image, not {labels.dtype} {labels.shape}")
    return feeds, labels


def random_feeds(emulator: Emulator, count: int, seed: int = 0) -> Arrays:
    """Codes, each as likely as the others, where those of an input are known; else from the normal distribution.

    count: rows, where the file does not fix that. Raises `ValueError` where it leaves another dimension open, or where
    there would be more than 2^28 numbers.
    """
    generator = np.random.default_rng(seed)
    feeds = {}
    for name, (dtype, shape) in emulator.inputs.items():
        known = (None, None) if shape is None else shape
        sizes = [count if i == 0 and d is None else d for i, d in enumerate(known)]
        fixed = [d for d in sizes if d is not None]
        if len(fixed) < len(sizes):
            raise ValueError(f"the shape of input '{name}' is not known; give --data with arrays that fit")
        if math.prod(fixed) > _MOST_DRAWN:
            raise ValueError(f"input '{name}' of shape {fixed} is too large to be drawn at random; give --data")
        codes = emulator.codes(name)
        if codes is None:
            feeds[name] = generator.normal(size=fixed).astype(dtype)
        else:
            lo, hi, scale, zero = codes
            drawn = generator.integers(lo, hi, fixed, endpoint=True)
            feeds[name] = ((drawn - zero) * scale).astype(dtype)
    return feeds


def outputs_file(outputs: Mapping[str, NDArray[Any]]) -> bytes:
    """An .npz with the outputs by their names."""
    buffer = BytesIO()
    np.savez_compressed(buffer, **dict(outputs))  # type: ignore[arg-type]
    return buffer.getvalue()
