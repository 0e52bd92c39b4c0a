"""Large tensors stay in the file: a model's bytes without them, and views of them.

Parsing a model copies every byte of it, and asking a message for its bytes copies them again. So the large `raw_data`
fields are cut out of the serialized message first (protobuf's wire format: a sequence of tag, length, contents), and a
short token that no file can guess stands for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

_LENGTH = 2  # the wire type of bytes, strings and messages
_FIXED = {1: 8, 5: 4}
_KEEP = 4096  # shorter messages are copied as they are
_DEPTH = 64

# What to look into: field number -> message, from onnx.proto. Field 9 of a tensor is its raw_data.
_TENSOR: dict[int, str] = {9: "raw_data"}
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": _TENSOR,
}


@dataclass(frozen=True, eq=False)
class Cut:
    """A serialized model without its large tensors (`message`), and what its tokens stand for."""

    buffer: memoryview
    message: bytes = b""
    token: bytes = field(default_factory=lambda: os.urandom(16))

    def data(self, raw: bytes) -> memoryview:
        """The contents of a `raw_data` field, read from the message: a view of the file, or `raw` itself."""
        if len(raw) != len(self.token) + 16 or not raw.startswith(self.token):
            return memoryview(raw)
        start = int.from_bytes(raw[-16:-8], "little")
        return self.buffer[start : start + int.from_bytes(raw[-8:], "little")]


def cut(buffer: memoryview) -> Cut:
    """The serialized ModelProto in `buffer` without large tensors. What is malformed stays as it is."""
    plain = Cut(buffer)
    return Cut(buffer, b"".join(_message(plain, "model", 0, len(buffer), 0)), plain.token)


def _message(plain: Cut, kind: str, start: int, stop: int, depth: int) -> list[bytes | memoryview]:
    """The pieces of one message, with tokens in place of large tensors."""
    buffer, inside = plain.buffer, _MESSAGES[kind]
    pieces: list[bytes | memoryview] = []
    copied = start  # everything before is in `pieces`
    for number, begin, first, last in _fields(buffer, start, stop):
        child = inside.get(number)
        if child is None or last - first < _KEEP or depth > _DEPTH:
            continue
        if child == "raw_data":
            contents: list[bytes | memoryview] = [
                plain.token + first.to_bytes(8, "little") + (last - first).to_bytes(8, "little")
            ]
        else:
            contents = _message(plain, child, first, last, depth + 1)
        pieces += [buffer[copied:begin], _varint(number << 3 | _LENGTH), _varint(sum(map(len, contents))), *contents]
        copied = last
    return [*pieces, buffer[copied:stop]]


def _fields(buffer: memoryview, position: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every field with a length: its number, where its tag begins, and where its contents begin and end.

    Ends where the message does, or at the first thing that is no field.
    """
    while position < stop:
        begin = position
        tag, position = _read(buffer, position, stop)
        kind = tag & 7
        if kind == 0:
            _, position = _read(buffer, position, stop)
        elif kind in _FIXED:
            position += _FIXED[kind]
        elif kind == _LENGTH:
            length, position = _read(buffer, position, stop)
            if position + length > stop:
                return
            yield tag >> 3, begin, position, position + length
            position += length
        else:
            return


def _read(buffer: memoryview, position: int, stop: int) -> tuple[int, int]:
    """A variable-length integer and where it ends; past `stop`, where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= stop:
            break
        byte = buffer[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    return 7, stop + 1  # a wire type that does not exist


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
