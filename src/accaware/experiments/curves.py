"""Runs as curves: accuracy against accumulator width for each method, the best over M and N, seeds averaged."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accaware.experiments.results import LOWER_IS_BETTER, Run
from accaware.experiments.settings import FREE_ON_RESUME, TRAIN_ONLY

#: Runs that differ in these are never drawn in one picture.
SAME = ("model", "width", "data", "metric", "split", "command", "epochs", "limit_train")
#: The axes of a curve, and what says where a run lies. (`acc_bits` holds the patterns of single layers only.)
_AXES = {"method", "weight_bits", "act_bits", "seed", *SAME} | (FREE_ON_RESUME - {"checkpoint"})
#: What may be chosen anew at each point of a curve.
_TUNED = TRAIN_ONLY | {"init"}
METHODS = ("projected", "a2q+", "a2q", "baseline")
BY_TYPE, EXACT = "baseline, width by data type", "baseline, width by its weights"


@dataclass(frozen=True)
class Point:
    """One width (bits): the runs, one for each seed, of the best of `choices` pairs (M, N)."""

    bits: int
    runs: tuple[Run, ...]
    choices: int

    @property
    def mean(self) -> float:
        """Over the seeds, in the unit of the metric."""
        return statistics.fmean(run.value for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (of a sample); None for one seed."""
        return statistics.stdev(run.value for run in self.runs) if len(self.runs) > 1 else None

    @property
    def sparsity(self) -> float | None:
        """Share of weights that are 0, mean over the seeds; None where a run does not know it."""
        found = [run.result["sparsity"] for run in self.runs]
        return None if None in found else statistics.fmean(found)

    @property
    def weight_bits(self) -> int:
        """M."""
        return int(self.runs[0].result["weight_bits"])

    @property
    def act_bits(self) -> int:
        """N."""
        return int(self.runs[0].result["act_bits"])


@dataclass(frozen=True)
class Curve:
    """The points of one method, and of one value of whatever else tells its runs apart, from narrow to wide."""

    label: str
    method: str
    points: tuple[Point, ...]

    def at(self, bits: int) -> Point | None:
        """The point of that width."""
        return next((point for point in self.points if point.bits == bits), None)


@dataclass(frozen=True)
class Group:
    """Runs that may be compared: what they share, by the names of `SAME`, their curves, and how many runs were left out
    because another one has the same settings and seed.
    """

    shared: Mapping[str, Any]
    runs: tuple[Run, ...]
    curves: tuple[Curve, ...]
    repeated: int

    @property
    def title(self) -> str:
        """In words."""
        s = self.shared
        epochs = f"{s['epochs']:g} epoch{'' if s['epochs'] == 1 else 's'}" if s["epochs"] else "no training"
        limit = f", first {s['limit_train']} training images" if s["limit_train"] else ""
        split = "test set" if s["split"] == "test" else f"{s['split']} split"
        return f"{self.model} on {s['data']}, {epochs}{limit}, {split}"

    @property
    def model(self) -> str:
        """Its name, and how many times as wide it is."""
        return self.shared["model"] + (f" x {self.shared['width']:g}" if self.shared["width"] != 1 else "")

    @property
    def widths(self) -> list[int]:
        """All widths, from wide to narrow."""
        return sorted({point.bits for curve in self.curves for point in curve.points}, reverse=True)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (M, N)."""
        return sorted({(run.result["weight_bits"], run.result["act_bits"]) for run in self.runs})

    @property
    def references(self) -> list[float]:
        """What the float networks reach."""
        return sorted({run.reference for run in self.runs if run.reference is not None})

    def differing(self) -> dict[str, dict[str, list[str]]]:
        """Settings that are not the same in all runs: their values by setting and method."""
        found: dict[str, dict[str, list[str]]] = {}
        for name in dict.fromkeys(name for run in self.runs for name in run.settings if name not in _AXES):
            values = [(run.result["method"], _word(run.settings.get(name))) for run in self.runs]
            if len({value for _, value in values}) > 1:
                found[name] = {m: sorted({v for method, v in values if method == m}) for m in METHODS}
        return found


def groups(runs: Iterable[Run]) -> list[Group]:
    """The runs in groups that may be compared, in the order of their first runs."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        values = {**run.settings, **run.result}
        found.setdefault(tuple(values.get(name) for name in SAME), []).append(run)
    return [_group(dict(zip(SAME, key, strict=True)), members) for key, members in found.items()]


def _group(shared: Mapping[str, Any], runs: list[Run]) -> Group:
    unique: dict[Any, Run] = {}
    for run in runs:
        tuning = sorted((name, _word(value)) for name, value in run.settings.items() if name not in _AXES)
        unique.setdefault((_cell(run), tuple(tuning)), run)
    kept = tuple(unique.values())
    methods = dict.fromkeys((*METHODS, *(run.result["method"] for run in kept)))
    curves = [c for m in methods for c in _curves(m, [run for run in kept if run.result["method"] == m])]
    return Group(shared, kept, tuple(curves), len(runs) - len(kept))


