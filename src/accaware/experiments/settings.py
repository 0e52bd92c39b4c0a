"""Settings of a job: every option of `accaware train` and `ptq`, as `config.yaml` keeps them. No torch here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from accaware.formats import ActScale, Method, Overflow, Preload, Spec, _one_of
from accaware.ptq import ALGORITHMS

Init = Literal["search", "ep", "none", "ptq"]

#: No option, but what `--checkpoint` held when the run was made.
CHECKPOINT_SHA256 = "checkpoint_sha256"
#: May differ when a run is resumed: where it computes, not what.
FREE_ON_RESUME = {"device", "devices", "num_nodes", "checkpoint_every", "data_dir", "checkpoint", "out"}
FREE_ON_RESUME |= {CHECKPOINT_SHA256}
TRAIN_ONLY = {
    *("quantize", "epochs", "lr", "schedule", "optimizer", "momentum", "batch_size", "weight_decay", "warmup"),
    *("penalty", "scale_lr", "distill", "crop_pad", "devices", "num_nodes", "precision", "checkpoint_every"),
}
PTQ_ONLY = {"algorithm", "fixed_scale", "max_length"}
#: By command, the settings that it does not have.
LACKS = {"train": PTQ_ONLY, "ptq": TRAIN_ONLY}
TEXT = ("sts", "text")
#: Lightning's words for parameters in float32, whose products may be of another type. Its others change the parameters.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")


@dataclass(frozen=True)
class Settings:
    """What to do, from data to run folder. Lengths are in images (or sentences), epochs or steps; bits are bits.

    `acc_bits`: "12", or "PATTERN=32" for the layers whose name matches. `keep`: "PATTERN=8" or "PATTERN=float";
    empty means what a built-in model says (first and last layer at 8 bits). `quantize`: False trains the float network.
    `init`: as in `accaware.calibrate`; "ptq" starts training from `accaware.reconstruct`. `schedule`: see `Schedule`.
    Raises `ValueError` on construction where a value is out of its range.
    """

    command: str = "train"
    data: str = "cifar10"
    data_dir: str | None = None
    image_size: int = 32
    resize: int | None = None
    normalize: str = "imagenet"
    val_size: int = 0
    limit_train: int | None = None
    max_length: int = 128
    model: str = "resnet20"
    width: float = 1.0
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    quantize: bool = True
    method: Method = "projected"
    depthwise_method: Method | None = None
    weight_bits: int = 4
    act_bits: int = 4
    act_scale: ActScale = "tensor"
    rotate: bool = False
    acc_bits: tuple[str, ...] = ("16",)
    preload: Preload = "none"
    tile: int | None = None
    outer_bits: int = 32
    overflow: Overflow = "wrap"
    keep: tuple[str, ...] = ()
    equalize: bool = False
    init: Init = "search"
    bias_correct: bool = False
    calib: int = 1000
    algorithm: str = "budgeted"
    fixed_scale: bool = False
    epochs: float = 1.0
    lr: float = 0.01
    schedule: str = "cosine"
    optimizer: str = "sgd"
    momentum: float = 0.9
    batch_size: int = 64
    weight_decay: float = 1e-5
    penalty: float = 1e-3
    warmup: float = 0.05
    scale_lr: float = 1.0
    distill: float = 0.0
    crop_pad: float = 0.0625
    seed: int = 0
    device: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"
    checkpoint_every: int = 100
    out: str = ""

    def __post_init__(self) -> None:
        _one_of("normalize", self.normalize, ("imagenet", "cifar10", "none"))
        _one_of("optimizer", self.optimizer, ("sgd", "adam"))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("init", self.init, get_args(Init))
        _one_of("algorithm", self.algorithm, (*ALGORITHMS, "projection"))
        for name in ("image_size", "calib", "batch_size", "devices", "num_nodes", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("val_size", "weight_decay", "penalty", "distill"):
            _at_least(name, getattr(self, name), 0)
        if self.resize is not None:
            _at_least("resize", self.resize, self.image_size)
        for name in ("epochs", "lr", "scale_lr", "width"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name, high in (("warmup", 1), ("momentum", 0.999), ("crop_pad", 0.5), ("seed", 2**63 - 1)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [0, {high}], not {getattr(self, name)}")
        _at_least("max_length", self.max_length, 2)
        if (self.data in TEXT) != self.model.startswith("hf:"):
            raise ValueError(
                f"data {', '.join(TEXT)} and model hf:NAME need each other, not {self.data!r}, {self.model!r}"
            )
        if self.data in TEXT and (self.command == "train" or self.val_size or self.limit_train is not None):
            raise ValueError(f"data {self.data!r} is for ptq, without val_size and limit_train")
        Schedule.parse(self.schedule)
        if self.command == "ptq" and not self.quantize:
            raise ValueError("ptq quantizes; quantize cannot be false")
        if self.command == "ptq" and self.init == "ptq":
            raise ValueError("init 'ptq' is where training starts; ptq itself takes algorithm 'budgeted'")
        if self.fixed_scale and self.algorithm in ("budgeted", "projection"):
            raise ValueError(f"fixed_scale is for axe-gptq, axe-gpfq, gptq and gpfq, not algorithm {self.algorithm!r}")
        if self.command == "ptq" and self.algorithm != "projection":
            self._refuse_unfit(f"algorithm {self.algorithm!r}", self.algorithm)
        if self.init == "ptq":
            self._refuse_unfit("init 'ptq'", "budgeted")
        self.spec, self.keep_patterns, self.acc_patterns  # noqa: B018 -- validates the rest

    def _refuse_unfit(self, what: str, algorithm: str) -> None:
        """What choosing integers by outputs does not go with; `what` asked for it."""
        if not self.quantize:
            raise ValueError(f"{what} quantizes; quantize cannot be false")
        for method in (self.method, self.depthwise_method or self.method):
            if method not in ("projected", "baseline"):
                other = "; algorithm 'projection' takes all" if self.command == "ptq" else ""
                raise ValueError(f"{what} needs method projected or baseline, not {method!r}{other}")
            if algorithm in ("gptq", "gpfq") and method != "baseline":
                raise ValueError(f"{what} knows no accumulator: it needs method 'baseline'")
            if algorithm.startswith("axe") and (method, self.preload) != ("projected", "none"):
                raise ValueError(f"{what} needs method projected and no free preload")
        if self.bias_correct:
            raise ValueError(f"{what} corrects biases itself: leave bias_correct out")

    @property
    def spec(self) -> Spec:
        """The request for all layers that no pattern singles out."""
        plain, _ = acc_widths(self.acc_bits)
        return Spec(
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            acc_bits=16 if plain is None else plain,
            method=self.method,
            depthwise_method=self.depthwise_method,
            act_scale=self.act_scale,
            rotate=self.rotate,
            preload=self.preload,
            tile=self.tile,
            outer_bits=self.outer_bits,
            overflow=self.overflow,
        )

    @property
    def acc_patterns(self) -> dict[str, int]:
        """Accumulator bits by layer pattern."""
        _, widths = acc_widths(self.acc_bits)
        for bits in widths.values():
            Spec(acc_bits=bits)  # validates it
        return widths

    @property
    def keep_patterns(self) -> dict[str, int | str]:
        """8 or "float" by layer pattern."""
        pairs = _pairs("keep", self.keep)
        if wrong := [f"{pattern}={value}" for pattern, value in pairs.items() if value not in ("8", "float")]:
            raise ValueError(f"keep must be PATTERN=8 or PATTERN=float, not {wrong[0]!r}")
        return {pattern: 8 if value == "8" else value for pattern, value in pairs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for `config.yaml`: those that the command has."""
        values = {name: value for name, value in asdict(self).items() if name not in LACKS[self.command]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `to_dict`; a name that is no setting is an error, as is a value of another type."""
        return cls(**typed(values))

    def same_run(self) -> str:
        """Equal for two runs if they compute the same, wherever they do and whatever they are called."""
        values = {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}
        return json.dumps([*sorted(values.items()), self.checkpoint_sha256])

    def command_line(self) -> str:
        """The command that repeats this run: its options that are not the default."""
        words = ["accaware", self.command]
        for name, value in self.to_dict().items():
            if name in ("command", CHECKPOINT_SHA256) or _plain(value) == _plain(_DEFAULTS[name]):
                continue
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [f"--{name.replace('_', '-')}", f"{item}"]
        return shlex.join(words)


_DEFAULTS = {f.name: f.default for f in fields(Settings)}


@dataclass(frozen=True)
class Schedule:
    """The learning rate relative to its peak: "cosine" falls to 0; "x0.1/30" multiplies by 0.1 every 30 epochs,
    "x0.1@30@50" after 30 and after 50 epochs; "constant" does nothing.
    """

    factor: float
    every: float | None = None
    at: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Schedule | None:
        """None for the cosine. Raises `ValueError` for anything else than the above."""
        number = r"(\d+\.?\d*)"
        if text == "cosine":
            return None
        if text == "constant":
            return cls(1.0)
        found = re.fullmatch(rf"x{number}(?:/{number}|((?:@{number})+))", text)
        if found is None or (found[2] is not None and float(found[2]) == 0):
            raise ValueError(f"schedule must be cosine, constant, xFACTOR/EPOCHS or xFACTOR@EPOCH@EPOCH, not {text!r}")
        at = tuple(float(epoch) for epoch in (found[3] or "").split("@")[1:])
        return cls(float(found[1]), None if found[2] is None else float(found[2]), at)

    def rate(self, epoch: float) -> float:
        """Of the step that starts after `epoch` epochs, a fraction."""
        passed = sum(epoch >= mark for mark in self.at) if self.every is None else int(epoch / self.every)
        return float(self.factor**passed)


#: What a float network leaves unread.
_REQUEST = {f.name for f in fields(Spec)} | {"keep"}
#: Settings that only some jobs read: their names, what they need, and whether a job has that.
_READ: tuple[tuple[set[str], str, Callable[[Settings], bool]], ...] = (
    ({"image_size"}, "data imagenet, folder or bsds300", lambda s: s.data not in ("cifar10", *TEXT)),
    ({"resize"}, "data imagenet or folder", lambda s: s.data not in ("cifar10", "bsds300", *TEXT)),
    ({"crop_pad"}, "data cifar10, imagenet or folder", lambda s: s.data != "bsds300"),
    ({"normalize"}, "images", lambda s: s.data not in TEXT),
    ({"max_length"}, f"data {' or '.join(TEXT)}", lambda s: s.data in TEXT),
    ({"outer_bits"}, "a tile, which spills there", lambda s: s.tile is not None),
    ({"momentum"}, "optimizer sgd", lambda s: s.optimizer == "sgd"),
    (_REQUEST, "quantize", lambda s: s.quantize),
)


def refuse_unread(given: Iterable[str], jobs: Sequence[Settings]) -> None:
    """Raise `ValueError` where a setting that was `given`, to another value than its default, changes none of the jobs.

    That is for what somebody has just said; a configuration that is read back may say more than its job reads.
    """
    for name in given:
        for names, needed, reads in _READ:
            if name in names and not any(reads(job) or getattr(job, name) == _DEFAULTS[name] for job in jobs):
                raise ValueError(f"{name} would change nothing: it needs {needed}")


def read_recipe(file: Path, command: str = "train") -> dict[str, Any]:
    """The settings of a YAML file, by name; of a run's `config.yaml` those that another run, of `command`, can have.

    Raises `ValueError` for what is no such file, and for names that are unknown or that `command` does not have.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    try:
        found = typed(values)
        lacked = sorted(found.keys() & LACKS[command])
        if lacked and "command" not in found:  # which every config.yaml names
            raise ValueError(f"{command} has no setting {lacked[0]!r}")
        return {n: v for n, v in found.items() if n not in ("command", "out", CHECKPOINT_SHA256, *lacked)}
    except ValueError as error:
        raise ValueError(f"recipe {file}: {error}") from error


def typed(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of settings by name, in the types of their fields. Raises `ValueError` for unknown names and types."""
    if not isinstance(values, Mapping):
        raise ValueError("it holds no settings")
    return {name: setting(name, value) for name, value in values.items()}


def acc_widths(texts: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """Of "12" and "PATTERN=32": the width of all other layers (None: not given), and those by layer pattern."""
    plain = [text for text in texts if "=" not in text]
    if len(plain) > 1:
        raise ValueError(f"acc_bits is given twice without a layer pattern: {', '.join(plain)}")
    pairs = _pairs("acc_bits", (text for text in texts if "=" in text))
    widths = {pattern: _integer("acc_bits", value) for pattern, value in pairs.items()}
    return _integer("acc_bits", plain[0]) if plain else None, widths


def setting(name: Any, value: Any) -> Any:
    """`value`, as YAML or a word of the command line has it, in the type of the setting `name`.

    Raises `ValueError` where there is no such setting, or it has another type.

    >>> setting("acc_bits", 12), setting("lr", "1e-2"), setting("tile", "none")
    (('12',), 0.01, None)
    """
    hints = _types()
    if name not in hints:
        raise ValueError(f"unknown setting {name!r}")
    kind, *optional = get_args(hints[name]) if type(None) in get_args(hints[name]) else (hints[name],)
    if get_origin(kind) is tuple:
        return tuple(map(str, value if isinstance(value, list | tuple) else [value]))
    if optional and value in (None, "none"):
        return None
    kind = str if get_origin(kind) is Literal else kind
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
    try:
        if isinstance(value, str):  # a word, or 1e-3, which YAML takes for one
            return read(value)
    except (ValueError, KeyError):
        pass
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    raise ValueError(f"{name} must be {words[kind]}, not {value!r}")


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Settings)


def check_same(kept: Settings, given: Mapping[str, Any], folder: Path) -> None:
    """Raise `ValueError` where an option `given` on the command line contradicts the run that is resumed.

    A checkpoint may lie elsewhere, but must hold what it held (where the run recorded that).
    """
    for name, value in given.items():
        if name not in FREE_ON_RESUME and _plain(value) != _plain(getattr(kept, name)):
            option = name.replace("_", "-")
            raise ValueError(f"run folder {folder} was made with --{option} {getattr(kept, name)}, not {value}")
    then, now = kept.checkpoint_sha256, given.get(CHECKPOINT_SHA256)
    if then and now and then != now:
        raise ValueError(
            f"run folder {folder} was made with another --checkpoint than {given['checkpoint']}: "
            f"sha256 {then[:16]}..., not {now[:16]}..."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < float("inf"):
        raise ValueError(f"{name} must be at least {low}, not {value}")


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be an integer, not {text!r}") from None


def _pairs(name: str, texts: Iterable[str]) -> dict[str, str]:
    """ "PATTERN=VALUE" by pattern; the pattern is everything before the last "="."""
    pairs: dict[str, str] = {}
    for text in texts:
        pattern, separator, value = text.rpartition("=")
        if not separator or not pattern:
            raise ValueError(f"{name} must be PATTERN=VALUE, not {text!r}")
        if pairs.setdefault(pattern, value) != value:
            raise ValueError(f"{name} says both {pairs[pattern]} and {value} for {pattern!r}")
    return pairs
