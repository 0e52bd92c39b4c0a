"""Prepared models as integer layers: the rows that outputs really sum, and what wrap-around really delivers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import accaware as aa
from accaware.bounds import bits_needed, worst_case
from accaware.formats import IntFormat
from accaware.integer import reference
from accaware.integer.emulate import emulate
from accaware.layers import QuantLayer


def prepared(layer, x, **options):
    """A calibrated layer with power-of-two scales, so that float results are exact."""
    model = nn.Sequential(layer)
    aa.prepare_(model, aa.Spec(**{"acc_bits": 9, **options}))
    aa.calibrate(model, [x])
    with torch.no_grad():
        for quant in (m for m in model.modules() if isinstance(m, QuantLayer)):
            quant.input_quant.scale.fill_(2.0**-3)
            step = quant.weight_quant.step()
            quant.weight_quant.set_step(torch.exp2(step.log2().round()))
    return model


def columns(x, layer):
    """Every output position's input codes [B, groups, positions, K] in chw order, from unfolding (zero padding)."""
    codes = layer.input_quant.to_codes(x).detach()
    if isinstance(layer, nn.Linear):
        return codes[:, None, None]
    padded = F.unfold(codes, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return padded.reshape(len(x), layer.groups, -1, padded.shape[-1]).movedim(-1, 2)


def hwc(taps, layer):
    """chw columns renumbered to hwc."""
    channels = layer.in_channels // layer.groups
    return taps.reshape(*taps.shape[:-1], channels, -1).transpose(-1, -2).reshape(taps.shape)


def by_reference(integer, taps, groups):
    """[B, rows, positions] of Python-integer sums on the register; taps [B, groups, positions, K]."""
    batch, _, positions, _ = taps.shape
    out = np.zeros((batch, len(integer.rows), positions), np.int64)
    for b, row, p in itertools.product(range(batch), range(len(integer.rows)), range(positions)):
        group = row * groups // len(integer.rows)
        out[b, row, p] = reference.run(integer, row, [int(v) for v in taps[b, group, p]])
    return out


LAYERS = {
    "linear": (lambda: nn.Linear(10, 4), (5, 10)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2, padding=1, stride=2), (2, 3, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 4, (2, 3), groups=2, dilation=(1, 2), bias=False), (2, 4, 3, 6)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", ["chw", "hwc"])
@pytest.mark.parametrize("method", ["baseline", "projected", "a2q", "a2q+"])
@pytest.mark.parametrize("tile", [None, 3])
def test_rows_give_the_layers_output(kind, order, method, tile):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.rand(shape) * 2
    model = prepared(make(), x, method=method, order=order, tile=tile, acc_bits=10)
    layer = model[0]
    (integer,) = aa.integer_layers(model)
    taps = columns(x, layer)
    if order == "hwc" and kind != "linear":
        taps = hwc(taps, layer)
    with torch.no_grad():
        out = model(x).double().reshape(len(x), len(integer.rows), -1)
    sums = np.stack(
        [
            np.stack(
                [taps[b, row * taps.shape[1] // len(integer.rows)].numpy() @ integer.rows[row] for b in range(len(x))]
            )
            for row in range(len(integer.rows))
        ],
        axis=1,
    )
    bias = 0 if layer.bias is None else layer.bias.detach().double().reshape(1, -1, 1)
    expected = torch.from_numpy(sums * integer.scale[None, :, None] * integer.act_scale) + bias
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert int((integer.rows != 0).sum()) > 0


def test_the_record_of_a_layer():
    x = torch.rand(6, 10)
    model = prepared(nn.Linear(10, 4), x, acc_bits=11, outer_bits=20, tile=4, overflow="saturate", preload="free")
    (integer,) = aa.integer_layers(model)
    assert (integer.name, integer.kind, integer.method) == ("0", "Linear", "projected")
    assert integer.rows.shape == (4, 10)
    assert integer.preload.shape == (4, 3)
    assert integer.codes == IntFormat.unsigned(4)
    assert integer.accumulator == aa.Accumulator(11, "saturate", "free", 4, 20)
    assert integer.act_scale == 2.0**-3
    assert np.array_equal(integer.scale, model[0].weight_quant.step().detach().double().flatten().numpy())
    assert integer.inside
    assert integer.repaired == 0
    assert np.array_equal(integer.rows, model[0].deployed()[0].reshape(4, -1)[:, :10].numpy())


def test_repairs_are_counted(monkeypatch):
    model = prepared(nn.Linear(10, 4), torch.rand(6, 10))
    broken = torch.full((4, 1, 10), 7.0, dtype=torch.float64)
    broken[1] = 0
    monkeypatch.setattr(model[0].weight_quant, "integers", lambda rows: broken)
    (integer,) = aa.integer_layers(model)
    assert integer.repaired == 3
    assert integer.rows[0].sum() == 255 // 15


@pytest.mark.parametrize("method", ["projected", "a2q", "a2q+", "baseline"])
@pytest.mark.parametrize("preload", ["none", "free"])
@pytest.mark.parametrize("tile", [None, 2, 3])
def test_rows_of_transposed_convolutions(method, preload, tile):
    if preload == "free" and method != "projected":
        pytest.skip("a free preload belongs to the projected quantizer")
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4)
    model = prepared(nn.ConvTranspose1d(3, 2, 5, stride=2), x, method=method, preload=preload, tile=tile, acc_bits=10)
    (integer,) = aa.integer_layers(model)
    assert integer.rows.shape == (4, 9)  # two phases of 9 and 6 taps for each channel
    assert np.array_equal(integer.rows[:, 6:][1::2], np.zeros((2, 3)))
    codes = np.pad(model[0].input_quant.to_codes(x).detach().numpy(), [(0, 0), (0, 0), (2, 2)])
    with torch.no_grad():
        out = model(x).double().numpy() - model[0].bias.detach().double().numpy()[:, None]
    for channel, o in itertools.product(range(2), range(out.shape[2])):
        taps = [k for k in range(5) if (o - k) % 2 == 0]
        window = codes[:, :, [(o - k) // 2 + 2 for k in taps]].reshape(2, -1)
        row = integer.rows[2 * channel + o % 2][: window.shape[1]]
        expected = window @ row * integer.scale[2 * channel] * integer.act_scale
        np.testing.assert_allclose(out[:, channel, o], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", ["chw", "hwc"])
@pytest.mark.parametrize("preload", ["none", "free"])
@pytest.mark.parametrize("bits", [4, 6, None])
def test_wrapping_equals_the_slow_emulation(kind, order, preload, bits):
    """A register far too narrow: the float64 path of the model agrees with one product at a time in Python integers."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.rand(shape) * 2
    model = prepared(make(), x, preload=preload, order=order, acc_bits=9)
    layer = model[0]
    (integer,) = aa.integer_layers(model)
    narrow = integer if bits is None else narrowed(integer, bits)
    taps = columns(x, layer)
    taps = hwc(taps, layer) if order == "hwc" and kind != "linear" else taps
    wrapped = by_reference(narrow, taps, getattr(layer, "groups", 1))
    fast = emulate(narrow, taps[:, 0].reshape(-1, taps.shape[-1]).long().numpy()).sums
    if taps.shape[1] == 1:
        assert np.array_equal(fast.reshape(len(x), -1, len(integer.rows)).swapaxes(1, 2), wrapped)
    bias = 0 if layer.bias is None else layer.bias.detach().double().reshape(1, -1, 1)
    expected = torch.from_numpy(wrapped * integer.scale[None, :, None]) * integer.act_scale + bias
    with torch.no_grad(), aa.wrapping(model, bits):
        out = model(x).double().reshape(expected.shape)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        plain = model(x).double().reshape(expected.shape)
    assert bool(torch.isclose(plain, out, atol=1e-5).all()) == (bits is None), "4 and 6 bits overflow, 9 do not"


def narrowed(integer, bits):
    """The same integers on a narrower register."""
    return aa.IntegerLayer(
        **{
            **{f: getattr(integer, f) for f in integer.__dataclass_fields__},
            "accumulator": aa.Accumulator(bits, integer.accumulator.overflow, integer.accumulator.preload),
        }
    )


def test_wrapping_changes_only_layers_of_the_request_and_ends_with_the_block():
    torch.manual_seed(0)
    x = torch.rand(8, 10)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    aa.prepare_(model, aa.Spec(acc_bits=16), keep={"0": 8})
    aa.calibrate(model, [x])
    with torch.no_grad():
        before = model(x)
        with aa.wrapping(model):
            torch.testing.assert_close(model(x), before)
        with aa.wrapping(model, 3):
            assert model[0].wrap_bits is None
            assert not torch.allclose(model(x), before)
        assert torch.equal(model(x), before)
        with pytest.raises(RuntimeError, match="stop"), aa.wrapping(model, 3):
            raise RuntimeError("stop")
        assert torch.equal(model(x), before)


def test_wrapping_may_be_nested():
    torch.manual_seed(0)
    x = torch.rand(8, 10)
    model = prepared(nn.Linear(10, 4), x, method="baseline", acc_bits=8)
    with torch.no_grad(), aa.wrapping(model, 5):
        before = model(x)
        with aa.wrapping(model, 3):
            assert not torch.allclose(model(x), before)
        assert torch.equal(model(x), before)
    assert model[0].wrap_bits is None


@pytest.mark.parametrize("bits", [0, -3, 1, 33])
def test_wrapping_in_no_register_is_refused(bits):
    model = prepared(nn.Linear(10, 4), torch.rand(4, 10))
    with pytest.raises(ValueError, match=rf"^acc_bits must lie in .*, not {bits}$"), aa.wrapping(model, bits):
        pass
    assert model[0].wrap_bits is None


@pytest.mark.parametrize("preload", ["none", "free"])
@pytest.mark.parametrize("bits", [5, 7])
@pytest.mark.parametrize("case", [(4, 2, 0, 1), (3, 2, 1, 1), (2, 3, 0, 1), (5, 3, 2, 2)], ids=str)
def test_wrapping_of_transposed_convolutions_equals_the_slow_emulation(case, bits, preload):
    """Every phase wraps from its own start value; at 7 bits, which the weights were made for, nothing wraps."""
    size, stride, padding, dilation = case
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4)
    make = nn.ConvTranspose1d(3, 2, size, stride, padding, dilation=dilation, bias=False)
    model = prepared(make, x, acc_bits=7, preload=preload)
    with torch.no_grad():
        model[0].weight.abs_()  # sums of one sign: a free start value lies at the far end of the register
    (integer,) = aa.integer_layers(model)
    narrow = narrowed(integer, bits)
    codes = model[0].input_quant.to_codes(x).detach().long().numpy()
    residues = sorted({k * dilation % stride for k in range(size)})
    with torch.no_grad(), aa.wrapping(model, bits):
        out = model(x).double().numpy()
    for b, channel, o in np.ndindex(*out.shape):
        residue = (o + padding) % stride
        expected = 0
        if residue in residues:
            row = channel * len(residues) + residues.index(residue)
            taps = [k for k in range(size) if k * dilation % stride == residue]
            where = [(o + padding - k * dilation) // stride for k in taps]
            inputs = [codes[b, c, i] if 0 <= i < 4 else 0 for c in range(3) for i in where]
            inputs += [0] * (integer.fan_in - len(inputs))
            expected = reference.run(narrow, row, inputs)
        scale = integer.scale[channel * len(residues)] * integer.act_scale
        assert out[b, channel, o] == pytest.approx(expected * scale)
    with torch.no_grad():
        assert np.allclose(model(x).double().numpy(), out) == (bits == 7)


def test_wrapping_of_tiles_is_refused():
    x = torch.rand(4, 10)
    model = prepared(nn.Linear(10, 4), x, tile=4)
    with aa.wrapping(model), torch.no_grad(), pytest.raises(ValueError, match="0: wrap-around of tiles"):
        model(x)


@pytest.mark.parametrize("method", ["projected", "a2q", "a2q+"])
@pytest.mark.parametrize("tile", [None, 4])
def test_worst_cases_fit_the_register(method, tile):
    torch.manual_seed(0)
    for layer, shape in ((nn.Linear(40, 8), (4, 40)), (nn.ConvTranspose2d(4, 3, 3, 2), (2, 4, 3, 3))):
        model = prepared(layer, torch.rand(shape), method=method, tile=tile, acc_bits=8)
        (integer,) = aa.integer_layers(model)
        lo, hi = worst_case(integer.rows, integer.codes, integer.preload, tile)
        assert max(bits_needed(*ends) for ends in zip(lo.flat, hi.flat, strict=True)) <= 8


def test_unprepared_and_uncalibrated_models_are_refused():
    with pytest.raises(ValueError, match="no quantized layer; call prepare_ first"):
        aa.integer_layers(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2))
    aa.prepare_(model, aa.Spec())
    with pytest.raises(ValueError, match=r"^0: not calibrated; call calibrate"):
        aa.integer_layers(model)


def test_a_weight_that_the_next_run_computes_is_refused():
    """The tensor that the last run left is not what the next one multiplies."""
    model = prepared(nn.Linear(10, 4), torch.rand(6, 10))
    prune.l1_unstructured(model[0], "weight", amount=0.1)
    for read in (aa.certify, aa.integer_layers, aa.integer_network):
        with pytest.raises(ValueError, match=r"^0: its weight must be a parameter, not computed .* prune\.remove"):
            read(model)
    prune.remove(model[0], "weight")
    assert aa.certify(model).holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (1,)}, r"^0: changed since prepare_, .*: stride \(1,\), not \(2,\)"),
        ({"stride": 2}, r"stride 2, not \(2,\)"),
        ({"dilation": (2,), "groups": 2}, r"dilation \(2,\), not \(1,\), groups 2, not 1"),
        ({"weight": nn.Parameter(torch.ones(4, 4, 3))}, r"weight shape \(4, 4, 3\), not \(4, 4, 4\)"),
    ],
)
def test_a_shape_that_changed_after_preparing_is_refused(change, message):
    model = prepared(nn.ConvTranspose1d(4, 4, 4, stride=2), torch.rand(2, 4, 5), acc_bits=8)
    for name, value in change.items():
        setattr(model[0], name, value)
    with pytest.raises(ValueError, match=message):
        aa.certify(model)


def test_the_stride_of_a_convolution_changes_no_sum():
    model = prepared(nn.Conv1d(4, 4, 3, stride=2), torch.rand(2, 4, 7))
    model[0].stride = (1,)
    assert aa.certify(model).holds
