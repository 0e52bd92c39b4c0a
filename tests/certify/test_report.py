"""The page of a certificate: its numbers are the certificate's, whatever the certificate says of names and sizes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accaware.bounds import bits_needed
from accaware.certify.certificate import Certificate, Operation, outside, prove
from accaware.certify.report import BARS, SHOWN, TAPS, html
from accaware.formats import Accumulator, IntFormat
from accaware.integer.emulate import emulate
from accaware.integer.layer import IntegerLayer
from pages import Page, browse, shown, text

SHA = "0123456789abcdef" * 4
VERDICTS = "refuted", "unproven", "proven", "outside"


def layer(name: str, rows: Any, bits: int = 8, **changes: Any) -> IntegerLayer:
    rows = np.array(rows)
    fields: dict[str, Any] = {
        "codes": IntFormat.unsigned(4),
        "accumulator": Accumulator(bits),
        "preload": np.zeros((), int),
        "scale": np.ones(len(rows)),
        "act_scale": 1.0,
        "inside": True,
        "method": "projected",
    }
    return IntegerLayer(name, "Linear", rows, **(fields | changes))


def layers() -> list[IntegerLayer]:
    pairs = Accumulator(16, "saturate", tile=2, outer_bits=32, order="hwc")
    u8 = IntFormat.unsigned(8)
    many = np.random.default_rng(0).integers(-7, 8, (300, 3))
    return [
        layer("safe", [[8, -8, 0], [0, 0, 0]], repaired=1),
        layer("unsafe", [[1, 1, 1], [8, 1, -1]], note="tight"),
        layer("pairs", [[100, 100, -3], [1, -127, -127]], codes=u8, accumulator=pairs, zero_points=(3, 250), raw=True),
        layer("spills", [[8, -8, 8]], accumulator=Accumulator(8, tile=1, outer_bits=8)),
        layer("biased", [[8, -8]], 9, preload=[-7], zero_points=(2,)),
        layer("offset", [[1, -1]], 4, codes=IntFormat(7, 9)),
        layer("many", many, 9, accumulator=Accumulator(9, preload="free"), preload=np.arange(300) % 5),
        layer("long", [[1] * 50] * 3, 9),
        layer("idle", [[0]], 2),
        layer("head", [[100]], 32, inside=False, method="baseline", note="kept"),
    ]


def certificate() -> Certificate:
    others = [
        outside("pool", "AvgPool2d", 10, "sum of 64 codes"),
        outside("add", "add", None, "float"),
        Operation("foreign", "vendor.Op", "unproven", reason="its weights cannot be read"),
    ]
    return Certificate.of(layers(), others, sha256=SHA)


# Reading the page back


def facts(element: Element) -> dict[str, str]:
    return {text(pair[0]): text(pair[1]) for pair in element.findall(".//dl/div")}


def check(page: Page, cert: Certificate) -> None:
    """Every number that the page shows is the certificate's."""
    counts = Counter(op.verdict for op in cert.operations)
    tiles = [text(tile).split() for tile in page.find("li")]
    assert [(number, v) for number, _, v in tiles] == [(str(counts[v]), v) for v in VERDICTS]
    head = facts(page.find("header")[0])
    assert (head["sha256"], head["tool"], head["schema"]) == (cert.sha256, cert.tool, str(cert.schema))
    inside = [(i, op) for i, op in enumerate(cert.operations) if op.verdict != "outside"]
    table = page.find("table[@class='bits']/tbody/tr")
    assert len(table) == len(inside)
    for row, (i, op) in zip(table, inside, strict=True):
        check_line(row, i, op)
        check_card(page.at(f"op-{i}"), op)
    for i, op in enumerate(cert.operations):
        if op.verdict == "outside":
            check_outside(page.at(f"op-{i}"), op)


