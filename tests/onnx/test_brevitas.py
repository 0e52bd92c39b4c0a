"""Files that Brevitas writes: QCDQ and QONNX, sub-byte ranges, signed and unsigned, with zero-points."""

from __future__ import annotations

import logging
import warnings

import onnx
import pytest
import torch
from torch import nn

from accaware.formats import IntFormat
from accaware.onnx.read import read
from onnx_helpers import check_sums, run, run_qonnx

qnn = pytest.importorskip("brevitas.nn")
export = pytest.importorskip("brevitas.export")
quant = pytest.importorskip("brevitas.quant")
pytest.importorskip("onnxoptimizer")  # Brevitas exports nothing without it


class Net(nn.Module):
    """A convolution, a transposed one, a depthwise one with one scale for each channel, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = qnn.QuantIdentity(bit_width=4, act_quant=quant.Int8ActPerTensorFloat, return_quant_tensor=True)
        per_channel = quant.Int8WeightPerChannelFloat
        self.conv = qnn.QuantConv2d(3, 4, 3, padding=1, weight_bit_width=3, weight_quant=per_channel, bias=True)
        self.relu = qnn.QuantReLU(bit_width=3, return_quant_tensor=True)
        self.pool = nn.MaxPool2d(2)
        self.up = qnn.QuantConvTranspose2d(4, 2, 3, stride=2, weight_bit_width=5, bias=False, weight_quant=per_channel)
        self.act = qnn.QuantReLU(bit_width=4, act_quant=quant.Uint8ActPerTensorFloat, return_quant_tensor=True)
        self.depthwise = qnn.QuantConv2d(2, 4, 3, groups=2, weight_bit_width=2, bias=False)
        self.shifted = qnn.QuantIdentity(
            bit_width=5, act_quant=quant.ShiftedUint8ActPerTensorFloat, return_quant_tensor=True
        )
        self.head = qnn.QuantLinear(
            4 * 7 * 7, 5, weight_bit_width=4, bias=True, weight_quant=quant.ShiftedUint8WeightPerTensorFloat
        )

    def forward(self, x):
        x = self.act(self.up(self.pool(self.relu(self.conv(self.inp(x))))))
        return self.head(self.shifted(self.depthwise(x)).flatten(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net()
    made.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Brevitas' own
        made(torch.randn(8, 3, 8, 8))
    return made.eval()


@pytest.fixture(scope="module", params=["qcdq", "qonnx"])
def exported(request, net, tmp_path_factory):
    """The dialect, the path of the file and the model."""
    function = export.export_onnx_qcdq if request.param == "qcdq" else export.export_qonnx
    path = tmp_path_factory.mktemp(request.param) / "net.onnx"
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and Brevitas' own
        function(net, torch.randn(2, 3, 8, 8), path)
    logging.disable(logging.NOTSET)
    return request.param, path, onnx.load(path)


FORMATS = [
    (IntFormat(-3, 3), IntFormat(-8, 7)),
    (IntFormat(-15, 15), IntFormat(0, 7)),
    (IntFormat(-1, 1), IntFormat(0, 15)),
    (IntFormat(0, 15), IntFormat(0, 31)),
]


def test_every_layer_is_found(exported) -> None:
    dialect, path, made = exported
    network = read(path)
    assert network.unproven == ()
    assert [(op.rows.codes, op.codes) for op in network.products] == FORMATS
    assert {op.dialect for op in network.products} == {dialect}
    assert [op.kind for op in network.products] == ["Conv", "ConvTranspose", "Conv", "Gemm"]
    feeds = {made.graph.input[0].name: torch.randn(2, 3, 8, 8).numpy()}
    check_sums(made, network, feeds, run if dialect == "qcdq" else run_qonnx)


def test_the_weights_are_those_that_brevitas_deploys(exported, net) -> None:
    layers = [net.conv, net.up, net.depthwise, net.head]
    for layer, product in zip(layers, read(exported[1]).products, strict=True):
        wanted = layer.quant_weight().int().numpy()
        assert (product.rows.restore(product.rows.raw()) == wanted).all()
