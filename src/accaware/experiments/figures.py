"""Figures of groups of runs with matplotlib: accuracy against accumulator width, and sparsity beside it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MultipleLocator

from accaware.experiments.curves import BY_TYPE, Group
from accaware.experiments.results import axis

#: Colours by method, of ink, of lines in the background, and of the page; on light pages and on dark ones.
LIGHT = {"projected": "#1f66b0", "a2q+": "#c8501e", "a2q": "#7a5195", "baseline": "#57606a"}
LIGHT |= {"ink": "#1c2128", "rule": "#d8dde3", "page": "#ffffff"}
DARK = {"projected": "#6cace8", "a2q+": "#f0905a", "a2q": "#bb98d8", "baseline": "#9aa5b1"}
DARK |= {"ink": "#e6eaef", "rule": "#2e3641", "page": "#171c23"}
MARKERS, DASHES = "osD^vPX<>p*h", ("-", "--", ":", "-.")
INSIDE = 8  # entries of a legend that leave the curves room; a longer one stands below them
COLUMNS = 3  # of such a legend
HEIGHT, ROW = 4.4, 0.2  # inches, of a figure and of a row of the legend below it
NAMED = 9  # pairs (M, N) that fit a line


def draw(groups: Sequence[Group], kind: str, dark: bool = False) -> bytes:
    """A picture of the groups, one below the other. kind: "png" or "svg"; the same runs give the same bytes of SVG."""
    colours = DARK if dark else LIGHT
    style: Any = {}
    for names, colour in (
        (("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "ink"),
        (("axes.edgecolor", "grid.color", "legend.edgecolor"), "rule"),
        (("figure.facecolor", "axes.facecolor", "legend.facecolor"), "page"),
    ):
        style |= dict.fromkeys(names, colours[colour])
    style |= {"font.size": 10, "svg.hashsalt": "accaware", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        heights = [_height(group) for group in groups]
        figure = Figure(figsize=(10.5, sum(heights)), layout="constrained")
        parts: Any = [figure]
        if len(groups) > 1:
            parts = figure.subfigures(len(groups), squeeze=False, height_ratios=heights)[:, 0]
        for group, part in zip(groups, parts, strict=True):
            left, right = part.subplots(1, 2, width_ratios=(3, 2))
            _accuracy(left, group, colours)
            _sparsity(right, group, colours)
            _legend(part, left)
        out = io.BytesIO()
        about = {"Date": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=150, metadata=about)
    return out.getvalue()


def _height(group: Group) -> float:
    entries = len(group.curves) + bool(group.references)
    return HEIGHT + (ROW * math.ceil(entries / COLUMNS) if entries > INSIDE else 0)


def _title(group: Group) -> str:
    """With the pairs (M, N), where a curve may go from one to another."""
    names = [f"W{m}A{n}" for m, n in group.pairs]
    if len(names) == 1:
        return group.title
    listed = ", ".join(names) if len(names) <= NAMED else f"{len(names)} pairs, {names[0]} to {names[-1]}"
    return f"{group.title}\neach point is the best that was run there of {listed}"


def _accuracy(axes: Axes, group: Group, colours: dict[str, str]) -> None:
    for number, curve in enumerate(group.curves):
        bits, means = [p.bits for p in curve.points], [p.mean for p in curve.points]
        spreads = [p.spread or 0 for p in curve.points]
        axes.errorbar(bits, means, spreads if any(spreads) else None, capsize=3, **_line(group, number, colours))
    for number, value in enumerate(group.references):
        label = "float" if number == 0 else None
        axes.axhline(value, color=colours["ink"], linewidth=1, linestyle=(0, (1, 2)), label=label)
    _finish(axes, group, axis(group.shared["metric"]))
    axes.set_title(_title(group), fontsize=10, loc="left")


def _legend(part: Figure | SubFigure, axes: Axes) -> None:
    entries = axes.get_legend_handles_labels()
    if len(entries[0]) <= INSIDE:
        axes.legend(fontsize=8.5)
    else:
        part.legend(*entries, fontsize=8.5, loc="outside lower left", ncols=COLUMNS)


def _sparsity(axes: Axes, group: Group, colours: dict[str, str]) -> None:
    for number, curve in enumerate(group.curves):
        known = [(p.bits, 100 * p.sparsity) for p in curve.points if p.sparsity is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **_line(group, number, colours))
    _finish(axes, group, "weights that are 0 (%)")


def _finish(axes: Axes, group: Group, label: str) -> None:
    axes.set_xlabel("accumulator width P (bits)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MultipleLocator(1 if group.widths[0] - group.widths[-1] < 16 else 2))
    axes.grid(linewidth=0.6)


def _line(group: Group, number: int, colours: dict[str, str]) -> dict[str, Any]:
    """A method's colour; its curves differ in markers and dashes. What the types prove is hollow."""
    curve = group.curves[number]
    before = sum(other.method == curve.method for other in group.curves[:number])
    hollow = {"markerfacecolor": colours["page"]} if curve.label.startswith(BY_TYPE) else {}
    dashes, marker = DASHES[before % len(DASHES)], MARKERS[before % len(MARKERS)]
    colour = colours.get(curve.method, colours["ink"])
    return {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 5, "label": curve.label} | hollow
