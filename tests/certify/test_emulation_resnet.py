"""The emulator on a ResNet20 that onnxruntime quantized."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime import quantization as q

from accaware.certify.emulation import Emulator
from accaware.certify.targets import TARGETS

X = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


class Samples(q.CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"x": X[i : i + 1]} for i in range(3)])

    def get_next(self):
        return next(self.left, None)


@pytest.fixture
def file(shared, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from accaware.experiments.checkpoints import load_weights
    from accaware.experiments.models.resnet_cifar import resnet20

    model = resnet20()
    load_weights(model, shared("checkpoints/resnet20_cifar10.safetensors"))
    source, target = tmp_path / "float.onnx", tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnxruntime's own
        dims = {"x": {0: torch.export.Dim("n")}}
        names = {"input_names": ["x"], "dynamic_shapes": dims}
        torch.onnx.export(model.eval(), (torch.zeros(1, 3, 32, 32),), source, dynamo=True, verbose=False, **names)
        q.quantize_static(
            source, target, Samples(), quant_format=q.QuantFormat.QOperator, per_channel=True, reduce_range=True
        )
    return target


def test_resnet20(file) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})
    wide = Emulator(file, TARGETS["int32"]).run({"x": X})
    assert len(wide.counts) == 20
    assert wide.overflows == 0
    assert np.array_equal(*wide.outputs.values(), wanted)
    narrow = Emulator(file, TARGETS["int16"]).run({"x": X})
    assert narrow.overflows > 0
    assert not np.array_equal(*narrow.outputs.values(), wanted)
