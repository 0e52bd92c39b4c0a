"""Elements of an HTML page, and words for numbers: text gets in escaped, integers exact, both cut beyond a limit."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from html import escape

LETTERS, DIGITS = 120, 40  # of a name, of an integer


class Markup(str):
    """Text that is markup already."""


NOTHING = Markup()


def el(tag: str, *children: str, **attributes: str | int) -> Markup:
    """An element; children that are no markup, and attributes, are escaped. `class_` and `aria_label` lose underscores.

    >>> el("b", "a < b", id="x")
    '<b id="x">a &lt; b</b>'
    """
    named = "".join(f' {name.strip("_").replace("_", "-")}="{_safe(str(a))}"' for name, a in attributes.items())
    return Markup(f"<{tag}{named}>{''.join(map(_safe, children))}</{tag}>")


def _safe(text: str) -> str:
    # What cannot be printed is spelt out: control characters and lone surrogates are no HTML, and a character that
    # turns the line around could fake a name.
    if isinstance(text, Markup):
        return text
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def svg(title: str, about: str, *children: str, **attributes: str | int) -> Markup:
    """A picture that says what it shows."""
    return el("svg", el("title", title), el("desc", about), *children, role="img", **attributes)


def stretched(width: int, height: int) -> dict[str, str | int]:
    """The attributes of a picture in units of its own, that fills the box that it is given."""
    return {"viewBox": f"0 0 {width} {height}", "preserveAspectRatio": "none"}


def facts(**values: str) -> Markup:
    """A list of names and values, without those that are empty."""
    pairs = ((name.replace("_", " "), value) for name, value in values.items() if value)
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs))


def table(headings: Iterable[str], rows: Iterable[str], *before: str, **attributes: str | int) -> Markup:
    """A table of `rows`, which are markup, under one row of headings."""
    head = el("thead", el("tr", *(el("th", name, scope="col") if name else el("td") for name in headings)))
    return el("table", *before, head, el("tbody", *rows), **attributes)


def short(text: str, limit: int = LETTERS) -> str:
    """`text`, or its two ends."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]} (shortened from {len(text)} characters)"


def integer(value: int) -> str:
    """All digits, up to `DIGITS` of them.

    >>> integer(-128), integer(10**40)
    ('-128', '(an integer of 133 bits)')
    """
    if abs(value) < 10**DIGITS:
        return str(value)
    return f"{'-' if value < 0 else ''}(an integer of {value.bit_length()} bits)"


def between(lo: int, hi: int) -> str:
    """[lo, hi]."""
    return f"[{integer(lo)}, {integer(hi)}]"


def count(number: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{integer(number)} {noun}{'' if number == 1 else 's'}"


def percent(share: Fraction) -> str:
    """Rounded to one decimal; a fraction, since sums may lie beyond all floats.

    >>> percent(Fraction(120, 127))
    '94.5 %'
    """
    tenths = round(abs(share) * 1000)
    return f"{'-' if share < 0 else ''}{integer(tenths // 10)}.{tenths % 10} %"
