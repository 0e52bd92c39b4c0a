"""A page about many runs: curves with their numbers, distances between them, layers, and the papers' tables beside.

Every number comes from result.json and certificate.json of a run, averaged over seeds where several are shown.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from accaware.certify.markup import NOTHING, Markup, count, el, facts, page, short, table
from accaware.experiments.curves import METHODS, Curve, Distance, Group, Point, distances
from accaware.experiments.figures import draw
from accaware.experiments.paper import Column, Fact, beside, compared
from accaware.experiments.results import Run, axis

SHOWN = 500  # runs in the list of a group
READING = (
    "P is the width of the accumulator, M the bits of weights, N those of activations. A value is the mean over seeds "
    "± their standard deviation, at the best pair (M, N) of those that were run. All methods but the baseline are "
    "proven to fit P bits for every input; the baseline is drawn at the width that its data types prove safe for the "
    "worst layer (K products of the largest weight and the largest code), and at the width that its trained weights "
    "need, of the worst seed. Bits saved: how much narrower a curve, linear between its points, is where it reaches "
    "the value of the best A2Q+; ≥ where its narrowest point lies above that. Used is the largest share of its side of "
    "the register that a row of a layer can reach."
)


def html(groups: Sequence[Group], title: str) -> str:
    """The groups as one HTML page, to be written as UTF-8."""
    runs = [run for group in groups for run in group.runs]
    unproven = sum(map(_unproven, runs))
    header = el(
        "header",
        el("p", el("bdi", short(title)), class_="kicker"),
        el("h1", f"Accuracy against accumulator width: {count(len(runs), 'run')}"),
        el("p", el("strong", f"NOT proven: {count(unproven, 'run')}, starred below.")) if unproven else NOTHING,
        facts(
            commits=_listed(str(run.result.get("commit")) for run in runs),
            hardware=_listed(map(_hardware, runs)),
            versions=_listed(" ".join(map(" ".join, run.result.get("versions", {}).items())) for run in runs),
        ),
        class_="refuted" if unproven else "proven",
    )
    sections = (_section(number, group) for number, group in enumerate(groups))
    return page(title, header, *sections, el("footer", READING), style=STYLE)


def _unproven(run: Run) -> bool:
    return run.result["method"] != "baseline" and not run.result["holds"]


def _listed(words: Iterable[str]) -> str:
    return short("; ".join(sorted(set(words))), 600)


def _hardware(run: Run) -> str:
    found = run.result.get("hardware", {})
    return f"{found.get('gpu') or found.get('cpu')}, {found.get('cores')} cores"


def _section(number: int, group: Group) -> Markup:
    left_out = f"Left out: {count(group.repeated, 'run')} of the same settings and seed as another one."
    return el(
        "section",
        el("h2", group.title),
        _picture(group),
        el("p", left_out, class_="cut") if group.repeated else NOTHING,
        _wide(f"{axis(group.shared['metric'])} by P", _by_width(group, lambda point: _value(point, group))),
        *_distances(group),
        _wide("Weights that are 0 (%) by P", _by_width(group, _sparsity)),
        *_papers(group),
        *_differing(group),
        *_layers(group),
        _runs(group),
        id=f"group-{number}",
    )


def _picture(group: Group) -> Markup:
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(draw([group], 'svg', dark)).decode()}" for dark in (False, True)
    )
    image = el("img", src=light, alt=f"{group.title}; the numbers are in the tables below")
    source = el("source", srcset=dark, media="screen and (prefers-color-scheme: dark)")
    return el("figure", el("picture", source, image), class_="card")


# Tables --------------------------------------------------------------------------------------------------------------


def _wide(title: str, content: Markup) -> Markup:
    return el("div", el("h3", title), _scroll(title, content))


def _folded(title: str, content: Markup, *after: Markup) -> Markup:
    return el("details", el("summary", title), _scroll(title, content), *after)


def _scroll(title: str, content: Markup) -> Markup:
    return el("div", content, class_="wide", tabindex=0, role="region", aria_label=title)


def _row(heading: str, cells: Iterable[str], **attributes: str | int) -> Markup:
    return el("tr", el("th", heading, scope="row"), *(el("td", cell, **attributes) for cell in cells))


def _figures(headings: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> Markup:
    """A table of numbers."""
    return table(headings, (_row(heading, cells, class_="number") for heading, cells in rows), class_="figures")


def _by_width(group: Group, cell: Callable[[Point], str]) -> Markup:
    """A row for each width, a column for each curve."""
    rows = ((str(bits), (cell(p) if (p := curve.at(bits)) else "" for curve in group.curves)) for bits in group.widths)
    return _figures(("P", *(curve.label for curve in group.curves)), rows)


def _value(point: Point, group: Group) -> Markup:
    star = "*" if any(map(_unproven, point.runs)) else ""
    spread = "" if point.spread is None else f"± {point.spread:.2f}, {len(point.runs)} seeds"
    best = f", best of {point.choices}" if point.choices > 1 else ""
    pair = f"M, N = {point.weight_bits}, {point.act_bits}{best}" if len(group.pairs) > 1 else ""
    return el("div", el("b", f"{point.mean:.2f}{star}"), *(el("small", text) for text in (spread, pair) if text))


def _sparsity(point: Point) -> str:
    return "" if point.sparsity is None else f"{100 * point.sparsity:.1f}"


def _distances(group: Group) -> Iterable[Markup]:
    if found := distances(group):
        rows = ((d.curve, (str(d.bits), f"{d.value:.2f}", saved(d))) for d in found)
        yield _wide("Bits saved", _figures(("curve", "P of the best A2Q+", "its value", "bits saved"), rows))


def saved(distance: Distance) -> str:
    """In words: bits, at least so many, or that the value is not reached."""
    if distance.saved is None:
        return "not reached"
    return f"{'≥ ' if distance.at_least else ''}{distance.saved:.2f}"


def _papers(group: Group) -> Iterable[Markup]:
    for column in beside(group):
        title = f"Beside {column.source}: {column.model}"
        facts = (_row(fact.name, (fact.here, fact.there, _same(fact))) for fact in compared(group, column))
        yield _wide(title, table(("", "here", "there", ""), facts))
        widths = sorted({bits for row in column.rows.values() for bits in row} | set(group.widths), reverse=True)
        headings = (*(f"{c.label}, here" for c in group.curves), *(f"{name}, there" for name in column.rows))
        rows = ((str(bits), _both(bits, group.curves, column)) for bits in widths)
        yield _scroll(title, _figures(("P", *headings), rows))


def _same(fact: Fact) -> str:
    return "same" if fact.same else el("strong", "not the same")


def _both(bits: int, curves: Iterable[Curve], column: Column) -> Iterable[str]:
    yield from (f"{point.mean:.2f}" if (point := curve.at(bits)) else "" for curve in curves)
    yield from (f"{row[bits]:.1f}" if bits in row else "" for row in column.rows.values())


def _differing(group: Group) -> Iterable[Markup]:
    if found := group.differing():
        methods = [method for method in METHODS if any(values[method] for values in found.values())]
        rows = (_row(name, (", ".join(values[method]) for method in methods)) for name, values in found.items())
        yield _wide("Settings that are not the same everywhere", table(("setting", *methods), rows))


def _layers(group: Group) -> Iterable[Markup]:
    """How much of its register each layer uses, for the points whose certificates are at hand."""
    points = [(c.label, p) for c in group.curves for p in c.points if c.method != "baseline" and p.runs[0].layers]
    if names := dict.fromkeys(layer["name"] for _, point in points for layer in point.runs[0].layers):
        rows = (el("tr", el("th", short(n), scope="row"), *(_used(n, point) for _, point in points)) for n in names)
        headings = ("layer", *(f"{label}, P = {point.bits}" for label, point in points))
        yield _folded("Used of the register, by layer (%)", table(headings, rows, class_="figures"))


def _used(name: str, point: Point) -> Markup:
    shares = [layer["utilisation"] for run in point.runs for layer in run.layers if layer["name"] == name]
    if not shares:
        return el("td")
    percent = f"{100 * fmean(shares):.0f}"
    return el("td", percent, class_="number used", style=f"--used:{percent}%")


def _runs(group: Group) -> Markup:
    names = ["method", "acc_bits", "weight_bits", "act_bits", "seed", group.shared["metric"], "sparsity", "bits_needed"]
    names += ["holds", "steps", "seconds"]
    rows = (
        (short(str(run.config.get("out", ""))), (str(run.result.get(name, "")) for name in names))
        for run in group.runs[:SHOWN]
    )
    left = len(group.runs) - SHOWN
    cut = el("p", f"Left out here: {left} more; a CSV file holds all.", class_="cut") if left > 0 else NOTHING
    return _folded(
        f"All {count(len(group.runs), 'run')}, as result.json has them", _figures(("run", *names), rows), cut
    )


# In a terminal -------------------------------------------------------------------------------------------------------


def text(groups: Iterable[Group]) -> str:
    """The values and distances of all groups, as tables in Markdown."""
    out = StringIO()
    console = Console(file=out, width=10_000, color_system=None, markup=False, highlight=False, emoji=False)
    for group in groups:
        values = Table("P", *(curve.label for curve in group.curves), box=box.MARKDOWN)
        for bits in group.widths:
            values.add_row(str(bits), *(_plain(p) if (p := curve.at(bits)) else "" for curve in group.curves))
        saves = Table("curve", "P of the best A2Q+", "its value", "bits saved", box=box.MARKDOWN)
        for d in distances(group):
            saves.add_row(d.curve, str(d.bits), f"{d.value:.2f}", saved(d))
        console.print(f"{group.title}: {axis(group.shared['metric'])}", values, *([saves] if saves.rows else []))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _plain(point: Point) -> str:
    star = "*" if any(map(_unproven, point.runs)) else ""
    spread = f" ± {point.spread:.2f} ({len(point.runs)} seeds)" if point.spread is not None else ""
    return f"{point.mean:.2f}{star}{spread}"


STYLE = """
h3{display:block;margin:1.6rem 0 .4rem}section .wide{margin-bottom:.8rem}b{font-weight:600}
.wide{width:fit-content;max-width:100%}.wide table{min-width:0;width:auto}.wide strong{color:var(--unproven)}
.wide tbody th,.wide td,.wide td:last-child,.wide td:nth-child(3){width:auto;min-width:0;overflow-wrap:normal}
.figures th{overflow-wrap:normal}.figures thead th:not(:first-child){max-width:12rem;text-align:right}
td small{display:block;white-space:nowrap}
figure.card{margin:.6rem 0 0}figure.card img{display:block;width:100%;max-width:72rem;margin:auto}
summary{cursor:pointer;margin:1.2rem 0 .4rem;font-weight:600}
.used{background:linear-gradient(to right,var(--spare) var(--used),transparent var(--used))}
"""
