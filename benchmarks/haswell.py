"""What saturation does to an 8-bit ResNet20, for real: onnxruntime's own kernels on an emulated Haswell.

    python benchmarks/haswell.py --data-dir CIFAR10 --checkpoint resnet20.safetensors --work FOLDER \
        [--images 1000] [-o FILE.json]

Needs `qemu-x86_64` (Debian: qemu-user) on an x86-64 machine. onnxruntime's static quantizer makes U8S8 files, per
channel, as QOperator and as QDQ; each runs as it is, with `reduce_range`, and repaired with new and with kept scales.
Every batch of outputs is kept in FOLDER, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime import quantization
from rich.console import Console
from rich.progress import track
from rich.table import Table

from accaware.certify.emulation import Emulator
from accaware.certify.files import certify_file
from accaware.certify.measure import top1
from accaware.certify.repair import repair_file
from accaware.certify.targets import TARGETS, Target
from accaware.experiments.batches import calibration_images, normalize
from accaware.experiments.checkpoints import load_weights
from accaware.experiments.data import load
from accaware.experiments.images import NORMALIZATIONS
from accaware.experiments.models.resnet_cifar import resnet20
from accaware.experiments.runs import commit, hardware, versions
from accaware.files import write_whole

TARGET = TARGETS["onnxruntime-avx2"]
FORMS = {"qoperator": quantization.QuantFormat.QOperator, "qdq": quantization.QuantFormat.QDQ}
QUANTIZED = {f"{name}{end}": (form, bool(end)) for name, form in FORMS.items() for end in ("", "-reduced")}
REPAIRED = {f"{name}-{end}": (name, end == "repaired") for name in FORMS for end in ("repaired", "kept")}
NAMES = sorted({**QUANTIZED, **REPAIRED}, reverse=True)
TITLES = ("haswell", "here", "exact", "emulated")  # where a network runs
CALIBRATION, BATCH = 200, 100  # images
CPU = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"  # without what the emulator warns that it lacks
RUN = Path(__file__).parents[1] / "tests" / "certify" / "run_model.py"

Array = NDArray[Any]


class _Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Array) -> None:
        self._left = iter(images)

    def get_next(self) -> Any:
        image = next(self._left, None)
        return None if image is None else {"x": image[None]}


def make(folder: Path, checkpoint: Path, images: Array) -> None:
    """The quantized networks and their repairs, those that are not there yet. images: for calibration."""
    source = folder / "float.onnx"
    if not source.exists():
        model = resnet20()
        load_weights(model, checkpoint)
        example, dims = torch.zeros(1, 3, 32, 32), {"x": {0: torch.export.Dim("n")}}
        torch.onnx.export(model.eval(), (example,), source, dynamo=True, input_names=["x"], dynamic_shapes=dims)
    for name, (form, reduced) in QUANTIZED.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            quantization.quantize_static(
                source,
                path,
                _Samples(images),
                quant_format=form,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=reduced,
            )
    for name, (origin, rescale) in REPAIRED.items():
        if not (folder / f"{name}.json").exists():
            done = repair_file(folder / f"{origin}.onnx", folder / f"{name}.onnx", TARGET, rescale=rescale)
            counts = ("rows", "broken", "rows_changed", "weights", "weights_changed")
            sums = {count: sum(getattr(change, count) for change in done.changes) for count in counts}
            write_whole(folder / f"{name}.json", json.dumps(sums))


def on_haswell(path: Path, images: Array, folder: Path) -> Array:
    """The logits that onnxruntime computes there, float32 [N, 10]."""
    np.savez(folder / "in.npz", x=images)
    words = ["qemu-x86_64", "-cpu", CPU, sys.executable, *map(str, (RUN, path, folder / "in.npz", folder / "out.npz"))]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    subprocess.run(words, env=os.environ | one, stdin=subprocess.DEVNULL, check=True)
    with np.load(folder / "out.npz") as found:
        (logits,) = found.values()
    return np.asarray(logits)


def kept(path: Path, images: Array, compute: Callable[[Array], Array], title: str) -> Array:
    """What `compute` makes of all images, [N, 10], batch by batch; those in `path` are done already."""
    done = np.load(path) if path.exists() else np.empty((0, 10), np.float32)
    for start in track(range(len(done), len(images), BATCH), title, console=Console(stderr=True)):
        done = np.concatenate([done, compute(images[start : start + BATCH])])
        buffer = BytesIO()
        np.save(buffer, done)
        write_whole(path, buffer.getvalue())
    return np.asarray(done[: len(images)])


def row(name: str, folder: Path, images: Array, labels: Array) -> dict[str, Any]:
    """One network: on the emulated Haswell, here, with exact sums, and as `Emulator` says that it is on the Haswell."""
    path, repaired = folder / f"{name}.onnx", folder / f"{name}.json"
    here = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    runs = {"haswell": lambda x: on_haswell(path, x, folder), "here": lambda x: here.run(None, {"x": x})[0]}
    runs["exact"] = emulation(path, None)
    certificate = certify_file(path, TARGET)
    if not certificate.holds:
        runs["emulated"] = emulation(path, TARGET)
    logits = {
        title: kept(folder / f"{name}-{title}.npy", images, compute, f"{name} {title}")
        for title, compute in runs.items()
    }
    real = logits["haswell"]
    found: dict[str, Any] = {"name": name, "holds": certificate.holds, "images": len(images)}
    for title, array in logits.items():
        same_class = array.argmax(axis=1) == real.argmax(axis=1)
        found[title] = {
            "top1": top1(array, labels),
            "same_class": int(same_class.sum()),
            "same_bits": int((array == real).all(axis=1).sum()),
        }
    return found | (json.loads(repaired.read_text()) if repaired.exists() else {})


def emulation(path: Path, target: Target | None) -> Callable[[Array], Array]:
    """The logits of the network on that register."""
    emulator = Emulator(path, target)
    (output,) = emulator.outputs
    return lambda images: emulator.run({"x": images}).outputs[output]


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = load("cifar10", options.data_dir)
    calibration = calibration_images(data.train, CALIBRATION, seed=0).pixels
    test = data.evaluation.rows(slice(options.images))
    images, samples = (
        normalize(pixels, NORMALIZATIONS["imagenet"]).contiguous().numpy() for pixels in (test.pixels, calibration)
    )
    make(options.work, options.checkpoint, samples)
    rows = [row(name, options.work, images, test.labels.numpy()) for name in NAMES]
    table = Table("network", "proven", *TITLES, "weights changed")
    for found in rows:
        share = f"{found['weights_changed'] / found['weights']:.1%}" if "weights" in found else ""
        cells = [f"{found[title]['top1']:.2f}" if title in found else "" for title in TITLES]
        table.add_row(found["name"], str(found["holds"]), *cells, share)
    Console().print(table)
    if options.output is not None:
        about = {
            "command": f"python benchmarks/haswell.py --images {options.images}",
            "target": TARGET.name,
            "calibration_images": CALIBRATION,
            "seed": 0,
            "emulator": f"{_first_line('qemu-x86_64', '--version')}, -cpu {CPU}",
            "hardware": hardware(torch.device("cpu")) | {"vnni": "vnni" in Path("/proc/cpuinfo").read_text()},
            "versions": versions() | {"onnxruntime": onnxruntime.__version__},
            "commit": commit(),
        }
        write_whole(options.output, json.dumps(about | {"rows": rows}, indent=1) + "\n")


def _first_line(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    main()
