"""What the papers report: tables 1 to 3 of A2Q+ (arXiv 2401.10432), and the networks that its authors released.

Values of tables 1 and 2 are the best over M and N, of 3 seeds. Sparsity is in percent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from accaware.experiments.curves import Group

_WIDTHS = range(9, 17)


@dataclass(frozen=True)
class Column:
    """One network of the papers: `rows` by name, then by accumulator width. epochs: None where not stated."""

    source: str
    model: str
    data: str
    metric: str
    reference: float
    epochs: int | None
    pairs: str
    seeds: str
    rows: dict[str, dict[int, float]]


def _search(
    model: str, data: str, metric: str, reference: float, a2q: str, plus: str, base: tuple[int, float]
) -> Column:
    """A column of tables 1 and 2: words for P = 9, ..., 16, "-" where there is none."""
    rows = {
        name: {bits: float(word) for bits, word in zip(_WIDTHS, words.split(), strict=True) if word != "-"}
        for name, words in (("A2Q", a2q), ("A2Q+", plus))
    }
    rows["baseline by data type"] = {base[0]: base[1]}
    epochs = 100 if data == "cifar10" else 300
    pairs = "best of 3 to 8 bits each (of 5 to 8 for some)"
    return Column("the A2Q+ paper, tables 1 and 2", model, data, metric, reference, epochs, pairs, "3", rows)


def _imagenet(model: str, reference: float, base: float, a2q: str, ep: str, plus: str, sparsity: str) -> Column:
    """A column of table 3: words for P = 16, 14, 12."""
    named = (("A2Q", a2q), ("A2Q, EP-init", ep), ("A2Q+", plus), ("A2Q+, sparsity (%)", sparsity))
    rows = {name: dict(zip((16, 14, 12), map(float, words.split()), strict=True)) for name, words in named}
    rows["baseline"] = {32: base}
    return Column("the A2Q+ paper, table 3", model, "imagenet", "top1", reference, 60, "4, 4", "not stated", rows)


COLUMNS = (
    _search(
        *("MobileNetV1", "cifar10", "top1", 92.43),
        "- - 71.8 76.9 83.4 89.3 90.9 91.9",
        "- - 78.5 83.5 89.7 90.8 91.9 92.1",
        (17, 62.2),
    ),
    _search(
        *("ResNet18", "cifar10", "top1", 95.0),
        "- - 81.0 89.1 92.5 93.9 94.2 94.4",
        "- - 89.9 92.8 93.8 94.1 94.4 94.5",
        (19, 94.0),
    ),
    _search(
        *("ESPCN", "bsd300", "psnr", 24.91),
        "17.0 21.1 24.1 24.4 24.8 24.8 24.9 25.0",
        "21.9 24.1 24.4 24.7 24.8 25.0 25.0 25.1",
        (16, 24.5),
    ),
    _search(
        *("U-Net", "bsd300", "psnr", 25.37),
        "18.2 23.4 24.5 24.7 25.0 25.2 25.3 25.4",
        "23.9 24.4 24.8 25.0 25.1 25.2 25.3 25.4",
        (16, 24.6),
    ),
    _imagenet("ResNet18", 69.76, 70.2, "69.2 60.3 35.5", "69.3 62.5 42.7", "69.8 67.1 56.4", "50.4 85.0 93.4"),
    _imagenet("ResNet34", 73.31, 73.4, "73.1 65.8 43.4", "73.1 67.6 51.4", "73.3 71.4 62.1", "51.4 85.0 95.9"),
    _imagenet("ResNet50", 76.13, 75.9, "76.0 73.8 55.0", "76.0 74.5 66.7", "76.0 75.7 72.0", "44.0 67.7 84.4"),
    Column(
        *("the networks released with Brevitas", "ResNet18", "cifar10", "top1", 95.0, None, "4, 4", "1"),
        {
            "A2Q": {16: 94.2, 15: 94.2, 14: 92.6, 13: 89.8, 12: 83.9},
            "A2Q+": {16: 94.2, 15: 94.1, 14: 94.1, 13: 92.8, 12: 90.6},
        },
    ),
)


def beside(group: Group) -> list[Column]:
    """The columns of the same model, if there are any of the same data; else of its family on the same data."""
    model, data = _plain(group.shared["model"]), _plain(group.shared["data"])
    same = [c for c in COLUMNS if _family(c) + _depth(c) in model and c.metric == group.shared["metric"]]
    there = [c for c in same if _plain(c.data)[:3] == data[:3]]
    return there or same or [c for c in COLUMNS if _family(c) in model and _plain(c.data)[:3] == data[:3]]


def _plain(name: Any) -> str:
    return re.sub("[^a-z0-9]", "", str(name).lower())


def _family(column: Column) -> str:
    return re.split("v?[0-9]", _plain(column.model))[0]


def _depth(column: Column) -> str:
    return "".join(re.findall("[0-9]{2}$", column.model))


@dataclass(frozen=True)
class Fact:
    """Something that must be `same` for numbers to be comparable: what it is called, what it is here, and there."""

    name: str
    here: str
    there: str
    same: bool


def compared(group: Group, column: Column) -> list[Fact]:
    """What is the same, and what is not."""
    shared = group.shared
    seeds = str(len({run.result["seed"] for run in group.runs}))
    here = "best of " * (len(group.pairs) > 1) + "; ".join(f"{m}, {n}" for m, n in group.pairs)
    floats = " and ".join(f"{value:.2f}" for value in group.references) or "none"
    epochs, reference = str(column.epochs or "not stated"), f"{column.reference:.2f}"
    model = re.sub("cifar$", "", _plain(shared["model"])) == _plain(column.model) and shared["width"] == 1
    data = _plain(shared["data"]).replace("bsds", "bsd") == _plain(column.data)
    return [
        Fact("model", group.model, column.model, model),
        Fact("data", str(shared["data"]), column.data, data),
        Fact("judged on", str(shared["split"]), "test", shared["split"] == "test"),
        Fact("float network", floats, reference, floats == reference),
        Fact("epochs", f"{shared['epochs']:g}", epochs, f"{shared['epochs']:g}" == epochs),
        Fact("bits of weights, activations", here, column.pairs, here == column.pairs),
        Fact("seeds", seeds, column.seeds, seeds == column.seeds),
    ]
