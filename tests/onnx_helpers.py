"""Small networks, and the check that every layer's integers are those of the network that really runs."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from accaware.onnx.read import Network, Product, read

FLOAT, OPSET = TensorProto.FLOAT, 17


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(nodes, inputs, outputs, constants=(), opset=OPSET, extra=(), **graph):
    """A model from nodes, `name: shape` or `name: (type, shape)` and `name: array`."""

    def info(name, given):
        kind, shape = given if isinstance(given, tuple) else (FLOAT, given)
        return helper.make_tensor_value_info(name, kind, shape)

    constants = [c if isinstance(c, TensorProto) else tensor(n, c) for n, c in dict(constants or {}).items()]
    made = helper.make_graph(
        nodes,
        "graph",
        [info(n, g) for n, g in inputs.items()],
        [info(n, g) for n, g in outputs.items()],
        constants,
        **graph,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in extra)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def node(kind, inputs, outputs, name="", domain="", **attributes):
    split = [v.split() if isinstance(v, str) else v for v in (inputs, outputs)]
    return helper.make_node(kind, *split, name=name, domain=domain, **attributes)


def save(made, folder, name="net.onnx"):
    path = folder / name
    onnx.save(made, path)
    return path


def read_model(made, folder, inputs=None) -> Network:
    return read(save(made, folder), inputs)


def only(network: Network) -> Product:
    """The one operation of a network, which must be a product."""
    (op,) = network.operations
    assert isinstance(op, Product), op
    return op


# What the network really holds.


def session(contents, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
    """onnxruntime with one thread and nothing to say."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = level, 4, 1
    return ort.InferenceSession(contents, options, providers=["CPUExecutionProvider"])


def run(made, feeds, wanted):
    """The values of the tensors `wanted`, as onnxruntime computes them without optimizing the graph."""
    made = onnx.ModelProto.FromString(made.SerializeToString())
    made.ir_version = min(made.ir_version, 10)
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return dict(zip(wanted, session(made.SerializeToString()).run(wanted, feeds), strict=True))


def _qonnx_operators():
    """qonnx's own functions, as operators of onnx's reference evaluator, under every domain in use."""
    from qonnx.custom_op.general.bipolar_quant import binary_quant
    from qonnx.custom_op.general.multithreshold import multithreshold
    from qonnx.custom_op.general.quant import quant
    from qonnx.custom_op.general.trunc import trunc_v1, trunc_v2

    def int_quant(_, x, scale, zero, bits, narrow=1, rounding_mode="ROUND", signed=1):
        return (quant(x, scale, zero, bits, signed, narrow, rounding_mode).astype(np.float32),)

    def bipolar_quant(_, x, scale):
        return (binary_quant(x, scale).astype(np.float32),)

    def trunc(_, x, scale, zero, bits, *rest, narrow=0, rounding_mode="FLOOR", signed=1):
        if len(rest) == 1:
            return (trunc_v1(x, scale, zero, bits, *rest, rounding_mode).astype(np.float32),)
        return (trunc_v2(x, scale, zero, bits, narrow, signed, *rest, rounding_mode).astype(np.float32),)

    def thresholds(_, x, steps, out_bias=0.0, out_dtype="", out_scale=1.0):
        return (multithreshold(x, steps, out_scale, out_bias).astype(np.float32),)

    runs = {"Quant": int_quant, "IntQuant": int_quant, "BipolarQuant": bipolar_quant, "Trunc": trunc}
    runs["MultiThreshold"] = thresholds
    domains = ["qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general"]
    return [
        type(kind, (OpRun,), {"op_domain": domain, "_run": function})
        for kind, function in runs.items()
        for domain in domains
    ]


def run_qonnx(made, feeds, wanted):
    """The same, where nodes of QONNX are run by qonnx and the others by onnx's reference."""
    made = onnx.ModelProto.FromString(made.SerializeToString())
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return dict(zip(wanted, ReferenceEvaluator(made, new_ops=_qonnx_operators()).run(wanted, feeds), strict=True))


def named(made, name):
    """The node of an operation; unnamed nodes are called after their output."""
    return next(n for n in made.graph.node if name in (n.name, *n.output))


def attribute(op, name, default):
    found = [helper.get_attribute_value(a) for a in op.attribute if a.name == name]
    return found[0] if found else default


