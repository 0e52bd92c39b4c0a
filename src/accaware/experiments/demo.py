"""The main job in miniature: handwritten digits, a small network, and accumulators from comfortable to brutal.

    python -m accaware.experiments.demo --out runs/demo

trains a float network, quantizes it to 4-bit weights and activations with every method for accumulators of 16 down to 6
bits, trains on for a few epochs, proves which networks can overflow, and measures what overflow does to them. The data
(1,797 images of 8x8 pixels) come with scikit-learn, so nothing is downloaded; it takes a minute of one core.

`--tune` repeats the choice of `RATES`: the same grid for every method, judged on the validation images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import accaware as aa
from accaware.experiments.runs import RunFolder, commit, hardware, versions
from accaware.files import write_whole
from accaware.formats import Method

METHODS: tuple[Method, ...] = ("baseline", "a2q", "a2q+", "projected")
ACC_BITS = (16, 12, 10, 8, 6)
TRAIN, VALIDATION = 1000, 257  # the other 540 images are the test set
BATCH_SIZE = 64
FLOAT_RATE = 0.1
#: peak learning rate: the best of `GRID` on the validation images, averaged over the widths (`--tune`, seed 0)
RATES: Mapping[Method, float] = {"baseline": 0.1, "a2q": 0.4, "a2q+": 0.4, "projected": 0.1}
GRID = (0.05, 0.1, 0.2, 0.4, 0.8)
CLOSE = 2.0  # points that the saved network may lose: two standard errors of so few validation images
FILES = {"certificates", "demo.json", "model.safetensors"}

LEGEND = """\
P                  bits of the accumulator, where products are added up
method             baseline ignores P; projected is this library's own
accuracy           of the test images, while no sum overflows
worst case         bits for the largest sum that any input can cause
can overflow       yes: some input does it, even if no test image does
when P bits wrap   accuracy where sums really wrap around in P bits"""


class Part(NamedTuple):
    """Images and their labels."""

    images: Tensor  # float32 [B, 1, 8, 8], in [0, 1]
    labels: Tensor  # int64 [B]


class Digits(NamedTuple):
    """Three parts without a common image: to train on, to choose by, and to report."""

    train: Part
    validation: Part
    test: Part


def load_digits(seed: int) -> Digits:
    """The handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998), split at random by `seed`."""
    from sklearn import datasets  # type: ignore[import-untyped]

    digits = datasets.load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Digits(*(Part(images[rows], labels[rows]) for rows in parts))


class DigitNet(nn.Module):
    """A stem, one residual block, a strided convolution, pooling and a linear layer; 21,432 weights."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.down, self.bn3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, 10)
        # Tensors that are quantized once for all that read them: the residual stream before and after the block.
        self.before, self.after = aa.QuantIdentity(), aa.QuantIdentity()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] -> logits [B, 10]."""
        x = self.before(F.relu(self.bn(self.stem(x))))
        y = F.relu(self.bn1(self.conv1(x)))
        x = self.after(F.relu(x + self.bn2(self.conv2(y))))
        x = F.relu(self.bn3(self.down(x)))
        return self.linear(x.mean((2, 3)))


def train(model: nn.Module, part: Part, rate: float, epochs: int, seed: int) -> None:
    """Train a float or prepared model in place, leaving it in evaluation mode.

    SGD with Nesterov momentum 0.9; the learning rate falls from `rate` to 0 along a cosine.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True)
    steps = len(part.images) // BATCH_SIZE
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(part.images), generator=generator)
        for rows in order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE):
            loss = F.cross_entropy(model(part.images[rows]), part.labels[rows]) + aa.penalty(model)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            # Without a limit the learned scales of A2Q and A2Q+ run away at tight widths, every few seeds.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Percent of images whose label has the largest logit."""
    right = int((model(part.images).argmax(1) == part.labels).sum())
    return round(100 * right / len(part.labels), 2)


def float_network(data: Digits, epochs: int, seed: int) -> DigitNet:
    """The float network that every method starts from."""
    torch.manual_seed(seed)
    network = DigitNet()
    train(network, data.train, FLOAT_RATE, epochs, seed)
    return network


@dataclass(frozen=True)
class Row:
    """One line of the table. Accuracies are percent; `bits_needed` is the worst layer's; `wrapped` is with overflow."""

    method: Method
    acc_bits: int
    accuracy: float
    bits_needed: int
    can_overflow: bool
    wrapped: float
    validation: float


class Trained(NamedTuple):
    """A row, the network it is about, and the proof or refutation of its width."""

    row: Row
    model: nn.Module
    certificate: aa.Certificate


def compare(
    network: nn.Module, data: Digits, widths: Sequence[int], epochs: int, seed: int, rates: Mapping[Method, float]
) -> Iterator[Trained]:
    """Every method of `rates` at every width: a copy of the float `network`, quantized, trained on and judged."""
    for bits, (method, rate) in itertools.product(widths, rates.items()):
        spec = aa.Spec(weight_bits=4, act_bits=4, acc_bits=bits, method=method)
        model = aa.prepare_(copy.deepcopy(network), spec, sample=data.train.images[:1])
        aa.calibrate(model, [data.train.images])
        train(model, data.train, rate, epochs, seed)
        certificate = aa.certify(model)
        assert certificate.bits_needed is not None
        with aa.wrapping(model):
            wrapped = accuracy(model, data.test)
        row = Row(
            method=method,
            acc_bits=bits,
            accuracy=accuracy(model, data.test),
            bits_needed=certificate.bits_needed,
            can_overflow=not certificate.holds,
            wrapped=wrapped,
            validation=accuracy(model, data.validation),
        )
        yield Trained(row, model, certificate)