def check_line(row: Element, i: int, op: Operation) -> None:
    name, needs, used, verdict = row
    assert (text(name), text(verdict).split()[1]) == (f"{op.name} {op.kind}", op.verdict)
    assert name[0].get("href") == f"#op-{i}"
    labels = ["inner: ", "outer: "] if len(op.sums()) > 1 else [""]
    wanted = [f"{label}{s.bits_needed} of {s.bits}" for label, s in zip(labels, op.sums(), strict=False)]
    assert [text(span) for span in needs.iter("span")] == wanted
    assert wanted or text(needs) == "unknown"
    for picture, s in zip(needs.iter("svg"), op.sums(), strict=True):
        ends = [[float(x) for x in re.findall(r"M(\S+) \S+H(\S+)", p.get("d", ""))[0]] for p in picture.iter("path")]
        assert ends[0] == [0, min(s.bits, s.bits_needed)]
        scale = int(picture.get("viewbox", "").split()[2])
        assert ends[1:] == ([] if s.bits == s.bits_needed else [sorted([s.bits, min(s.bits_needed, scale)])])
    if op.target:
        check_share(text(used), op)


def check_share(percent: str, op: Operation) -> Fraction:
    """The largest share of the register that a row reaches, to one decimal."""
    assert op.target
    share = max(Fraction(max(op.hi), op.target.hi), Fraction(min(op.lo), op.target.lo))
    assert re.fullmatch(r"-?\d+\.\d %", percent)
    assert abs(Fraction(percent[:-2]) - 100 * share) <= Fraction("0.05")
    return share


def check_card(card: Element, op: Operation) -> None:
    words = " ".join(shown(card).split())
    assert words.startswith(f"{op.name} {op.kind}")
    assert (f"Why: {op.reason}" in words, f"Note: {op.note}" in words) == (bool(op.reason), bool(op.note))
    found = facts(card)
    if op.target is None or op.codes is None:
        assert found == {"needs": "unknown"}
        return
    t, inner = op.target, op.sums()[0]
    assert found["K"] == str(op.fan_in)
    low, high = min(op.zero_points), max(op.zero_points)
    zero = "" if low == high == 0 else f"; zero point {low}" if low == high else f"; zero point from {low} to {high}"
    used = "multiplied raw" if op.raw else "centred"
    assert found["codes"] == f"[{op.codes.lo}, {op.codes.hi}], {used}{zero}"
    assert found["register"] == f"{t.bits} bits, {t.overflow}s, [{t.lo}, {t.hi}]"
    assert ("tiles" in found, "outer sums" in found) == (t.tile is not None, t.tile is not None)
    if t.tile:
        products = f"{t.tile} product{'s' if t.tile > 1 else ''}"
        assert found["tiles"] == f"of {products}, in {t.order} order; outer register of {t.outer_bits} bits"
        assert found["outer sums"] == f"[{min(op.outer_lo)}, {max(op.outer_hi)}]"
    start = f"{min(op.preload)} to {max(op.preload)}" if op.preload else "0"
    assert found["starts at"] == start + (", chosen freely" if t.preload == "free" else "")
    assert found["sums"] == f"[{min(op.lo)}, {max(op.hi)}]"
    bits = f"{op.bits_needed} bit{'' if op.bits_needed == 1 else 's'}"
    assert found["needs"] == bits + "".join(f", outer {s.bits_needed}" for s in op.sums()[1:])
    percent, end, limit, row = re.findall(r"(\S+ %): (\S+) of (\S+), row (\S+)", found["used"])[0]
    assert Fraction(int(end), int(limit)) == check_share(percent, op)
    assert int(end) in (op.lo[int(row)], op.hi[int(row)])
    assert found["zeros"] == f"{op.sparsity:.1%} of the weights".replace("%", " %")
    assert found["zero channels"] == f"{op.zero_channels} of {len(op.lo)} row{'s' if len(op.lo) > 1 else ''}"
    assert found.get("set", "") == op.method
    assert found.get("repaired", "0").split()[0] == str(op.repaired)
    histogram = {shown(row[0]): shown(row[1]) for row in card.findall(".//table/tbody/tr")}
    widths = Counter(bits_needed(lo, hi) for lo, hi in zip(inner.lo, inner.hi, strict=True))
    assert histogram == {f"{b}{' !' if b > t.bits else ''}": str(n) for b, n in widths.items()}
    assert len(card.findall(".//figure")) == len(op.sums())
    if op.witness:
        w = op.witness
        assert f"Row {w.row} comes to {w.value};" in words
        assert f"register holds [{-(2 ** (t.bits - 1))}, {2 ** (t.bits - 1) - 1}] and" in words
        codes = [int(code) for code in text(card.findall(".//code")[0]).split()]
        assert codes == list(w.inputs[:TAPS])
        assert (f"… {op.fan_in - TAPS} more in the JSON certificate" in words) == (op.fan_in > TAPS)
        assert (f", zero point {w.zero_point})" in words) == bool(w.zero_point)


