"""The certificate as a page: one HTML file, without scripts or anything from the network, to read, print and pass on.

Names, notes and numbers of a certificate may come from anybody's file. Every string enters the page through `el`,
which escapes it, and whatever can be long is cut at a stated length: no certificate breaks the page or makes it huge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from accaware.certify.certificate import Certificate
from accaware.certify.markup import (
    NOTHING,
    Markup,
    between,
    count,
    el,
    facts,
    integer,
    page,
    percent,
    short,
    stretched,
    svg,
    table,
)
from accaware.certify.proof import Operation, Sums, Verdict, Witness

__all__ = ["html"]

SHOWN = 300  # operations of each kind: inside the request, and outside
BARS, WIDTHS, TAPS = 256, 12, 32  # of a picture of rows, of a histogram, of a witness
PROSE = 600  # characters of a note
ZOOM = 4  # a picture shows sums up to so many times what the register holds

#: In the order of urgency, in which operations are left out last.
MEANING: dict[Verdict, str] = {
    "refuted": "An input overflows the register; it is shown.",
    "unproven": "Neither a proof nor an input that overflows was found.",
    "proven": "For every input, and in any order of a register's products, no running sum leaves the register.",
    "outside": "Not part of the request and not judged; the width that each operation needs, where it is known.",
}
SYMBOL: dict[Verdict, str] = {"refuted": "✕", "unproven": "?", "proven": "✓", "outside": "○"}
READING = (
    "A register of P bits is two's complement. A row is one output channel (or one phase of a transposed convolution), "
    "K the number of products that it sums; its sums are all that its running sum can come to, start value included. "
    "Used is the largest share of its side of the register that a row reaches; above 100 % it does not fit. Rows and "
    "taps count from 0. Integers are exact, percentages are rounded."
)

_Place = tuple[int, Operation]  # and its index in the certificate


def html(certificate: Certificate, title: str = "Accumulator certificate") -> str:
    """The certificate as one HTML page, of a few megabytes at most; write it as UTF-8.

    Integers are exact where they are shown, percentages are rounded to one decimal. What is left out of a long
    certificate is stated; its JSON holds all. Any text is escaped. Raises nothing for a valid certificate.
    """
    urgent = sorted(enumerate(certificate.operations), key=lambda place: list(MEANING).index(place[1].verdict))
    inside = [place for place in urgent if place[1].verdict != "outside"]
    outside = urgent[len(inside) :]
    parts = [_header(certificate, title), _summary(inside), *_sections(inside), _outside(outside)]
    return page(title, *parts, el("footer", READING))


def _name(op: Operation) -> Markup:
    return el("bdi", short(op.name) or "(no name)", class_="name")


def _badge(verdict: Verdict) -> Markup:
    return el("span", el("span", SYMBOL[verdict], aria_hidden="true"), f" {verdict}", class_=f"badge {verdict}")


def _left_out(shown: list[_Place], places: list[_Place]) -> Markup:
    left = len(places) - len(shown)
    if not left:
        return NOTHING
    text = f"Left out here: {left} of {count(len(places), 'operation')}; the JSON certificate holds all."
    return el("p", text, class_="cut")


# The page ------------------------------------------------------------------------------------------------------------


def _header(certificate: Certificate, title: str) -> Markup:
    counts = Counter(op.verdict for op in certificate.operations)
    links = {v: {"href": f"#{v}"} if counts[v] else {} for v in MEANING}
    tiles = (el("a", el("b", str(counts[v])), " ", _badge(v), **link) for v, link in links.items())
    return el(
        "header",
        el("p", el("bdi", short(title)), class_="kicker"),
        el("h1", _sentence(certificate, counts)),
        _worst(certificate),
        el("ul", *(el("li", tile) for tile in tiles)),
        facts(
            target=short(certificate.target),
            assumes=short(certificate.assumes, 2000),
            bias=f"{certificate.bias} the register" if certificate.target else "",
            inputs_taken_as=short("; ".join(certificate.inputs)),
            sha256=el("code", certificate.sha256),
            tool=short(certificate.tool),
            schema=integer(certificate.schema),
        ),
        class_="proven" if certificate.holds else "refuted",
    )


def _sentence(certificate: Certificate, counts: Counter[Verdict]) -> str:
    total = len(certificate.inside)
    if not total:
        return "Does not hold: no operation is part of the request."
    if certificate.holds:
        each = "the one operation" if total == 1 else f"each of the {total} operations"
        return f"Holds: whatever the input, {each} of the request fits its register."
    found = ", ".join(f"{counts[v]} {v}" for v in MEANING if v != "outside" and counts[v])
    return f"Does not hold: {found} of {count(total, 'operation')} of the request."


def _worst(certificate: Certificate) -> Markup:
    known = [(op.bits_needed, op) for op in certificate.inside if op.bits_needed is not None]
    if not known:
        return el("p", "What the worst operation needs is unknown.") if certificate.inside else NOTHING
    bits, op = max(known, key=lambda pair: pair[0])
    register = f" (its register has {op.target.bits})" if op.target else ""
    equal, unknown = sum(width == bits for width, _ in known) - 1, len(certificate.inside) - len(known)
    rest = f" and {equal} more" if equal else ""
    rest += f"; what {count(unknown, 'other operation')} may need is unknown." if unknown else "."
    return el("p", f"The worst operation needs {count(bits, 'bit')}{register}: ", _name(op), rest)


def _summary(inside: list[_Place]) -> Markup:
    if not inside:
        return NOTHING
    places = sorted(inside[:SHOWN], key=lambda place: place[0])
    registers = [s for _, op in places for s in op.sums()]
    widest, needed = max((s.bits for s in registers), default=1), max((s.bits_needed for s in registers), default=1)
    scale = min(max(widest, needed), 2 * widest)
    rows = (_line(index, op, scale) for index, op in places)
    about = "Operations in the order of the file. Each cell is a bit of the register: filled, its worst row needs it; "
    about += "pale, it is to spare; low and red, it is missing."
    about += f" Bars are cut at {scale} bits." if needed > scale else ""
    headings = "operation", "bits that the worst row needs", "used", "verdict"
    bits = table(headings, rows, class_="bits")
    return el("section", el("h2", "Bits needed"), el("p", about), _left_out(places, inside), bits)


def _line(index: int, op: Operation, scale: int) -> Markup:
    name = el("th", el("a", _name(op), href=f"#op-{index}"), " ", el("small", short(op.kind)), scope="row")
    registers: list[str] = [*(_cells(s, label, scale) for label, s in _registers(op))] or [_needs(op)]
    used = percent(_used(op)[0]) if op.target else ""
    return el("tr", name, el("td", *registers), el("td", used, class_="number"), el("td", _badge(op.verdict)))


def _cells(sums: Sums, label: str, scale: int) -> Markup:
    """A register as a row of bits: dashed lines, each dash a bit."""
    bits, needs = sums.bits, min(sums.bits_needed, scale)
    parts = [el("path", class_="need", d=f"M0 .5H{min(needs, bits)}")]
    if needs != bits:
        part = ("spare", f"M{needs} .5H{bits}") if needs < bits else ("over", f"M{bits} .75H{needs}")
        parts.append(el("path", class_=part[0], d=part[1]))
    text = f"{label}{sums.bits_needed} of {bits}"
    picture = svg(text, "bits needed, of bits in the register", *parts, **stretched(scale, 1))
    return el("div", picture, el("span", text), class_="cells")


def _opening(verdict: Verdict, places: list[_Place]) -> list[Markup]:
    heading = f"{verdict.capitalize()}{' the request' if verdict == 'outside' else ''}: {len(places)}"
    return [el("h2", heading), el("p", MEANING[verdict])]


def _sections(inside: list[_Place]) -> Iterable[Markup]:
    for verdict in MEANING:
        if places := [place for place in inside if place[1].verdict == verdict]:
            shown = [place for place in inside[:SHOWN] if place[1].verdict == verdict]
            cards = el("div", *(_card(index, op) for index, op in shown), class_="cards")
            yield el("section", *_opening(verdict, places), _left_out(shown, places), cards, id=verdict)


def _outside(places: list[_Place]) -> Markup:
    if not places:
        return NOTHING
    rows = []
    for index, op in places[:SHOWN]:
        known = [integer(op.fan_in), _codes(op), _register(op) + _tiles(op, "; tiles ")] if op.target else [""] * 3
        cells = (_needs(op), short(op.kind), *known, el("bdi", short(op.note, PROSE)))
        rows.append(el("tr", el("th", _name(op), scope="row"), *(el("td", c) for c in cells), id=f"op-{index}"))
    listed = table(("operation", "needs", "kind", "K", "codes", "register", "note"), rows)
    scrolls = el("div", listed, class_="wide", tabindex=0, role="region", aria_label="Operations outside the request")
    return el("section", *_opening("outside", places), _left_out(places[:SHOWN], places), scrolls, id="outside")


# One operation -------------------------------------------------------------------------------------------------------


def _card(index: int, op: Operation) -> Markup:
    heading = el("h3", el("span", _name(op), " ", el("small", short(op.kind))), _badge(op.verdict))
    said = [(label, text) for label, text in (("Why: ", op.reason), ("Note: ", op.note)) if text]
    parts = [el("p", el("strong", label), el("bdi", short(text, PROSE)), class_="said") for label, text in said]
    if op.witness:
        parts.insert(0, _witness(op, op.witness))
    if op.target is None:
        parts.append(facts(needs=_needs(op), set=short(op.method)))
    else:
        parts.append(el("div", _numbers(op), _histogram(op), class_="numbers"))
        parts += [_headroom(s, label) for label, s in _registers(op)]
    return el("article", heading, *parts, id=f"op-{index}", class_="card")


def _numbers(op: Operation) -> Markup:
    assert op.target is not None
    share, end, limit, row = _used(op)
    inner, *outer = (between(min(s.lo), max(s.hi)) for s in op.sums())
    start = f"{integer(min(op.preload))} to {integer(max(op.preload))}" if op.preload else "0"
    return facts(
        K=integer(op.fan_in),
        codes=_codes(op),
        register=_register(op),
        tiles=_tiles(op),
        starts_at=f"{start}{', chosen freely' if op.target.preload == 'free' else ''}",
        sums=inner,
        outer_sums="".join(outer),
        needs=_needs(op),
        used=f"{percent(share)}: {integer(end)} of {limit}, row {row}",
        zeros=f"{percent(Fraction(op.sparsity))} of the weights",
        zero_channels=f"{integer(op.zero_channels)} of {count(len(op.lo), 'row')}",
        set=short(op.method),
        repaired=f"{count(op.repaired, 'row')}, by the exact check" if op.repaired else "",
    )


def _used(op: Operation) -> tuple[Fraction, int, int, int]:
    """The largest share of a side of the accumulator that a row reaches; that sum, that side's limit, and the row."""
    assert op.target is not None
    ends = (max(op.hi), op.target.hi, op.hi), (min(op.lo), op.target.lo, op.lo)
    return max(((Fraction(end, limit), end, limit, sums.index(end)) for end, limit, sums in ends), key=lambda s: s[0])