def columns(op, x, w_shape):
    """The inputs of every sum, by definition: x [N, C, *space] -> [O, N, *out, taps of one group] for a Conv."""
    kernel, group = w_shape[2:], attribute(op, "group", 1)
    dims = len(kernel)
    pads, strides = attribute(op, "pads", [0] * 2 * dims), attribute(op, "strides", [1] * dims)
    dilations = attribute(op, "dilations", [1] * dims)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)]
    taps = []
    for place in itertools.product(*map(range, kernel)):
        at = [
            slice(p * d, p * d + (n - 1) * s + 1, s)
            for p, d, n, s in zip(place, dilations, sizes, strides, strict=True)
        ]
        taps.append(x[(slice(None), slice(None), *at)])
    stacked = np.stack(taps, axis=-1)  # [N, C, *out, kernel]
    grouped = stacked.reshape(len(x), group, -1, *sizes, len(taps))
    flat = np.moveaxis(grouped, 2, -2).reshape(len(x), group, *sizes, -1)  # [N, groups, *out, taps]
    return np.repeat(np.moveaxis(flat, 1, 0), w_shape[0] // group, axis=0)


def exact_sums(made, product, codes):
    """What the accumulator of every output comes to, from rows and centred codes only; bias included."""
    op = named(made, product.name)
    rows = product.rows.centred().astype(np.int64)
    bias = np.zeros(len(rows), np.int64) if product.bias is None else product.bias
    x = codes.astype(np.int64)
    if "ConvTranspose" in op.op_type:
        return transposed_sums(op, product, x)
    if "Conv" in op.op_type:
        cols = columns(op, x, product.rows.origin.shape)
        return np.stack([cols[o] @ rows[o] + bias[o] for o in range(len(rows))], axis=1)
    return x @ rows.T + bias


def transposed_sums(op, product, x):
    """Scatter every product, by the definition of the operator; the tap k of an output belongs to phase k*d mod s."""
    shape = product.rows.origin.shape
    kernel, group = shape[2:], attribute(op, "group", 1)
    dims = len(kernel)
    strides, dilations = attribute(op, "strides", [1] * dims), attribute(op, "dilations", [1] * dims)
    pads = attribute(op, "pads", [0] * 2 * dims)
    weights = product.rows.restore(product.rows.centred()).astype(np.int64)  # [C, O / groups, *kernel]
    size = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[2:], strides, dilations, kernel, strict=True)]
    per_group, outputs = shape[0] // group, shape[1]
    total = np.zeros((len(x), outputs * group, *size), np.int64)
    for c, place in itertools.product(range(shape[0]), itertools.product(*map(range, kernel))):
        at = tuple(
            slice(p * d, p * d + (n - 1) * s + 1, s)
            for p, d, n, s in zip(place, dilations, x.shape[2:], strides, strict=True)
        )
        for o in range(outputs):
            total[(slice(None), c // per_group * outputs + o, *at)] += x[:, c] * weights[(c, o, *place)]
    ends = [n - p for n, p in zip(size, pads[dims:], strict=True)]
    inner = tuple(slice(b, e) for b, e in zip(pads[:dims], ends, strict=True))
    sums = total[(slice(None), slice(None), *inner)]
    if product.bias is not None:
        phases = len(product.bias) // sums.shape[1]
        sums += product.bias[::phases].reshape(-1, *[1] * dims)
    return sums


def check_sums(made, network, feeds, runner=run):
    """For every product: codes and sums of the network that runs are the reader's, to the bit."""
    for product in network.products:
        op = named(made, product.name)
        x_name, real_out = op.input[0], op.output[0]
        names = {"QLinearConv": (1, 2, 4, 6, 7), "QLinearMatMul": (1, 2, 4, 6, 7), "QGemm": (1, 2, 4, 7, 8)}.get(
            op.op_type
        )
        values = runner(made, feeds, [x_name, real_out])
        x, out = values[x_name], values[real_out]
        if names:  # integers in, and the requantized sum out
            codes = x.astype(np.int64)
            assert codes.min() >= product.codes.lo
            assert codes.max() <= product.codes.hi
            sums = exact_sums(made, product, codes - product.zero_point)
            y_scale, y_zero = (numpy_helper.to_array(initializer(made, op.input[i])) for i in names[3:])
            axes = [1 if i == (1 if "Conv" in op.op_type else sums.ndim - 1) else 0 for i in range(sums.ndim)]
            unit = (product.act_scale * product.rows.scale).reshape([-1 if a else 1 for a in axes])
            info = np.iinfo(out.dtype)
            expected = np.clip(np.rint(sums * unit / y_scale) + y_zero, info.min, info.max)
            off = np.abs(expected - out)
            assert off.max() <= 1  # a tie that float32 breaks differently
            assert (off > 0).mean() < 0.01
            continue
        if op.op_type in ("MatMulInteger", "ConvInteger"):
            zero = product.zero_point
            if zero is None:
                zero = int(runner(made, feeds, [op.input[2]])[op.input[2]])
                assert product.zero_range.lo <= zero <= product.zero_range.hi
            assert x.min() >= product.codes.lo
            assert x.max() <= product.codes.hi
            assert (exact_sums(made, product, x.astype(np.int64) - zero) == out).all()
            continue
        # Floats in and out: everything is a multiple of the scales.
        act = product.act_scale
        if "Conv" in op.op_type:
            channels = np.repeat(act[0], x.shape[1]) if (act == act[0]).all() else act[:: len(act) // x.shape[1]]
            step = channels.reshape(1, -1, *[1] * (x.ndim - 2))
        else:
            step = act[0]
        real = x / step
        codes = np.rint(real).astype(np.int64)
        assert np.abs(real - codes).max() < 0.05
        assert codes.min() >= product.centred_codes.lo
        assert codes.max() <= product.centred_codes.hi
        sums = exact_sums(made, product, codes)
        unit = (act * product.rows.scale)[:: len(act) // (out.shape[1] if "Conv" in op.op_type else out.shape[-1])]
        unit = unit.reshape(1, -1, *[1] * (out.ndim - 2)) if "Conv" in op.op_type else unit
        if product.bias is None:
            out = out - outside_bias(made, op)
        measured = out / unit
        room = max(0.25, np.abs(sums).max() * 2**-20)  # 16-bit products outgrow the floats that they run in
        assert np.abs(measured - sums).max() < room, product.name


def outside_bias(made, op):
    if len(op.input) < 3 or not op.input[2]:
        return 0
    value = runner_constant(made, op.input[2])
    return value.reshape(1, -1, *[1] * (2 if "Conv" in op.op_type else 0)) if "Conv" in op.op_type else value


def runner_constant(made, name):
    return numpy_helper.to_array(initializer(made, name))


def initializer(made, name):
    return next(i for i in made.graph.initializer if i.name == name)
