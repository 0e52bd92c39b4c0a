"""Whether every dialect computes what the integer network computes: the codes before every product, and top-1.

    python benchmarks/agreement.py --data-dir CIFAR10 --checkpoint resnet20.safetensors [--images 1000] [-o FILE.json]

ResNet20 from the checkpoint and MobileNetV1 (width 0.25, random weights) are quantized without training by every
method, W4A4 at P = 12 and 10 and W8A8 at P = 16, and exported in all four dialects. onnxruntime runs three of them with
all its optimizations, qonnx's own executor the fourth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from qonnx.core import onnx_exec
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.infer_shapes import InferShapes
from rich.console import Console
from torch import nn

import accaware as aa
from accaware.experiments import models
from accaware.experiments.batches import EvalBatches, calibration_images
from accaware.experiments.checkpoints import load_weights
from accaware.experiments.data import Dataset, load
from accaware.experiments.images import NORMALIZATIONS
from accaware.experiments.runs import commit, hardware, versions
from accaware.exporter.capture import capture
from accaware.exporter.dialects import DIALECTS
from accaware.files import write_whole
from accaware.integer.network import IntegerOp, integer_network

REQUESTS = {"W4A4, P = 12": (4, 12), "W4A4, P = 10": (4, 10), "W8A8, P = 16": (8, 16)}
METHODS = ("projected", "a2q+", "a2q", "baseline")
CALIBRATION, BATCH = 1000, 100  # images
Codes = dict[str, NDArray[Any]]


def float_model(name: str, checkpoint: Path, images: EvalBatches) -> nn.Module:
    """The network before quantization; MobileNetV1 has batch-norm statistics, but was not trained."""
    torch.manual_seed(0)
    if name == "resnet20":
        model = models.build("resnet20", 10)
        load_weights(model, checkpoint)
        return model.eval()
    model = models.build("mobilenetv1", 10, 0.25)
    aa.reestimate_batchnorm(model, images)
    return model.eval()


def prepared(model: nn.Module, method: Any, bits: int, width: int, images: EvalBatches) -> nn.Module:
    """Quantized without training."""
    sample = next(iter(images))[0]
    spec = aa.Spec(weight_bits=bits, act_bits=bits, acc_bits=width, method=method)
    keep: Any = model.keep
    aa.prepare_(model, spec, sample[:2], keep=dict(keep))
    aa.calibrate(model, images)
    aa.reestimate_batchnorm(model, images)
    return model.eval()


def ours(network: nn.Module, x: torch.Tensor) -> tuple[NDArray[Any], Codes]:
    """The output of the integer network, and the input codes of every layer."""
    seen: Codes = {}
    ops = [m for m in network.modules() if isinstance(m, IntegerOp)]
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.update({m.layer.name: m.codes(a[0]).numpy()})) for m in ops]
    with torch.no_grad():
        out = network(x).numpy()
    for hook in hooks:
        hook.remove()
    return out, seen


def runner(path: Path, dialect: str, names: set[str]) -> Callable[[torch.Tensor], tuple[NDArray[Any], Codes]]:
    """The same of a file."""
    model = onnx.load(path)
    reads = {node.name: node.input[0] for node in model.graph.node if node.name in names}
    if dialect == "qonnx":
        wrapper = ModelWrapper(model)
        wrapper.set_tensor_shape("input", [BATCH, 3, 32, 32])
        shaped = wrapper.transform(InferShapes())

        def by_qonnx(x: torch.Tensor) -> tuple[NDArray[Any], Codes]:
            with mock.patch.object(onnx, "IR_VERSION", 10):  # of the models of one node that it runs
                found = onnx_exec.execute_onnx(shaped, {"input": x.numpy()}, return_full_exec_context=True)
            return found["output"], {name: found[tensor] for name, tensor in reads.items()}

        return by_qonnx
    model.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in {*reads.values()})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def by_onnxruntime(x: torch.Tensor) -> tuple[NDArray[Any], Codes]:
        found = dict(zip(outputs, session.run(outputs, {"input": x.numpy()}), strict=True))
        return found["output"], {name: found[tensor] for name, tensor in reads.items()}

    return by_onnxruntime


def compare(model: nn.Module, data: Dataset, images: int, folder: Path) -> list[dict[str, Any]]:
    """One row for every dialect."""
    batches = EvalBatches(data.evaluation.rows(slice(images)), BATCH, NORMALIZATIONS["imagenet"])
    sample = next(iter(batches))[0][:2]
    network = integer_network(model, sample)
    names = {m.layer.name for m in network.modules() if isinstance(m, IntegerOp)}
    certificate = aa.certify(model)
    graphs = {opset: capture(network, sample, opset) for opset in {d.opset for d in DIALECTS.values()}}
    rows, runs = [], {}
    for dialect in DIALECTS:
        path = folder / f"{dialect}.onnx"
        with mock.patch("accaware.exporter.write.capture", lambda n, s, opset: _copy(graphs[opset])):
            again = aa.export(model, path, dialect, sample)
        runs[dialect] = runner(path, dialect, names)
        same = {op.name: (op.lo, op.hi) for op in again.operations if op.lo} == {
            op.name: (op.lo, op.hi) for op in certificate.operations if op.lo
        }
        row = {"dialect": dialect, "holds": again.holds, "bits_needed": again.bits_needed, "same_proof": same}
        rows.append(row | {"codes": 0, "different": 0, "largest": 0, "right": 0, "right_here": 0})
    for x, labels in batches:
        out, codes = ours(network, x)
        for row in rows:
            there, seen = runs[row["dialect"]](x)
            assert seen.keys() == codes.keys()
            for layer in codes:
                off = np.abs(seen[layer].astype(np.float32) - codes[layer])
                row["codes"] += off.size
                row["different"] += int((off > 0).sum())
                row["largest"] = max(row["largest"], int(off.max()))
            row["right"] += int((there.argmax(1) == labels.numpy()).sum())
            row["right_here"] += int((out.argmax(1) == labels.numpy()).sum())
    return rows


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's and qonnx' own
    data, console = load("cifar10", options.data_dir), Console()
    images = EvalBatches(calibration_images(data.train, CALIBRATION, 0), 250, NORMALIZATIONS["imagenet"])
    rows = []
    for name, (title, (bits, width)), method in itertools.product(
        ("resnet20", "mobilenetv1"), REQUESTS.items(), METHODS
    ):
        model = prepared(float_model(name, options.checkpoint, images), method, bits, width, images)
        with tempfile.TemporaryDirectory() as folder:
            for row in compare(model, data, options.images, Path(folder)):
                rows.append({"model": name, "request": title, "method": method, **row})
                console.print(json.dumps(rows[-1]), highlight=False, markup=False, soft_wrap=True)
        if options.out is not None:
            about = {"images": options.images, "hardware": hardware(torch.device("cpu")), "versions": versions()}
            about |= {"onnxruntime": onnxruntime.__version__, "commit": commit(), "seed": 0}
            write_whole(options.out, json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
