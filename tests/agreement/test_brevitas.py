"""For the same parameters, our A2Q and A2Q+ give the integers of the authors' own implementation in Brevitas.

Brevitas holds the scale twice, once for g / s and once for s * q, and learns the two apart; the papers have one s. Here
both copies get the same value, and our gradient to it is the sum of theirs.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from accaware.bounds import budget
from accaware.formats import IntFormat, Spec
from accaware.quantizers import A2QQuantizer
from accaware.rows import convolution_rows, transposed_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the peer's own deprecations are not ours
    qnn = pytest.importorskip("brevitas.nn", reason="brevitas is a test dependency: pip install 'accaware[dev]'")
    from brevitas.quant import Int8AccumulatorAwareWeightQuant, Int8AccumulatorAwareZeroCenterWeightQuant

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = {
    "linear": lambda **options: qnn.QuantLinear(48, 10, bias=False, **options),
    "conv1d": lambda **options: qnn.QuantConv1d(6, 8, 5, bias=False, **options),
    "conv2d": lambda **options: qnn.QuantConv2d(6, 8, 3, bias=False, **options),
    "grouped": lambda **options: qnn.QuantConv2d(6, 9, 3, groups=3, bias=False, **options),
    "depthwise": lambda **options: qnn.QuantConv2d(8, 8, 3, groups=8, bias=False, **options),
    "dilated": lambda **options: qnn.QuantConv2d(4, 4, 3, dilation=2, stride=2, bias=False, **options),
    "transposed": lambda **options: qnn.QuantConvTranspose2d(5, 4, 3, bias=False, **options),  # stride 1: one phase
}
WIDTHS = [(2, 4, 10), (4, 4, 9), (4, 4, 12), (5, 8, 14), (8, 8, 16), (8, 3, 20)]


@pytest.mark.parametrize("centred", [False, True], ids=["a2q", "a2q+"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_integers_are_equal(kind, centred, signed):
    torch.manual_seed(len(kind))
    nonzero = 0
    for (weight_bits, act_bits, acc_bits), spread in itertools.product(WIDTHS, (0.0, 1.0)):
        peer = LAYERS[kind](
            weight_quant=Int8AccumulatorAwareZeroCenterWeightQuant if centred else Int8AccumulatorAwareWeightQuant,
            weight_bit_width=weight_bits,
            weight_accumulator_bit_width=acc_bits,
        )
        quant = peer.weight_quant.tensor_quant
        with torch.no_grad():  # leave the start: both g beyond the bound and g within it occur
            quant.scaling_impl.value += spread * torch.randn_like(quant.scaling_impl.value)
            quant.pre_scaling_impl.scaling_impl.value.copy_(quant.scaling_impl.value)
            quant.pre_scaling_impl.value += 3 * spread * torch.randn_like(quant.pre_scaling_impl.value)
            out, scale, _, bits, pre_scale, pre_zero = quant(peer.weight, torch.tensor(float(act_bits)), signed)
            theirs = quant.decoupled_int_quant.to_int(pre_scale, pre_zero, bits, peer.weight)

        spec = Spec(weight_bits, act_bits, acc_bits, "a2q+" if centred else "a2q")
        rows = (
            transposed_rows(peer.weight.shape, 1, peer.stride, peer.dilation)
            if kind == "transposed"
            else convolution_rows(peer.weight.shape)
        )
        ours = A2QQuantizer(spec, rows.channels, rows.parts, centred)
        codes = IntFormat.signed(act_bits) if signed else IntFormat.unsigned(act_bits)
        ours.bind(codes, budget(codes, spec.accumulator), None)
        with torch.no_grad():
            ours.d.copy_(quant.scaling_impl.value.reshape(-1, 1, 1))
            ours.t.copy_(quant.pre_scaling_impl.value.reshape(-1, 1, 1))
            weight = rows.split(peer.weight)
            assert torch.equal(rows.merge(ours.integers(weight)), theirs)
            assert torch.equal(rows.merge(ours(weight)), out)
            assert torch.equal(ours.step().flatten(), scale.flatten())
        nonzero += int(theirs.count_nonzero())
    assert nonzero > 100, "a comparison of zeros says nothing"


@pytest.mark.parametrize("centred", [False, True], ids=["a2q", "a2q+"])
def test_gradients_are_equal(centred):
    torch.manual_seed(0)
    peer = LAYERS["conv2d"](
        weight_quant=Int8AccumulatorAwareZeroCenterWeightQuant if centred else Int8AccumulatorAwareWeightQuant,
        weight_bit_width=4,
        weight_accumulator_bit_width=11,
    )
    quant = peer.weight_quant.tensor_quant
    spec = Spec(4, 4, 11, "a2q+" if centred else "a2q")
    rows = convolution_rows(peer.weight.shape)
    ours = A2QQuantizer(spec, 8, 1, centred)
    ours.bind(IntFormat.unsigned(4), budget(IntFormat.unsigned(4), spec.accumulator), None)
    with torch.no_grad():
        quant.pre_scaling_impl.value -= 0.5 * torch.arange(8).reshape(8, 1, 1, 1)
        ours.d.copy_(quant.scaling_impl.value.reshape(-1, 1, 1))
        ours.t.copy_(quant.pre_scaling_impl.value.reshape(-1, 1, 1))
    grad = torch.randn_like(peer.weight)
    scales = (quant.scaling_impl.value, quant.pre_scaling_impl.scaling_impl.value)
    to_weight, *to_scales, to_norm = torch.autograd.grad(
        quant(peer.weight, torch.tensor(4.0), False)[0], (peer.weight, *scales, quant.pre_scaling_impl.value), grad
    )
    theirs = (to_weight, sum(to_scales), to_norm)
    weight = peer.weight.detach().clone().requires_grad_()
    mine = torch.autograd.grad(rows.merge(ours(rows.split(weight))), (weight, ours.d, ours.t), grad)
    for name, a, b in zip(("weight", "d", "t"), mine, theirs, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
