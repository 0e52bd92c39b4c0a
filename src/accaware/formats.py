"""Formats: the ranges of codes and registers, and the request that a layer must meet.

Everything here is a frozen dataclass of Python integers that validates itself when it is built, so that the rest of
the library never meets an impossible format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Method = Literal["projected", "a2q+", "a2q", "baseline"]
Preload = Literal["none", "free"]
Overflow = Literal["wrap", "saturate"]
TapOrder = Literal["chw", "hwc"]
Order = Literal[TapOrder, "any"]
ActScale = Literal["tensor", "token"]


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], not {value}")


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


@dataclass(frozen=True, slots=True)
class IntFormat:
    """The integers in [lo, hi]: the codes of a weight or of an activation.

    Raises `TypeError` for bounds that are not integers and `ValueError` for an empty range.

    >>> IntFormat.unsigned(4)
    IntFormat(lo=0, hi=15)
    >>> IntFormat.narrow(4)
    IntFormat(lo=-7, hi=7)
    """

    lo: int
    hi: int

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            _integer(name, getattr(self, name), -(2**63), 2**63 - 1)
        if self.lo > self.hi:
            raise ValueError(f"an integer format needs lo <= hi, not [{self.lo}, {self.hi}]")

    @classmethod
    def unsigned(cls, bits: int) -> IntFormat:
        """[0, 2^bits - 1]."""
        _integer("bits", bits, 1, 62)
        return cls(0, 2**bits - 1)

    @classmethod
    def signed(cls, bits: int) -> IntFormat:
        """[-2^(bits-1), 2^(bits-1) - 1]; one bit means {-1, 0}."""
        _integer("bits", bits, 1, 62)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @classmethod
    def narrow(cls, bits: int) -> IntFormat:
        """[-(2^(bits-1) - 1), 2^(bits-1) - 1], symmetric around 0."""
        _integer("bits", bits, 2, 62)
        return cls(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)

    @property
    def span(self) -> int:
        """R = hi - lo, the largest difference of two codes."""
        return self.hi - self.lo

    @property
    def is_signed(self) -> bool:
        """Whether negative codes occur."""
        return self.lo < 0

    @property
    def magnitude(self) -> int:
        """The largest absolute code."""
        return max(abs(self.lo), abs(self.hi))

    def with_zero(self) -> IntFormat:
        """The smallest range that holds this one and 0, which partial sums start from."""
        return IntFormat(min(self.lo, 0), max(self.hi, 0))


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A two's complement register of `bits` bits and how it is used.

    `preload`: "none" starts at 0, "free" lets each output start at the integer that serves it best; a given start value
    belongs to the integer layer. `tile`: after so many products the sum spills to a register of `outer_bits` bits
    (None: one running sum over all taps). `order`: in which order the taps of a convolution are numbered; "any" where
    nobody knows which taps share a tile, so that every choice of them must fit.

    >>> Accumulator(12).hi
    2047
    """

    bits: int
    overflow: Overflow = "wrap"
    preload: Preload = "none"
    tile: int | None = None
    outer_bits: int = 32
    order: Order = "chw"

    def __post_init__(self) -> None:
        _integer("acc_bits", self.bits, 2, 64)
        _integer("outer_bits", self.outer_bits, 2, 64)
        if self.tile is not None:
            _integer("tile", self.tile, 1, 2**31)
            if self.outer_bits < self.bits:
                raise ValueError(f"outer_bits must be at least acc_bits={self.bits}, not {self.outer_bits}")
        _one_of("overflow", self.overflow, get_args(Overflow))
        _one_of("preload", self.preload, get_args(Preload))
        _one_of("order", self.order, get_args(Order))

    @property
    def lo(self) -> int:
        """-2^(bits-1)."""
        return -int(2 ** (self.bits - 1))

    @property
    def hi(self) -> int:
        """2^(bits-1) - 1."""
        return int(2 ** (self.bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class Spec:
    """What is asked of a layer: bits of weights, activations and accumulator, and the quantizer that must meet them.

    Units are bits. `per_channel`: one weight scale for each output channel, else one for the whole tensor.
    `depthwise_method`: the method of depthwise layers; None is the rule of the A2Q+ paper (section 5), `a2q` where the
    method is `a2q+`, since zero-centring costs their few weights a degree of freedom, else the method. Of linear layers
    alone: `act_scale`, one activation scale for the tensor, or one for each token (each vector of inputs), found at run
    time from its largest value; `rotate`, whether inputs and weights are rotated by a Hadamard matrix, which spreads
    outliers. The other fields are those of `Accumulator`. Raises `ValueError` or `TypeError` where a value is not
    allowed.

    >>> Spec(weight_bits=4, act_bits=4, acc_bits=12).weight_format
    IntFormat(lo=-7, hi=7)
    """

    weight_bits: int = 4
    act_bits: int = 4
    acc_bits: int = 16
    method: Method = "projected"
    preload: Preload = "none"
    tile: int | None = None
    outer_bits: int = 32
    overflow: Overflow = "wrap"
    order: TapOrder = "chw"
    per_channel: bool = True
    depthwise_method: Method | None = None
    act_scale: ActScale = "tensor"
    rotate: bool = False

    def __post_init__(self) -> None:
        _integer("weight_bits", self.weight_bits, 2, 8)
        _integer("act_bits", self.act_bits, 1, 8)
        _integer("acc_bits", self.acc_bits, 2, 32)
        _one_of("method", self.method, get_args(Method))
        _one_of("order", self.order, get_args(TapOrder))
        _one_of("act_scale", self.act_scale, get_args(ActScale))
        for name in ("per_channel", "rotate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.depthwise_method is not None:
            _one_of("depthwise_method", self.depthwise_method, get_args(Method))
        for method in (self.method, self.depthwise_method or self.method):
            if self.preload == "free" and method != "projected":
                raise ValueError(f"preload 'free' needs method 'projected', not {method!r}")
        self.accumulator  # noqa: B018 -- validates the rest

    @property
    def weight_format(self) -> IntFormat:
        """Codes of the weights: narrow range."""
        return IntFormat.narrow(self.weight_bits)

    def of_depthwise(self) -> Spec:
        """The request as it applies to a depthwise layer, which has the method of its own."""
        method = self.depthwise_method or ("a2q" if self.method == "a2q+" else self.method)
        return replace(self, method=method, depthwise_method=None)

    def act_format(self, signed: bool) -> IntFormat:
        """Codes of the activations."""
        return IntFormat.signed(self.act_bits) if signed else IntFormat.unsigned(self.act_bits)

    @property
    def accumulator(self) -> Accumulator:
        """The register that the products are added in."""
        return Accumulator(self.acc_bits, self.overflow, self.preload, self.tile, self.outer_bits, self.order)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for configuration files and certificates."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
