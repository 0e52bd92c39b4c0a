"""What an exported ResNet20 costs in onnxruntime: next to the float network, and to onnxruntime's own 8 bits of it.

    python benchmarks/export.py [--rounds 11] [--batch 32] [--threads 2]

Random weights, W8A8 and W4A4; onnxruntime's own are static U8S8, per channel, as QDQ and QOperator.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from emulate import FORMS, networks
from timing import alternate, report

import accaware as aa
from accaware.experiments.models.resnet_cifar import ResNet, resnet20
from accaware.integer.network import integer_network


def prepared(network: ResNet, bits: int, images: torch.Tensor) -> ResNet:
    """Quantized, with the batch-norm statistics that go with it."""
    model = copy.deepcopy(network)
    aa.prepare_(model, aa.Spec(weight_bits=bits, act_bits=bits, acc_bits=32), images[:2], keep=dict(model.keep))
    aa.calibrate(model, [images])
    return model.eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, 3, 32, 32)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = options.threads
    candidates: dict[str, Callable[[], object]] = {}

    def add(name: str, path: Path, feed: str) -> None:
        run = onnxruntime.InferenceSession(path, session, providers=["CPUExecutionProvider"]).run
        candidates[name] = lambda: run(None, {feed: np.asarray(x)})

    network = resnet20().eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        paths = networks(Path(folder))
        add("float32", paths["float32"], "x")
        for form in FORMS:
            add(f"onnxruntime's own 8 bits, {form}", paths[form], "x")
        for bits in (8, 4):
            model = prepared(network, bits, x)
            for dialect in ("qdq", "qcdq", "qoperator"):
                aa.export(model, Path(folder, "net.onnx"), dialect, sample=x[:2])
                add(f"W{bits}A{bits}, {dialect}", Path(folder, "net.onnx"), "input")
            integers = integer_network(model, x[:2])
            candidates[f"W{bits}A{bits}, integer network in PyTorch"] = lambda run=integers: run(x)
        with torch.inference_mode():
            seconds = alternate(candidates, options.rounds)
    report(f"ResNet20, {options.batch} images", seconds, ["float32"])


if __name__ == "__main__":
    main()