def best_of(found: Sequence[Trained]) -> Trained:
    """The proven network on the narrowest accumulator that is within `CLOSE` points of the best on validation images.

    The test images have no say in it.
    """
    proven = [t for t in found if not t.row.can_overflow]
    top = max(t.row.validation for t in proven)
    close = [t for t in proven if t.row.validation >= top - CLOSE]
    return min(close, key=lambda t: (t.row.acc_bits, -t.row.validation))


def tune(console: Console, epochs: int, seed: int) -> None:
    """Print the validation accuracy, averaged over the widths, of every method at every learning rate of `GRID`."""
    data = load_digits(seed)
    network = float_network(data, epochs, seed)
    for method, rate in itertools.product(METHODS, GRID):
        found = compare(network, data, ACC_BITS, epochs, seed, {method: rate})
        mean = statistics.mean(t.row.validation for t in found)
        console.print(f"{method:9}  rate {rate:<4}  validation accuracy {mean:.2f} %", highlight=False)


def table(rows: Sequence[Row], float_accuracy: float) -> Table:
    """The table that the demo prints."""
    shown = Table(
        title=f"Handwritten digits, 4-bit weights and activations (float network: {float_accuracy:.1f} %)",
        caption=LEGEND,
        caption_justify="left",
    )
    for heading in ("P", "method", "accuracy", "worst case", "can overflow", "when P bits wrap"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        shown.add_row(
            str(row.acc_bits),
            row.method,
            f"{row.accuracy:.1f} %",
            f"{row.bits_needed} bits",
            "[red]yes[/red]" if row.can_overflow else "[green]no[/green]",
            f"{row.wrapped:.1f} %",
            end_section=row.method == METHODS[-1],
        )
    return shown


def check_folder(out: Path) -> None:
    """Raise `ValueError` where something other than an earlier demo is in the way; hidden files are not."""
    held = {path.name for path in out.iterdir() if path.name[0] != "."} if out.exists() else set()
    if held and held != FILES:
        raise ValueError(f"run folder {out} holds something other than a demo; choose another --out")


def write(out: Path, found: Sequence[Trained], best: Trained, result: Mapping[str, Any]) -> None:
    """The run folder: `FILES`, written beside and moved in when all are there."""
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as beside:
        new = Path(beside)
        (new / "certificates").mkdir()
        for t in found:
            t.certificate.save(new / "certificates" / f"{t.row.method}-{t.row.acc_bits}.json")
        about = {"accaware": aa.__version__, "method": best.row.method, "acc_bits": str(best.row.acc_bits)}
        RunFolder(new).write_model(best.model, about)
        write_whole(new / "demo.json", json.dumps(result, indent=2) + "\n")
        (out / "certificates").mkdir(exist_ok=True)
        for file in sorted(new.rglob("*.*")):
            file.replace(out / file.relative_to(new))


def run(out: Path, console: Console, seed: int, epochs: int, widths: Sequence[int] = ACC_BITS) -> None:
    """The whole demo: train, judge, write the run folder, print the table.

    Raises `ValueError`, `OSError` or `ModuleNotFoundError`, before any training wherever it can be known by then.
    """
    started, busy = time.monotonic(), time.process_time()
    check_folder(out)
    data = load_digits(seed)
    out.mkdir(parents=True, exist_ok=True)
    network = float_network(data, epochs, seed)
    trained = compare(network, data, widths, epochs, seed, RATES)
    total, quiet = len(widths) * len(RATES), not console.is_terminal
    found = list(track(trained, "training networks", total, console=console, transient=True, disable=quiet))
    rows, best = [t.row for t in found], best_of(found)
    result: dict[str, Any] = {
        "float_accuracy": accuracy(network, data.test),
        "rows": [asdict(row) for row in rows],
        "best": {"method": best.row.method, "acc_bits": best.row.acc_bits},
        "weight_bits": 4,
        "act_bits": 4,
        "images": {name: len(part.labels) for name, part in data._asdict().items()},
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "rates": {"float": FLOAT_RATE} | dict(RATES),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions() | {"scikit-learn": metadata.version("scikit-learn")},
        "commit": commit(),
    }
    try:
        write(out, found, best, result)
    finally:  # a full disk must not cost the user what was found
        console.print(table(rows, result["float_accuracy"]))
    text = f"{result['seconds']:.0f} s; {out} holds the certificates and {best.row.method} at P = {best.row.acc_bits}."
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _Parser(prog="python -m accaware.experiments.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the float network and the batches")
    parser.add_argument("--epochs", type=int, default=10, help="of every training (default: 10)")
    parser.add_argument("--tune", action="store_true", help="print how the learning rates were chosen, and stop")
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and the result depends on the number
    try:
        options = parser.parse_args(arguments)
        if options.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, not {options.epochs}")
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed must lie in [0, 2^32), not {options.seed}")
        if options.tune:
            tune(Console(), options.epochs, options.seed)
        else:
            run(options.out, Console(), options.seed, options.epochs)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except ModuleNotFoundError as error:
        return _say(f"{error.name} is not installed; pip install 'accaware[all]' brings everything", 2)
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except ValueError as error:
        return _say(str(error), 2)
    return 0


def _say(message: str, code: int) -> int:
    print("accaware:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