def _histogram(op: Operation) -> Markup:
    assert op.target is not None
    counts = Counter(op.row_bits)
    most, widths, rows = max(counts.values()), sorted(counts, reverse=True), []
    for bits in widths[:WIDTHS]:
        kind, mark, fits = ("over", " !", "does not fit") if bits > op.target.bits else ("need", "", "fits")
        bar = el("path", class_=kind, d=f"M0 .5H{counts[bits] * 1000 // most}")
        text = f"{count(counts[bits], 'row')} of {count(bits, 'bit')}"
        picture = svg(text, f"{fits} the register", bar, **stretched(1000, 1))
        cells = el("td", str(counts[bits]), class_="number"), el("td", picture)
        rows.append(el("tr", el("th", f"{bits}{mark}", scope="row"), *cells))
    rest = sum(counts[bits] for bits in widths[WIDTHS:])
    caption = f"Rows by the bits they need{'; ! does not fit' if widths[0] > op.target.bits else ''}"
    caption += f"; {count(rest, 'row')} of fewer bits left out" if rest else ""
    return table(("bits", "rows", ""), rows, el("caption", caption), class_="histogram")


def _headroom(sums: Sums, label: str) -> Markup:
    """Every row from its smallest to its largest sum, against the register, or against what of it is needed."""
    rows, needs = len(sums.lo), sums.bits_needed
    bits = needs if needs < sums.bits - 3 else sums.bits  # else the bars would be flat
    step = -(-rows // BARS)
    bars = [(min(sums.lo[i : i + step]), max(sums.hi[i : i + step])) for i in range(0, rows, step)]
    each = f"{step} neighbouring rows a bar, from their" if step > 1 else "each a bar from its"
    text = f"{label}{count(rows, 'row')} in the order of the file, {each} smallest to {each.split()[-1]} largest sum"
    limits = f"Dashed: the limits of {count(bits, 'bit')}"
    limits += f", all that is needed of {sums.bits}." if bits < sums.bits else "."
    limits += " Bars that leave the picture are cut." if max(-min(sums.lo), max(sums.hi)) > _reach(bits) else ""
    about = f"Sums in {between(min(sums.lo), max(sums.hi))}. {limits}"
    picture = svg(text, about, *_bars(bars, bits), class_="rows" if len(bars) <= 64 else "dense")
    return el("figure", picture, el("figcaption", f"{text}. {limits}"))


def _reach(bits: int) -> int:
    """The largest sum that a picture of a register shows."""
    return ZOOM << (bits - 1)


def _bars(bars: list[tuple[int, int]], bits: int) -> list[Markup]:
    floor, ceiling, reach = -(1 << (bits - 1)), (1 << (bits - 1)) - 1, _reach(bits)
    bottom = max(min(floor, *(lo for lo, _ in bars)), -reach)
    top = min(max(ceiling, *(hi for _, hi in bars)), reach)

    def height(value: int) -> int:
        return (top - min(max(value, bottom), top)) * 920 // (top - bottom) + 40  # of 1000, with a margin

    def path(kind: str, parts: Iterable[tuple[int, int, int]]) -> Markup:
        ends = ((i, height(lo), height(hi)) for i, lo, hi in parts)
        return el("path", class_=kind, d="".join(f"M{i}.5 {high}V{max(low, high + 6)}" for i, low, high in ends))

    rows = [(i, lo, hi) for i, (lo, hi) in enumerate(bars)]
    fits = [(i, max(lo, floor), min(hi, ceiling)) for i, lo, hi in rows if lo <= ceiling and hi >= floor]
    over = [(i, max(lo, ceiling), hi) for i, lo, hi in rows if hi > ceiling]
    over += [(i, lo, min(hi, floor)) for i, lo, hi in rows if lo < floor]
    power = f"2^{bits - 1}"
    names = (str(ceiling), str(floor)) if bits <= 24 else (f"{power} - 1", f"-{power}")
    limits = [_limit(height(edge), name) for edge, name in zip((ceiling, floor), names, strict=True)]
    return [el("svg", path("need", fits), path("over", over), **stretched(len(bars), 1000)), *limits]


def _limit(height: int, name: str) -> Markup:
    y = f"{height / 10:.1f}%"
    return Markup(el("line", x1=0, x2="100%", y1=y, y2=y) + el("text", name, x=-6, y=y, dy=4))


def _witness(op: Operation, found: Witness) -> Markup:
    assert op.target is not None
    outer = found.register == "outer"
    limit = 2 ** ((op.target.outer_bits if outer else op.target.bits) - 1)
    wraps = op.target.overflow == "wrap" or (outer and op.raw)  # raw codes are corrected modulo 2^outer_bits
    then = f"wraps around to {integer((found.value + limit) % (2 * limit) - limit)}" if wraps else "saturates"
    text = f"Row {found.row} comes to {integer(found.value)}; the {'outer ' if outer else ''}register holds "
    text += f"{between(-limit, limit - 1)} and {then}"
    zero = f", zero point {integer(found.zero_point)}" if found.zero_point else ""
    cut = f" … {len(found.inputs) - TAPS} more in the JSON certificate" if len(found.inputs) > TAPS else ""
    inputs = el("code", " ".join(map(integer, found.inputs[:TAPS])))
    codes = el("p", f"Input codes (taps in {op.target.order} order{zero}): ", inputs, cut)
    return el("div", el("p", el("strong", f"{text}.")), codes, class_="witness")


def _registers(op: Operation) -> list[tuple[str, Sums]]:
    sums = op.sums()
    return list(zip(("inner: ", "outer: ") if len(sums) > 1 else ("",), sums, strict=False))


def _register(op: Operation) -> str:
    assert op.target is not None
    t = op.target
    return f"{t.bits} bits, {t.overflow}s, {between(t.lo, t.hi)}"


def _tiles(op: Operation, before: str = "") -> str:
    if op.target is None or op.target.tile is None:
        return ""
    order = "in any order" if op.target.order == "any" else f"in {op.target.order} order"
    return f"{before}of {count(op.target.tile, 'product')}, {order}; outer register of {op.target.outer_bits} bits"


def _needs(op: Operation) -> str:
    if op.bits_needed is None:
        return "unknown"
    return f"{count(op.bits_needed, 'bit')}{''.join(f', outer {s.bits_needed}' for s in op.sums()[1:])}"


def _codes(op: Operation) -> str:
    assert op.codes is not None
    low, high = min(op.zero_points), max(op.zero_points)
    zero = f"zero point {integer(low)}" if low == high else f"zero point from {integer(low)} to {integer(high)}"
    used = "multiplied raw" if op.raw else "centred"
    return f"{between(op.codes.lo, op.codes.hi)}, {used}{f'; {zero}' if (low, high) != (0, 0) else ''}"
