"""Elements of an HTML page, and words for numbers: text gets in escaped, integers exact, both cut beyond a limit."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from html import escape

from accaware.certify.certificate import printable

LETTERS, DIGITS = 120, 40  # of a name, of an integer


class Markup(str):
    """Text that is markup already."""


NOTHING = Markup()
VOID = {"img", "source"}  # elements that have no end


def el(tag: str, *children: str, **attributes: str | int) -> Markup:
    """An element; children that are no markup, and attributes, are escaped. `class_` and `aria_label` lose underscores.

    >>> el("b", "a < b", id="x")
    '<b id="x">a &lt; b</b>'
    """
    named = "".join(f' {name.strip("_").replace("_", "-")}="{_safe(str(a))}"' for name, a in attributes.items())
    end = "" if tag in VOID else f"</{tag}>"
    return Markup(f"<{tag}{named}>{''.join(map(_safe, children))}{end}")


def _safe(text: str) -> str:
    # What cannot be printed is spelt out: control characters and lone surrogates are no HTML, and a character that
    # turns the line around could fake a name.
    if isinstance(text, Markup):
        return text
    return escape(printable(text))


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


def page(title: str, *parts: str, style: str = "") -> str:
    """A whole page, to be written as UTF-8, that loads nothing from anywhere. style: CSS beside that of all pages."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    meta = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    meta += '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    head = el("head", Markup(meta), el("title", short(title)), el("style", Markup(STYLE + style)))
    return f"<!DOCTYPE html>\n{el('html', head, el('body', el('main', *parts)), lang='en')}\n"


STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1c2128;--soft:#57606a;--rule:#d8dde3;--need:#2f6fb5;
 --spare:#dbe2ea;--proven:#1a7f37;--refuted:#c4232c;--unproven:#8a5a00;--outside:#57606a}
@media screen and (prefers-color-scheme:dark){:root{--page:#0e1217;--card:#171c23;--ink:#e6eaef;--soft:#9aa5b1;
 --rule:#2e3641;--need:#5b96d8;--spare:#2c3540;--proven:#56c878;--refuted:#ff7a72;--unproven:#e3b552;--outside:#9aa5b1}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:.94rem/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
 font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:84rem;margin:auto;padding:1.5rem}
h1{font-size:1.75rem;line-height:1.25;margin:.2rem 0 .6rem;text-wrap:balance}
h2{font-size:1.25rem;margin:2.2rem 0 .2rem}
h3{font-size:1rem;margin:0 0 .6rem;display:flex;gap:1rem;align-items:baseline;justify-content:space-between}
p{margin:.3rem 0 .8rem}
small,.kicker,footer,figcaption,caption,dt,thead{color:var(--soft)}
small,figcaption,caption,thead,footer{font-size:.85rem;font-weight:400}
code,.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em}.name{white-space:pre-wrap}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.2em}
header,.card,.bits,.wide{background:var(--card);border:1px solid var(--rule);border-radius:.5rem}
header{border-left:.5rem solid;padding:1.2rem 1.5rem}
header.proven{border-left-color:var(--proven)}header.refuted{border-left-color:var(--refuted)}
.kicker{margin:0}.cut{font-style:italic}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:.6rem;padding:0;margin:1rem 0}
ul a{display:block;min-width:7.5rem;padding:.4rem .8rem;border:1px solid var(--rule);border-radius:.4rem;
 text-decoration:none}
ul b{display:block;font-size:1.5rem;line-height:1.2}
.badge{font-weight:600;font-size:.9rem;white-space:nowrap}.badge.proven{color:var(--proven)}
.badge.refuted{color:var(--refuted)}.badge.unproven{color:var(--unproven)}.badge.outside{color:var(--outside)}
dl{margin:0;min-width:0}dl div{display:flex;gap:.8rem}dt{flex:0 0 6.6rem}dd{margin:0;min-width:0}
table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:400}
.number,.bits th:nth-child(3){text-align:right}
.bits{border-collapse:separate;border-spacing:0;table-layout:fixed}
.bits th:nth-child(1){width:33%}.bits th:nth-child(3){width:6rem}.bits th:nth-child(4){width:8rem}
.bits td,.bits th,.wide td,.wide th{padding:.35rem .8rem;border-top:1px solid var(--rule);vertical-align:top}
.bits thead th,.wide thead th{border-top:0}
.wide{overflow-x:auto}.wide table{min-width:60rem}.wide tbody th{width:22%}.wide td:last-child{width:26%}
.wide td:nth-child(3){min-width:11rem}.wide td:not(:nth-child(3),:last-child){overflow-wrap:normal}
.cells{display:flex;gap:0 .8rem;align-items:center}.cells svg{flex:1;height:.9rem;min-width:4rem}
.cells span{flex:0 0 7.2rem;white-space:nowrap}
path{fill:none;stroke-width:1}.cells path{stroke-dasharray:.84 .16}.rows path{stroke-width:.8}
.need{stroke:var(--need)}.spare{stroke:var(--spare)}.over{stroke:var(--refuted)}.cells .over{stroke-width:.5}
.cards{display:grid;gap:1rem;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%,36rem),1fr))}
.card{padding:1rem 1.2rem;min-width:0;break-inside:avoid}
.numbers{display:grid;gap:1rem;grid-template-columns:minmax(0,1fr) 10.5rem}
.histogram{align-self:start}.histogram caption{text-align:left}
.histogram td,.histogram th{padding:0 .6rem 0 0;white-space:nowrap}.histogram td:last-child{width:60%;padding:0}
.histogram svg{display:block;width:100%;height:.7rem}
.witness,.said{border-left:.2rem solid var(--soft);padding-left:.8rem;margin:0 0 .8rem}
.witness{border-color:var(--refuted)}.witness p{margin:0}
figure{margin:1rem 0 0}figcaption{margin-top:.3rem}
figure>svg{display:block;width:calc(100% - 4.2rem);height:10rem;margin-left:4.2rem;overflow:visible}
line{stroke:var(--ink);stroke-dasharray:5 4}text{fill:var(--ink);font-size:.75rem;text-anchor:end}
footer{margin-top:2rem;max-width:52rem}
@media screen and (max-width:44rem){main{padding:.6rem}header{padding:1rem}h1{font-size:1.35rem}
 .numbers{grid-template-columns:minmax(0,1fr)}.bits td,.bits th{padding:.35rem .4rem}.bits th:nth-child(1){width:38%}
 .bits th:nth-child(4){width:7rem}
 .bits td:nth-child(3),.bits thead th:nth-child(3){display:none}.cells{flex-wrap:wrap}.cells svg{flex-basis:100%}}
@media print{:root{--page:#fff;font-size:9.5px}main{padding:0;max-width:none}a{text-decoration:none}
 .wide{overflow:visible}tr{break-inside:avoid}h2,h2+p{break-after:avoid}}
"""