def _cell(run: Run) -> tuple[Any, ...]:
    """What makes two runs the same point of a curve: a baseline depends on no accumulator."""
    r = run.result
    bits = None if r["method"] == "baseline" else r["acc_bits"]
    return r["method"], bits, r["weight_bits"], r["act_bits"], r["seed"]


def _curves(method: str, runs: list[Run]) -> list[Curve]:
    """One for each combination of the settings that differ between runs of one point; of those of training as few as
    tell them apart.
    """
    cells: dict[Any, list[Run]] = {}
    for run in runs:
        cells.setdefault(_cell(run), []).append(run)
    names = dict.fromkeys(n for run in runs for n in run.settings if n not in _AXES)
    telling = [name for name in names if any(len({_said(r, [name]) for r in cell}) > 1 for cell in cells.values())]
    for name in [name for name in reversed(telling) if name in _TUNED]:
        others = [other for other in telling if other != name]
        if all(len({_said(r, others) for r in cell}) == len(cell) for cell in cells.values()):
            telling = others
    series: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        series.setdefault(_said(run, telling), []).append(run)
    found = []
    for values, members in series.items():
        suffix = "".join(f", {n} {v}" for n, v in zip(telling, values, strict=True) if _OFF.get(n) != v)
        if method != "baseline":
            found.append(Curve(method + suffix, method, _points(members, lambda seeds: seeds[0].result["acc_bits"])))
            continue
        found.append(Curve(EXACT + suffix, method, _points(members, lambda s: max(r.result["bits_needed"] for r in s))))
        known = [run for run in members if run.type_bits is not None]
        if known:
            found.append(Curve(BY_TYPE + suffix, method, _points(known, lambda seeds: seeds[0].type_bits)))
    return found


def _points(runs: list[Run], width: Any) -> tuple[Point, ...]:
    """Seeds together, then at each width the pair (M, N) of the best mean."""
    cells: dict[Any, list[Run]] = {}
    for run in runs:
        cells.setdefault(_cell(run)[:-1], []).append(run)
    at: dict[int, list[tuple[Run, ...]]] = {}
    for seeds in cells.values():
        at.setdefault(width(seeds), []).append(tuple(seeds))
    points = [[Point(bits, seeds, len(pairs)) for seeds in pairs] for bits, pairs in sorted(at.items())]
    best = min if runs[0].metric in LOWER_IS_BETTER else max
    return tuple(best(choices, key=lambda point: point.mean) for choices in points)


def _said(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(_word(run.settings.get(name)) for name in names)


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join("=".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value) or "none"
    return "none" if value is None else str(value)


#: Settings that are off by default, and how they say so: a label says what a run has, not all that it does without.
_OFF = {name: _word(value) for name, value in Run({}, {}, []).settings.items() if not value or value == "none"}


# Distances -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How many bits less `curve` needs for the `value` of the best curve of another method at `bits`.

    `saved`: bits; a lower bound where `at_least`, since the curve does not go down that far; None where the curve does
    not reach the value.
    """

    curve: str
    bits: int
    value: float
    saved: float | None
    at_least: bool


def distances(group: Group, method: str = "projected", other: str = "a2q+") -> list[Distance]:
    """From every curve of `method` to the front of `other`, the best at each width; linearly interpolated.

    Widths where a narrower one is as good are not on the front. A lower bound that is not above 0 says nothing and is
    left out. None where less is better.
    """
    if group.shared["metric"] in LOWER_IS_BETTER:
        return []
    best: dict[int, float] = {}
    points = [point for curve in group.curves if curve.method == other for point in curve.points]
    for point in sorted(points, key=lambda point: (point.bits, -point.mean)):
        if point.mean > max(best.values(), default=float("-inf")):
            best[point.bits] = point.mean
    found = []
    for curve in group.curves:
        if curve.method == method:
            known = [(point.bits, point.mean) for point in curve.points]
            for bits, value in sorted(best.items(), reverse=True):
                reach = bits_for(known, value)
                saved = None if reach is None else bits - reach
                distance = Distance(curve.label, bits, value, saved, known[0][1] > value)
                if saved is None or saved > 0 or not distance.at_least:
                    found.append(distance)
    return found


def bits_for(curve: Sequence[tuple[int, float]], value: float) -> float | None:
    """The smallest width at which a curve of (bits, value), from narrow to wide and linear between, reaches `value`.

    Its first width where it lies above already, None where it never does.

    >>> bits_for([(9, 80.0), (10, 86.0)], 83.0)
    9.5
    """
    if curve[0][1] >= value:
        return curve[0][0]
    for (left, low), (right, high) in itertools.pairwise(curve):
        if high >= value:
            return left + (right - left) * (value - low) / (high - low)
    return None
