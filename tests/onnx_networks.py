"""Float networks, and what onnxruntime's own quantizers make of them."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
from onnxruntime import quantization as q

from onnx_helpers import model, node, save

RNG = np.random.default_rng(0)
CHANNELS = 4


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def residual():
    """Convolutions of all sorts with a branch around one of them."""
    nodes = [
        node("Conv", "x w1 b1", "c1", "first", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", "depthwise", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=4),
        node("Relu", "c2", "r2"),
        node("Conv", "r2 w3 b3", "c3", "pointwise", kernel_shape=[1, 1]),
        node("Add", "c3 r1", "s", "add"),
        node("MaxPool", "s", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p w4 b4", "c4", "grouped", kernel_shape=[2, 2], strides=[2, 2], group=2, dilations=[1, 1]),
        node("Relu", "c4", "r4"),
        node("GlobalAveragePool", "r4", "g", "pool"),
        node("Flatten", "g", "f"),
        node("Gemm", "f w5 b5", "y", "head", transB=1),
    ]
    constants = {
        "w1": normal(4, 3, 3, 3),
        "b1": normal(4),
        "w2": normal(4, 1, 3, 3),
        "w3": normal(4, 4, 1, 1),
        "b3": normal(4),
        "w4": normal(6, 2, 2, 2),
        "b4": normal(6),
        "w5": normal(5, 6),
        "b5": normal(5),
    }
    return model(nodes, {"x": [2, 3, 8, 8]}, {"y": [2, 5]}, constants)


def mlp():
    nodes = [
        node("MatMul", "x w1", "m1", "one"),
        node("Add", "m1 b1", "a1"),
        node("Relu", "a1", "r1"),
        node("MatMul", "r1 w2", "y", "two"),
    ]
    constants = {"w1": normal(7, 9), "b1": normal(9), "w2": normal(9, 3)}
    return model(nodes, {"x": [5, 7]}, {"y": [5, 3]}, constants)


def deconvolution():
    nodes = [
        node("Conv", "x w1", "c1", "down", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("ConvTranspose", "r1 w2 b2", "y", "up", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    constants = {"w1": normal(4, 2, 3, 3), "w2": normal(4, 3, 3, 3), "b2": normal(3)}
    return model(nodes, {"x": [2, 2, 8, 8]}, {"y": [2, 3, 7, 7]}, constants)


NETWORKS = {"residual": residual, "mlp": mlp, "deconvolution": deconvolution}
LAYERS = {
    "residual": ["first", "depthwise", "pointwise", "grouped", "head"],
    "mlp": ["one", "two"],
    "deconvolution": ["down", "up"],
}


def signed_qdq(relu: bool):
    """A product of s8 codes with s8 weights, between quantizers, and a batch; with `relu`, of codes in [0, 127]."""
    held = {"w": RNG.integers(-128, 128, (12, 6), np.int8), "s": np.float32(0.5), "z": np.int8(0 if relu else -5)}
    held |= {"ws": np.float32(0.25), "wz": np.int8(0), "ys": np.float32(64)}
    nodes = [
        *([node("Relu", "x", "r")] if relu else []),
        node("QuantizeLinear", "r s z" if relu else "x s z", "q"),
        node("DequantizeLinear", "q s z", "f"),
        node("DequantizeLinear", "w ws wz", "g"),
        node("MatMul", "f g", "m", "op"),
        node("QuantizeLinear", "m ys wz", "o"),
        node("DequantizeLinear", "o ys wz", "y"),
    ]
    x = RNG.choice([-64, 63.5, 31, -7], (40, 12), p=[0.1, 0.6, 0.2, 0.1]).astype(np.float32)
    return model(nodes, {"x": list(x.shape)}, {"y": None}, held), {"x": x}


class Samples(q.CalibrationDataReader):
    def __init__(self, shape, rng):
        self.samples = iter([{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.samples, None)


def quantize(made, folder, rng, **options):
    """The file of the quantized network, and the shape of its input; `dynamic`: without calibration."""
    shape = [d.dim_value for d in made.graph.input[0].type.tensor_type.shape.dim]
    source, target = save(made, folder, "float.onnx"), folder / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime's own
        if options.pop("dynamic", False):
            q.quantize_dynamic(source, target, **options)
        else:
            q.quantize_static(source, target, Samples(shape, rng), **options)
    return target, shape


def quantized(network, folder, **options):
    """The network, quantized and loaded again, and a batch for it."""
    target, shape = quantize(NETWORKS[network](), folder, RNG, **options)
    return onnx.load(target), target, {"x": 2 * RNG.normal(size=shape).astype(np.float32)}
