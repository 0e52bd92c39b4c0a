"""The points of a sweep: every combination of the values of its grid, each with its settings and a readable name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from accaware.experiments.settings import FREE_ON_RESUME, LACKS, Settings, acc_widths, setting

#: What a baseline, which knows no accumulator, does not depend on: it is trained once for all values of these.
REGISTER = ("acc_bits", "preload", "tile", "outer_bits", "overflow")
BASELINE_BITS = "32"
LARGEST = 100_000  # points


def parse(texts: Sequence[str]) -> dict[str, list[str]]:
    """ "KEY=V1,V2" and "KEY=LO..HI" (both ends included) as words by the setting's name.

    Raises `ValueError` for anything else, for a key or a value that is given twice, in whatever spelling, and for a
    setting that `accaware train` does not have.

    >>> parse(["method=a2q,projected", "acc-bits=9..11"])
    {'method': ['a2q', 'projected'], 'acc_bits': ['9', '10', '11']}
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        name = key.replace("-", "_")
        words = values.split(",")
        if not (key and separator and all(words)):
            raise ValueError(f"--grid must be KEY=V1,V2 or KEY=LO..HI, not {text!r}")
        if ends := re.fullmatch(r"(\d+)\.\.(\d+)", values):
            low, high = map(int, ends.groups())
            if not low <= high < low + LARGEST:
                raise ValueError(f"--grid {text}: a range needs LO <= HI, and at most {LARGEST} values")
            words = [str(n) for n in range(low, high + 1)]
        if name == "command" or name in FREE_ON_RESUME:
            raise ValueError(f"--grid {text}: {name} makes no points: it does not say what a run trains")
        if name in LACKS["train"]:
            raise ValueError(f"--grid {text}: a sweep trains, and train has no setting {name!r}")
        if name in grid or len({setting(name, word) for word in words}) < len(words):
            raise ValueError(f"--grid {text}: {name if name in grid else 'a value'} is given twice")
        grid[name] = words
    return grid


def points(grid: Mapping[str, Sequence[str]], base: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of every point by its name: those of `base`, and over them one value of each key of `grid`.

    A width among the values of `acc_bits` leaves the layer patterns of `base` as they are. All points are validated:
    raises `ValueError` that names the first impossible one, and where there are more than 100,000.
    """
    found: dict[str, Settings] = {}
    for number, words in enumerate(itertools.product(*grid.values())):
        if number == LARGEST:
            raise ValueError(f"the grid has more than {LARGEST} points")
        chosen = dict(zip(grid, words, strict=True))
        values = {**base, **{name: setting(name, word) for name, word in chosen.items()}}
        if "acc_bits" in chosen:
            patterns = acc_widths(base.get("acc_bits", ()))[1].items()
            values["acc_bits"] += tuple(f"{pattern}={bits}" for pattern, bits in patterns)
        if values.get("method") == "baseline":
            for name in chosen.keys() & set(REGISTER):
                values.pop(name)
                chosen.pop(name)
            if "acc_bits" in grid:
                values["acc_bits"] = (BASELINE_BITS,)
            if "method" in grid:  # said of the other methods
                values.pop("preload", None)
        point = ",".join(f"{name}={word}" for name, word in chosen.items()).replace("/", "_") or "baseline"
        try:
            settings = Settings(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"point {point}: {error}") from error
        if found.setdefault(point, settings) != settings:
            raise ValueError(f"two points are called {point}")
    return found