def check_outside(row: Element, op: Operation) -> None:
    name, needs, kind, taps, codes, register, note = map(text, row)
    assert (name, kind, note) == (op.name, op.kind, op.note)
    assert needs == ("unknown" if op.bits_needed is None else f"{op.bits_needed} bits")
    if op.target and op.codes:
        assert taps == str(op.fan_in)
        assert codes == f"[{op.codes.lo}, {op.codes.hi}], centred"
        assert register == f"{op.target.bits} bits, {op.target.overflow}s, [{op.target.lo}, {op.target.hi}]"


def links(page: Page) -> set[str]:
    return {link.removeprefix("#") for a in page.find("a") if (link := a.get("href"))}


def heading(cert: Certificate) -> str:
    return text(Page(html(cert)).find("h1")[0])


# What the page says


def test_every_number_is_the_certificates() -> None:
    check(Page(html(certificate())), certificate())


def test_the_parts_of_a_page() -> None:
    page = Page(html(certificate(), "net.onnx"))
    assert text(page.find("head/title")[0]) == text(page.find("header/p")[0]) == "net.onnx"
    ids = [element.get("id") for element in page.root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert links(page) <= set(ids)
    headings = ["Refuted: 5", "Unproven: 2", "Proven: 3", "Outside the request: 3"]
    assert [text(h) for h in page.find("h2")] == ["Bits needed", *headings]
    for verdict, number in zip(VERDICTS, (5, 2, 3, 3), strict=True):
        section = page.at(verdict)
        assert len(section.findall(".//article") or section.findall(".//tbody/tr")) == number


def test_the_page_needs_nothing_else() -> None:
    page = Page(html(certificate()))
    assert {e.tag for e in page.root.iter()}.isdisjoint({"script", "img", "iframe", "object", "form", "base"})
    links = [v for e in page.root.iter() for name, v in e.items() if name in ("href", "src") or name.startswith("on")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    (policy,) = (e.get("content") for e in page.find("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = text(page.find("style")[0])
    assert "url(" not in style
    assert "@import" not in style
    assert style.count("{") == style.count("}")


def test_the_page_reads_without_colours_and_aloud() -> None:
    page = Page(html(certificate()))
    for picture in page.find("svg"):
        if picture.get("role"):
            assert [child.tag for child in picture[:2]] == ["title", "desc"]
            assert all(map(text, picture[:2]))
    tables = page.find("table")
    assert all(cell.get("scope") == "col" for t in tables for cell in t.findall("thead/tr/th"))
    assert all(row[0].tag == "th" and row[0].get("scope") == "row" for t in tables for row in t.findall("tbody/tr"))
    badges = {text(badge) for badge in page.find("span") if "badge" in badge.get("class", "")}
    assert badges == {"✕ refuted", "? unproven", "✓ proven", "○ outside"}
    assert (page.root.get("lang"), len(page.find("h1")), len(page.find("main"))) == ("en", 1, 1)


def test_the_verdict_is_one_sentence() -> None:
    safe, head = layer("safe", [[8]]), layer("head", [[100]], inside=False)
    bad, odd = layer("bad", [[9]]), layer("odd", [[1, -1]], 4, codes=IntFormat(7, 9))
    for given_layers, sentence in [
        ([safe, head], "Holds: whatever the input, the one operation of the request fits its register."),
        ([safe] * 3, "Holds: whatever the input, each of the 3 operations of the request fits its register."),
        ([head], "Does not hold: no operation is part of the request."),
        ([], "Does not hold: no operation is part of the request."),
        ([bad], "Does not hold: 1 refuted of 1 operation of the request."),
        ([safe, odd], "Does not hold: 1 unproven, 1 proven of 2 operations of the request."),
        ([bad, safe, odd, bad], "Does not hold: 2 refuted, 1 unproven, 1 proven of 4 operations of the request."),
    ]:
        cert = Certificate.of(given_layers, sha256=SHA)
        page = Page(html(cert))
        assert heading(cert) == sentence
        assert page.find("header")[0].get("class") == ("proven" if cert.holds else "refuted")


def test_the_width_of_the_worst_operation() -> None:
    def worst(*operations: Operation) -> str:
        page = Page(html(Certificate(1, "x", SHA, operations)))
        return " ".join(text(p) for p in page.find("header/p")[1:])

    safe, bad = prove(layer("safe", [[8]])), prove(layer("bad", [[99]]))
    unknown = Operation("foreign", "Op", "unproven", reason="who knows")
    assert worst(safe, bad) == "The worst operation needs 12 bits (its register has 8): bad."
    assert worst(safe, safe, safe) == "The worst operation needs 8 bits (its register has 8): safe and 2 more."
    assert worst(bad, unknown).endswith("bad; what 1 other operation may need is unknown.")
    assert worst(replace(unknown, bits_needed=9)) == "The worst operation needs 9 bits: foreign."
    assert worst(unknown) == "What the worst operation needs is unknown."
    assert worst(outside("add", "add", 5, "")) == ""


def test_a_wrapped_sum_is_what_the_register_delivers() -> None:
    page, cert = Page(html(certificate())), certificate()
    wrapped = 0
    for i, (integers, op) in enumerate(zip(layers(), cert.operations, strict=False)):
        if op.witness is None:
            continue
        words = " ".join(shown(page.at(f"op-{i}")).split())
        found = re.search(r"wraps around to (-?\d+)\.", words)
        if found is None:
            assert integers.accumulator.overflow == "saturate"
            assert "and saturates." in words
        else:
            wrapped += 1
            sums = emulate(integers, [op.witness.inputs], op.witness.zero_point).sums[0]
            assert int(found[1]) == sums[op.witness.row] + integers.starts[op.witness.row].sum()
    assert wrapped == 4


# Pictures of rows


def bars(figure: Element, kind: str) -> dict[int, tuple[int, int]]:
    """Bar -> height of its upper and lower end, from 0 at the top to 1000."""
    (path,) = (p for p in figure.iter("path") if p.get("class") == kind)
    found = re.findall(r"M(\d+)\.5 (\d+)V(\d+)", path.get("d", ""))
    assert "".join(f"M{i}.5 {a}V{b}" for i, a, b in found) == path.get("d")
    return {int(i): (int(a), int(b)) for i, a, b in found}


def limits(figure: Element) -> list[tuple[str, int]]:
    lines = [round(10 * float(line.get("y1", "")[:-1])) for line in figure.iter("line")]
    return list(zip([text(t) for t in figure.iter("text")], lines, strict=True))


def drawn(op: Operation) -> list[Element]:
    return Page(html(Certificate(1, "x", SHA, (op,)))).find("figure")


def test_rows_are_drawn_against_the_register() -> None:
    rows = [[8, -8], [-8, -1], [4, -1], [0, 0], [17, 1]]
    (figure,) = drawn(prove(layer("fc", rows, 8)))
    assert [name for name, _ in limits(figure)] == ["127", "-128"]
    top, bottom = (y for _, y in limits(figure))
    unit = (bottom - top) / 255
    fits, over = bars(figure, "need"), bars(figure, "over")
    assert list(fits) == [0, 1, 2, 3, 4]
    for i, (lo, hi) in {0: (-120, 120), 1: (-128, 0), 2: (-15, 60), 4: (0, 127)}.items():
        assert fits[i][0] == pytest.approx(top + unit * (127 - hi), abs=2)
        assert fits[i][1] == pytest.approx(top + unit * (127 - lo), abs=2)
    assert fits[3][1] - fits[3][0] == 6  # a row of zeros can be seen
    assert list(over) == [4, 1]
    assert over[4] == (pytest.approx(top - unit * (270 - 127), abs=2), top)
    assert over[1] == (bottom, pytest.approx(bottom + unit * (135 - 128), abs=2))
    assert "cut" not in text(figure)


def test_rows_beyond_the_register_have_no_bar_within() -> None:
    (figure,) = drawn(prove(layer("fc", [[1], [1]], 4, preload=[20, -40])))
    assert bars(figure, "need") == {}
    (_, top), (_, bottom) = limits(figure)
    assert 0 <= bars(figure, "over")[0][0] < bars(figure, "over")[0][1] <= top
    assert bottom <= bars(figure, "over")[1][0] < bars(figure, "over")[1][1] <= 1000


def test_many_rows_share_bars() -> None:
    rng = np.random.default_rng(1)
    op = prove(layer("fc", rng.integers(-7, 8, (4096, 3)), 10))
    (figure,) = drawn(op)
    fits, (_, top), (_, bottom) = bars(figure, "need"), *limits(figure)
    assert list(fits) == list(range(256)) == list(range(BARS))
    for i, ends in fits.items():
        part = slice(16 * i, 16 * (i + 1))
        lo, hi = min(op.lo[part]), max(op.hi[part])
        assert ends[0] == pytest.approx(top + (511 - hi) * (bottom - top) / 1023, abs=2)
        assert ends[1] == pytest.approx(top + (511 - lo) * (bottom - top) / 1023, abs=2)
    assert "4096 rows in the order of the file, 16 neighbouring rows a bar" in text(figure)
    assert len(bars(drawn(prove(layer("fc", [[1]] * 257)))[0], "need")) == 129


def test_a_wide_register_is_drawn_as_far_as_it_is_needed() -> None:
    (figure,) = drawn(prove(layer("fc", [[8, -8]], 32)))
    assert [name for name, _ in limits(figure)] == ["127", "-128"]
    assert "the limits of 8 bits, all that is needed of 32." in text(figure)
    (figure,) = drawn(prove(layer("fc", [[2**40]], 49)))
    assert [name for name, _ in limits(figure)] == ["2^44 - 1", "-2^44"]


def test_sums_far_beyond_the_register_are_cut() -> None:
    (figure,) = drawn(prove(layer("fc", [[100], [-100]], 6)))
    assert "Bars that leave the picture are cut." in text(figure)
    assert all(0 <= y <= 1000 for kind in ("need", "over") for ends in bars(figure, kind).values() for y in ends)
    assert limits(figure)[1][1] - limits(figure)[0][1] > 200  # the register can still be seen


# Whatever a file may hold

WEIRD = [
    "<script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    "\"'><b>&amp;&lt;&#60;",
    "a\x00b\x1b[31m\r\n\tc\x7f",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "\ud800 lone",
    "-->]]>",
    "",
    " ",
    "الطبقة ① 層 🧮",
    "x" * 10**6,
    "\x00" * 10**6,
    "&" * 10**6,
]


def named(name: str) -> Certificate:
    """A certificate that says `name` wherever it can."""
    ops = (replace(op, name=name, kind=name, note=name, method=name) for op in certificate().operations)
    ops = (replace(op, reason=name or "?") if op.reason else op for op in ops)
    return Certificate(1, name, SHA, tuple(ops))


def structure(page: Page) -> list[str]:
    """Elements, in order, but for the notes, which may be empty."""
    return [e.tag for e in page.root.iter() if e.get("class") not in ("said",) and e.tag not in ("bdi", "strong", "dt")]


def visible(name: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


@pytest.mark.parametrize("name", WEIRD, ids=range(len(WEIRD)))
def test_weird_names_stay_names(name: str) -> None:
    page = html(named(name), name)
    assert len(page) < 3 * len(html(certificate())) + 10**5
    page.encode()
    parsed = Page(page)
    if name.strip():
        assert structure(parsed) == structure(Page(html(named("plain"), "plain")))
    if 0 < len(name) <= 120:
        assert {"".join(e.itertext()) for e in parsed.find("a/bdi")} == {visible(name)}
        assert "".join(parsed.find("head/title")[0].itertext()) == visible(name)
    elif name:
        assert "(shortened from 1000000 characters)" in text(parsed.find("a/bdi")[0])
    else:
        assert text(parsed.find("a/bdi")[0]) == "(no name)"


ANY = st.text(st.characters(exclude_categories=()), min_size=1, max_size=120)


@given(ANY)
@example("<!--")
@example("a--!>")
@settings(max_examples=60, deadline=None)
def test_any_name_stays_a_name(name: str) -> None:
    op = replace(prove(layer("fc", [[9]])), name=name, kind=name, note=name)
    page = html(Certificate(1, name, SHA, (op, outside(name, name, None, name))), name)
    parsed = Page(page.encode().decode())
    plain = Page(
        html(Certificate(1, "x", SHA, (replace(op, name="x", kind="x", note="x"), outside("x", "x", None, "x"))))
    )
    assert [e.tag for e in parsed.root.iter()] == [e.tag for e in plain.root.iter()]
    assert {"".join(e.itertext()) for e in parsed.find("bdi")} == {visible(name)}
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page) is None


def test_a_hundred_thousand_operations_are_capped() -> None:
    proven, bad = prove(layer("fc", [[8]])), prove(layer("bad", [[9]]))
    pool = outside("pool", "AvgPool2d", 10, "sum")
    cert = Certificate(1, "x", SHA, (*[proven] * 99_999, bad, *[pool] * 100_000))
    page = html(cert)
    assert len(page) < 3_000_000
    parsed = Page(page)
    assert heading(cert) == "Does not hold: 1 refuted, 99999 proven of 100000 operations of the request."
    table = parsed.find("table[@class='bits']/tbody/tr")
    assert len(table) == SHOWN
    assert text(table[-1]).startswith("bad")  # left out last, though it comes last
    assert text(parsed.at("op-99999")).startswith("bad")
    assert links(parsed) <= {e.get("id") for e in parsed.root.iter()}
    cut = [text(p) for p in parsed.find("p[@class='cut']")]
    assert cut == [
        f"Left out here: {left} of {total} operations; the JSON certificate holds all."
        for left, total in ((100_000 - SHOWN, 100_000), (100_000 - SHOWN, 99_999), (100_000 - SHOWN, 100_000))
    ]


def test_a_page_of_large_operations_stays_small() -> None:
    rows = np.random.default_rng(0).integers(-127, 128, (4096, 8))
    op = prove(layer("fc", rows, 12, codes=IntFormat.unsigned(8)))
    assert len(html(Certificate(1, "x", SHA, (op,) * SHOWN))) < 6_000_000


def test_huge_sums_are_exact_or_described() -> None:
    lo, hi = (-(2**80), 0), (1, 2**81)
    op = Operation(
        "fc", "Linear", "outside", bits_needed(-(2**80), 2**81), Accumulator(8), IntFormat(0, 1), 3, lo=lo, hi=hi
    )
    cert = Certificate(1, "x", SHA, (replace(op, verdict="unproven", reason="?"),))
    page = Page(html(cert))
    check(page, cert)
    assert "Bars are cut at 16 bits." in text(page.find("section/p")[0])
    assert facts(page.at("op-0"))["sums"] == f"[{-(2**80)}, {2**81}]"
    assert facts(page.at("op-0"))["used"].endswith(f" %: {2**81} of 127, row 1")
    huge = 10**4000
    op = replace(op, bits_needed=bits_needed(-huge, huge), lo=(-huge, 0), fan_in=huge, hi=(huge, 0), zero_channels=huge)
    cert = Certificate(1, "x", SHA, (replace(op, verdict="unproven", reason="?"), op, outside("o", "o", huge, "")))
    page = html(cert)
    assert len(page) < 30_000
    assert facts(Page(page).at("op-0"))["sums"] == "[-(an integer of 13288 bits), (an integer of 13288 bits)]"


def test_a_histogram_of_many_widths_is_cut() -> None:
    op = prove(layer("fc", [[2**i] for i in range(30)], 32))
    card = Page(html(Certificate(1, "x", SHA, (op,)))).at("op-0")
    rows = [shown(row[0]) for row in card.findall(".//tbody/tr")]
    assert rows == [f"{bits} !" if bits > 32 else f"{bits}" for bits in range(34, 22, -1)]
    assert "18 rows of fewer bits left out" in text(card.findall(".//caption")[0])


def test_the_page_of_a_saved_certificate_is_the_same(tmp_path: Path) -> None:
    certificate().save(tmp_path / "certificate.json")
    assert html(Certificate.load(tmp_path / "certificate.json")) == html(certificate())


# In a browser


def test_a_browser_shows_the_same_numbers(browser: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html(certificate()), encoding="utf-8")
    check(Page(browse(browser, tmp_path, file, "--dump-dom")), certificate())


def test_a_browser_runs_nothing(browser: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    for name in WEIRD[:3]:
        file.write_text(html(named(name), name), encoding="utf-8")
        page = Page(browse(browser, tmp_path, file, "--dump-dom"))
        assert structure(page) == structure(Page(html(named("plain"), "plain")))


def test_the_page_fits_its_window(browser: str, tmp_path: Path) -> None:
    """Nothing is wider than the screen, be it a phone's, whatever the names."""
    frames, widths = [], (320, 400, 1400)
    for number, name in enumerate(["layer1.0.conv1", "x" * 10**4, "\x00" * 500, "é̂̃ " * 100]):
        (tmp_path / f"{number}.html").write_text(html(named(name), name), encoding="utf-8")
        frames += [f"<iframe src='{number}.html' style='width:{w}px;height:800px;border:0'></iframe>" for w in widths]
    script = "onload=()=>{for(const f of document.querySelectorAll('iframe'))"
    script += "f.title=f.contentDocument.documentElement.scrollWidth}"
    (tmp_path / "frames.html").write_text(f"{''.join(frames)}<script>{script}</script>", encoding="utf-8")
    shown = Page(browse(browser, tmp_path, tmp_path / "frames.html", "--dump-dom")).find("iframe")
    assert [int(frame.get("title", "0")) for frame in shown] == list(widths) * 4


def test_the_page_is_drawn_light_and_dark(browser: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(html(certificate()), encoding="utf-8")
    for scheme, page, card, red in ((1, "f4f5f7", "ffffff", "c4232c"), (0, "0e1217", "171c23", "ff7a72")):
        browse(
            browser,
            tmp_path,
            file,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            "--window-size=1400,2500",
        )
        with image.open(shot) as picture:
            pixels = {colour: number for number, colour in picture.convert("RGB").getcolors(2**24)}
        for colour, least in ((page, 100_000), (card, 100_000), (red, 1000)):
            assert pixels.get(tuple(bytes.fromhex(colour)), 0) > least, (scheme, colour)


def test_the_page_says_what_the_target_assumes() -> None:
    op = outside("pool", "AveragePool", None, "")
    cert = Certificate(1, "x", SHA, (op,), "avx2 <b>", "pairs of taps & more", "inside", ("x=uint8:0.5", "y=int4"))
    head = facts(Page(html(cert)).find("header")[0])
    assert head["target"] == "avx2 <b>"
    assert head["assumes"] == "pairs of taps & more"
    assert head["bias"] == "inside the register"
    assert head["inputs taken as"] == "x=uint8:0.5; y=int4"
    assert not {"target", "assumes", "bias"} & set(facts(Page(html(Certificate(1, "x", SHA, (op,)))).find("header")[0]))
