"""The certificate: what was proven about every accumulating operation of a network, and what was not."""

from __future__ import annotations

import json
import re
import reprlib
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

from accaware import __version__
from accaware.certify.proof import Operation, Witness, outside, prove
from accaware.files import write_whole
from accaware.integer.layer import IntegerLayer

__all__ = ["SCHEMA", "Certificate", "Operation", "Witness", "outside", "printable", "prove"]

SCHEMA = 1
TOOL = f"accaware {__version__}"


@dataclass(frozen=True, slots=True)
class Certificate:
    """The verdicts on a network. sha256: of what was proven. tool: name and version of the program that proved it.

    target: name of the register that all operations share ("": each its own, as the network was prepared for; "NAME
    with PATTERN=BITS": some have another width), and assumes, what must be true of it. bias: whether an operator's bias
    is in the register. inputs: the codes of graph inputs that the user vouched for.
    """

    schema: int
    tool: str
    sha256: str
    operations: tuple[Operation, ...]
    target: str = ""
    assumes: str = ""
    bias: Literal["inside", "outside"] = "outside"
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, not {reprlib.repr(self.sha256)}")

    @classmethod
    def of(cls, layers: Iterable[IntegerLayer], others: Iterable[Operation] = (), *, sha256: str) -> Certificate:
        """Prove every layer; `others` are operations without integer rows."""
        return cls(SCHEMA, TOOL, sha256, (*map(prove, layers), *others))

    @property
    def inside(self) -> tuple[Operation, ...]:
        """The operations of the request."""
        return tuple(op for op in self.operations if op.verdict != "outside")

    @property
    def holds(self) -> bool:
        """Whether every operation of the request is proven, and there is one."""
        return bool(self.inside) and all(op.verdict == "proven" for op in self.inside)

    @property
    def bits_needed(self) -> int | None:
        """The accumulator width of the worst operation of the request; None where there is none, or one is unknown."""
        widths = [op.bits_needed for op in self.inside]
        return None if not widths or None in widths else max(w for w in widths if w is not None)

    def to_json(self) -> str:
        """Every field by its name; integers of any size are exact."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`, whole or not at all. Raises `OSError`."""
        write_whole(Path(path), self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The inverse of `to_json`. Raises `ValueError`, one line, for anything that `to_json` did not write."""
        try:
            data = json.loads(text)
            schema = data.get("schema") if isinstance(data, dict) else None
            if schema != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}, not {reprlib.repr(schema)}")
            certificate: Certificate = _read(cls, data, "certificate")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a certificate: {error}") from error
        return certificate

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what `save` wrote. Raises `OSError`, or `ValueError`, one line with the path, for a malformed file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def table(self) -> str:
        """One line for each operation, then what does not hold and why; plain text."""
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("operation", "kind"):
            table.add_column(heading)
        for heading in ("K", "codes", "register", "needs", "used", "zeros", "zero rows"):
            table.add_column(heading, justify="right")
        for heading in ("set", "verdict"):
            table.add_column(heading)
        for op in self.operations:
            table.add_row(*_cells(op))
        text = StringIO()
        Console(file=text, width=10_000, color_system=None, markup=False, highlight=False, emoji=False).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
        return "\n".join([*lines, "", *filter(None, map(_remark, self.operations)), self._summary()]) + "\n"

    def _summary(self) -> str:
        proven = sum(op.verdict == "proven" for op in self.inside)
        verdict = "holds" if self.holds else "does not hold"
        found = f"{verdict}: {proven} of {len(self.inside)} operations of the request are proven"
        own = self.target.partition(" ")[0] == "file"
        left = [op for op in self.operations if op.verdict == "outside" and _multiplies(op, own)]
        if left:
            found += f"; outside it{', by the own word of the file' if own else ''}: {len(left)} with weights"
        return f"{found}; sha256 {self.sha256}"


def _multiplies(op: Operation, own: bool) -> bool:
    """Whether an operation outside the request has weights: known ones, or those that a file leaves out by its `own`
    word, which are no sums of values."""
    return op.target is not None or (own and not op.note.startswith("adds "))


def _cells(op: Operation) -> list[str]:
    if op.target is None or op.codes is None:
        needs = "?" if op.bits_needed is None else str(op.bits_needed)
        return [printable(op.name), printable(op.kind), "", "", "", needs, "", "", "", op.method, op.verdict]
    tile = f", {op.target.outer_bits} after {op.target.tile}" if op.target.tile else ""
    return [
        printable(op.name),
        printable(op.kind),
        str(op.fan_in),
        f"[{op.codes.lo}, {op.codes.hi}]",
        f"{op.target.bits}{tile}",
        ", ".join(str(s.bits_needed) for s in op.sums()),
        f"{op.utilisation:.1%}",
        f"{op.sparsity:.1%}",
        f"{op.zero_channels} of {len(op.lo)}",
        op.method,
        op.verdict,
    ]


def _remark(op: Operation) -> str:
    """One line on what the table has no column for, or nothing."""
    remarks = [op.reason, op.note]
    if op.witness:
        register = "the outer register" if op.witness.register == "outer" else "the register"
        remarks.append(f"row {op.witness.row} reaches {op.witness.value}, outside {register}")
    if op.lo and op.zero_channels == len(op.lo):
        remarks.append("all its weights are 0")
    if op.repaired:
        remarks.append(f"{op.repaired} rows repaired by the exact check")
    text = "; ".join(filter(None, remarks))
    return printable(f"{op.name}: {text}") if text else ""


def printable(text: str) -> str:
    """Names come from anybody's files: what would move the cursor or start a line is spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON holds it, as the type `kind`: strict, so that a damaged file is refused, not guessed at."""
    if is_dataclass(kind):
        build: Any = kind
        names = {f.name for f in fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(f"{where} must have exactly the fields {', '.join(sorted(names))}")
        hints = get_type_hints(kind)
        return build(**{name: _read(hints[name], v, f"{where}.{name}") for name, v in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {reprlib.repr(value)}")
        return tuple(_read(get_args(kind)[0], v, where) for v in value)
    if get_origin(kind) is types.UnionType:
        inner = next(k for k in get_args(kind) if k is not types.NoneType)
        return None if value is None else _read(inner, value, where)
    if value not in get_args(kind) if get_origin(kind) is Literal else type(value) is not kind:
        raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, not {reprlib.repr(value)}")
    return value
