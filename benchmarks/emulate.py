"""What it costs to emulate a ResNet20 on a narrow accumulator, next to onnxruntime's float32 run of the same network.

    python benchmarks/emulate.py [--rounds 11] [--batch 32] [--threads 1] [--saturate 1]

The network has random weights and is quantized by onnxruntime's static quantizer (8 bits, per channel). A run is one
batch; --saturate is the number of its images that run on saturating registers as well, 0 for none.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization
from timing import alternate, report

from accaware.certify.emulation import Emulator
from accaware.certify.targets import TARGETS
from accaware.experiments.models.resnet_cifar import resnet20
from accaware.formats import Accumulator

FORMS = {"QDQ": quantization.QuantFormat.QDQ, "QOperator": quantization.QuantFormat.QOperator}


class _Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left = iter([{"x": torch.randn(1, 3, 32, 32).numpy()} for _ in range(8)])

    def get_next(self) -> Any:
        return next(self._left, None)


def networks(folder: Path) -> dict[str, Path]:
    """The float network and its quantized forms."""
    paths = {name: folder / f"{name}.onnx" for name in ("float32", *FORMS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnxruntime's own
        torch.onnx.export(
            resnet20().eval(),
            (torch.randn(1, 3, 32, 32),),
            paths["float32"],
            dynamo=True,
            input_names=["x"],
            dynamic_shapes={"x": {0: torch.export.Dim("n")}},
        )
        for name, form in FORMS.items():
            quantization.quantize_static(paths["float32"], paths[name], _Samples(), quant_format=form, per_channel=True)
    return paths


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--saturate", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    images = np.random.default_rng(0).normal(size=(options.batch, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = options.threads
    candidates: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = networks(Path(folder))
        for name, path in paths.items():
            plain = onnxruntime.InferenceSession(path, session, providers=["CPUExecutionProvider"])
            candidates[name if name == "float32" else f"{name} as it is"] = lambda s=plain: s.run(None, {"x": images})
        for name in FORMS:
            for title, target in (("wraps at 16 bits", TARGETS["int16"]), ("exact sums", None)):
                emulator = Emulator(paths[name], target, threads=options.threads)
                candidates[f"{name} {title}"] = lambda e=emulator: e.run({"x": images})
        if options.saturate:
            clipping = replace(TARGETS["int16"], accumulator=Accumulator(16, "saturate"))
            emulator = Emulator(paths["QDQ"], clipping, threads=options.threads)
            title = f"QDQ saturates at 16 bits ({options.saturate} images)"
            candidates[title] = lambda: emulator.run({"x": images[: options.saturate]})
        report(f"ResNet20, {options.batch} images", alternate(candidates, options.rounds), ["float32"])


if __name__ == "__main__":
    main()
