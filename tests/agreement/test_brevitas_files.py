"""Networks that Brevitas trained for an accumulator, A2Q and A2Q+, are certified from the files that it exports."""

from __future__ import annotations

import copy
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from accaware.certify.files import file_layers
from accaware.cli import run as command

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the peer's own deprecations are not ours
    qnn = pytest.importorskip("brevitas.nn")
    from brevitas import export
    from brevitas.quant import (
        Int8AccumulatorAwareWeightQuant,
        Int8AccumulatorAwareZeroCenterWeightQuant,
        Int8ActPerTensorFloat,
    )
pytest.importorskip("onnxoptimizer")  # Brevitas exports nothing without it
pytestmark = pytest.mark.filterwarnings("ignore")

BITS = 9


class Net(nn.Module):
    """Signed and unsigned inputs, a depthwise layer, floats as biases."""

    def __init__(self, weight_quant) -> None:
        super().__init__()
        options = {"weight_quant": weight_quant, "weight_bit_width": 4, "weight_accumulator_bit_width": BITS}
        self.input = qnn.QuantIdentity(bit_width=4, act_quant=Int8ActPerTensorFloat, return_quant_tensor=True)
        self.conv = qnn.QuantConv2d(3, 8, 3, bias=True, **options)
        self.relu1 = qnn.QuantReLU(bit_width=4, return_quant_tensor=True)
        self.depthwise = qnn.QuantConv2d(8, 8, 3, stride=2, groups=8, bias=False, **options)
        self.relu2 = qnn.QuantReLU(bit_width=4, return_quant_tensor=True)
        self.head = qnn.QuantLinear(32, 5, bias=True, **options)

    def forward(self, x):
        x = self.relu1(self.conv(self.input(x)))
        return self.head(self.relu2(self.depthwise(x)).flatten(1))


@pytest.fixture(scope="module", params=["a2q", "a2q+"])
def net(request):
    """A model that has seen data, and the integers [R, K] that it multiplies with."""
    torch.manual_seed(0)
    centred = request.param == "a2q+"
    made = Net(Int8AccumulatorAwareZeroCenterWeightQuant if centred else Int8AccumulatorAwareWeightQuant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(torch.randn(8, 3, 7, 7))
    deployed(made.eval())
    return made


def deployed(model):
    """The integer weights of every layer, by name. A2Q's depend on the input's width, which a run has to note."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (qnn.QuantConv2d, qnn.QuantLinear))}
    for layer in layers.values():
        layer.weight_quant.cache_inference_quant_act = True
    with torch.no_grad():
        model(torch.zeros(1, 3, 7, 7))
    return {name: layer.quant_weight() for name, layer in layers.items()}


def frozen(model):
    """A copy whose float weights are the quantized ones: what `docs/brevitas.md` does before an export to QONNX."""
    model = copy.deepcopy(model)
    for name, weight in deployed(model).items():
        model.get_submodule(name).weight.data.copy_(weight.value)
    return model


def exported(model, dialect, path):
    function = export.export_onnx_qcdq if dialect == "qcdq" else export.export_qonnx
    logging.disable(logging.WARNING)
    function(model, torch.zeros(1, 3, 7, 7), str(path), dynamo=False)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("dialect", ["qcdq", "qonnx"])
def test_files_of_brevitas_are_certified(dialect, net, tmp_path, capsys) -> None:
    path = tmp_path / "net.onnx"
    exported(frozen(net) if dialect == "qonnx" else net, dialect, path)
    for layer, weight in zip(file_layers(path), deployed(net).values(), strict=True):
        assert np.array_equal(layer.rows, weight.int().flatten(1))
        assert layer.rows.any()
    assert command(["certify", str(path), "--acc-bits", str(BITS), "--json", str(tmp_path / "cert.json")]) == 0
    assert command(["check", str(tmp_path / "cert.json"), str(path)]) == 0
    assert command(["certify", str(path), "--acc-bits", str(BITS - 2)]) == 1
    assert "refuted" in capsys.readouterr().out


def test_the_weights_that_brevitas_writes_to_qonnx_are_not_those_it_multiplies(net, tmp_path) -> None:
    """Why QONNX needs `frozen`: Brevitas 0.13.4 writes the float weights, which round to integers without a bound."""
    path = tmp_path / "net.onnx"
    exported(net, "qonnx", path)
    for layer, weight in zip(file_layers(path), deployed(net).values(), strict=True):
        assert not np.array_equal(layer.rows, weight.int().flatten(1))
    assert command(["certify", str(path), "--acc-bits", str(BITS)]) == 1
