"""Layers: every kind computes exactly what an integer machine would, and behaves like the torch layer it replaces."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import accaware as aa
from accaware.layers import LAYERS, QuantLayer

ACT_SCALE, WEIGHT_SCALE = 2.0**-3, 2.0**-6


def power_of_two_scales(model):
    """Learned scales become powers of two, so that float results are exact; weights land on multiples of 2^-10."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, QuantLayer):
                layer.input_quant.scale.fill_(ACT_SCALE)
                layer.weight_quant.set_step(torch.full_like(layer.weight_quant.step(), WEIGHT_SCALE))
                layer.weight.copy_((layer.weight * 1024).round() / 1024)
                if layer.bias is not None:
                    layer.bias.copy_((layer.bias * 512).round() / 512)
    return model


def prepared(layer, x, scaled=True, **options):
    model = nn.Sequential(layer)
    aa.prepare_(model, aa.Spec(**{"acc_bits": 9, **options}))
    aa.calibrate(model, [x], init="none")
    return power_of_two_scales(model) if scaled else model


def dyadic(*shape, signed=False, seed=0):
    """Multiples of 1/32 in [0, 3) or [-1.5, 1.5), some exactly half-way between two codes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 96, shape, generator=generator).float() / 32
    return x - 1.5 if signed else x


def codes_of(x, codes):
    """Round half to even on the grid of ACT_SCALE, in numpy integers."""
    return np.clip(np.rint(x.numpy() / ACT_SCALE), codes.lo, codes.hi).astype(np.int64)


# Slow integer operators ------------------------------------------------------------------------------------------


def pad(x, amounts, mode):
    """x [B, C, *S]; amounts: (before, after) of every spatial dimension."""
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    return np.pad(x, [(0, 0), (0, 0), *amounts], mode=modes[mode])


def convolve(x, q, layer):
    """Integer convolution by its definition; x [B, C, *S], q [O, C/groups, *K]."""
    pads = layer.padding
    if pads == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    elif pads == "valid":
        pads = [(0, 0)] * len(layer.kernel_size)
    else:
        pads = [(p, p) for p in pads]
    x = pad(x, pads, layer.padding_mode)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    size = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    out = np.zeros((len(x), len(q), *size), np.int64)
    per_group, width = len(q) // layer.groups, q.shape[1]
    for o in range(len(q)):
        first = o // per_group * width
        for position in np.ndindex(*size):
            for tap in np.ndindex(*layer.kernel_size):
                where = tuple(
                    p * s + k * d for p, s, k, d in zip(position, layer.stride, tap, layer.dilation, strict=True)
                )
                out[(slice(None), o, *position)] += (
                    x[(slice(None), slice(first, first + width), *where)] @ q[(o, slice(None), *tap)]
                )
    return out


def scatter(x, q, layer):
    """Integer transposed convolution by its definition: every input adds its kernel; q [C, O/groups, *K]."""
    spatial = range(len(layer.kernel_size))
    s, d, k, p, e = layer.stride, layer.dilation, layer.kernel_size, layer.padding, layer.output_padding
    full = [(x.shape[2 + i] - 1) * s[i] + d[i] * (k[i] - 1) + 1 + e[i] for i in spatial]
    per_group = q.shape[1]
    out = np.zeros((len(x), per_group * layer.groups, *full), np.int64)
    for c in range(len(q)):
        first = c // (len(q) // layer.groups) * per_group
        for position in np.ndindex(*x.shape[2:]):
            for tap in np.ndindex(*k):
                where = tuple(position[i] * s[i] + tap[i] * d[i] for i in spatial)
                for o in range(per_group):
                    out[(slice(None), first + o, *where)] += x[(slice(None), c, *position)] * q[(c, o, *tap)]
    crop = tuple(slice(p[i], full[i] - p[i]) for i in spatial)
    return out[(slice(None), slice(None), *crop)]


def integer_result(layer, x):
    """What the layer must give, from integers and power-of-two scales."""
    weight, _, _ = layer.deployed()
    q = layer.rows.merge(weight).numpy()
    codes = codes_of(x, layer.input_quant.codes)
    if isinstance(layer, nn.Linear):
        total = codes @ q.T
    else:
        total = (scatter if layer.transposed else convolve)(codes, q, layer)
    out = torch.from_numpy(total) * (ACT_SCALE * WEIGHT_SCALE)
    if layer.bias is not None:
        bias = layer.bias.detach().double()
        out = out + (bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (out.dim() - 2)))
    return out


CASES = {
    "linear": (lambda: nn.Linear(9, 4), (3, 9)),
    "linear without bias": (lambda: nn.Linear(9, 4, bias=False), (2, 3, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9)),
    "conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 4)),
    "conv2d rectangular": (
        lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        (1, 3, 5, 6),
    ),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (1, 4, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (1, 2, 4, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (1, 2, 4, 5)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 5)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (1, 2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (1, 2, 2, 4, 3)),
    "conv3d grouped": (lambda: nn.Conv3d(2, 2, 2, groups=2, bias=False), (1, 2, 2, 3, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), (2, 3, 5)),
    "transposed1d dilated": (lambda: nn.ConvTranspose1d(4, 2, 3, 3, 1, 2, groups=2, dilation=2), (1, 4, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 2, 3, 2, 1, 1), (1, 3, 3, 4)),
    "transposed2d grouped": (lambda: nn.ConvTranspose2d(4, 4, (3, 2), (1, 3), bias=False, groups=2), (1, 4, 3, 3)),
    "transposed2d depthwise": (lambda: nn.ConvTranspose2d(3, 3, 3, 2, groups=3), (1, 3, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, (1, 2, 3), (1, 2, 1), (0, 0, 1)), (1, 2, 2, 2, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("signed", [False, True])
def test_the_forward_is_integer_arithmetic(case, signed):
    torch.manual_seed(0)
    make, shape = CASES[case]
    x = dyadic(*shape, signed=signed)
    model = prepared(make(), x)
    expected = integer_result(model[0], x)
    assert torch.equal(model(x).double(), expected), "while training"
    with torch.no_grad():
        assert torch.equal(model(x).double(), expected), "deployed"
    assert int(expected.count_nonzero()) > expected.numel() // 2


@pytest.mark.parametrize("method", ["baseline", "projected", "a2q", "a2q+"])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d depthwise", "transposed2d"])
@pytest.mark.parametrize("tile", [None, 4])
def test_every_method_computes_in_integers(case, method, tile):
    torch.manual_seed(1)
    make, shape = CASES[case]
    x = dyadic(*shape)
    model = prepared(make(), x, method=method, tile=tile, acc_bits=10, order="hwc")
    expected = integer_result(model[0], x)
    assert torch.equal(model(x).double(), expected)
    assert int(model[0].deployed()[0].count_nonzero()) > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_all_seven_kinds_are_covered(kind):
    made = {type(make()) for make, _ in CASES.values()}
    assert kind in made
    assert len(LAYERS) == 7
    assert issubclass(LAYERS[kind], kind)


@pytest.mark.parametrize("case", CASES)
def test_float_gradients_are_those_of_the_torch_layer_on_quantized_operands(case):
    torch.manual_seed(0)
    make, shape = CASES[case]
    x = dyadic(*shape)
    model = prepared(make(), x, acc_bits=32)
    layer = model[0]
    plain = make()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
    quantized = (x / ACT_SCALE).round().clamp(0, 15) * ACT_SCALE
    grad = torch.randn_like(plain(quantized))
    model(x).backward(grad)
    plain(quantized).backward(grad)
    inside = (layer.weight / WEIGHT_SCALE).abs() <= 7
    assert torch.equal(layer.weight.grad, plain.weight.grad * inside)
    if layer.bias is not None:
        assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert all(p.grad is not None for p in model.parameters())


def test_output_size_of_a_transposed_convolution():
    x = dyadic(1, 3, 3, 4)
    model = prepared(nn.ConvTranspose2d(3, 2, 3, stride=2), x)
    assert model[0](x, [8, 10]).shape == (1, 2, 8, 10)
    assert model[0](x, output_size=[7, 9]).shape == (1, 2, 7, 9)


@pytest.mark.parametrize("kind", ["conv2d", "linear", "transposed2d"])
def test_autocast_uses_the_same_integers(kind, monkeypatch):
    make, shape = CASES[kind]
    x = dyadic(*shape)
    model = prepared(make(), x)
    seen = []
    monkeypatch.setattr(model[0], "operate", lambda x, weight, bias, *args: seen.append((x, weight)) or x)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with torch.no_grad():
            model(x)
    for x_mixed, weight_mixed in seen[1:]:
        assert torch.equal(x_mixed, seen[0][0])
        assert torch.equal(weight_mixed, seen[0][1])
        assert weight_mixed.dtype == torch.float32


def test_training_under_autocast_keeps_the_guarantee():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    aa.prepare_(model, aa.Spec(acc_bits=7), sample=x)
    aa.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert aa.certify(model).holds


def test_float64():
    x = dyadic(2, 3, 5, 5).double()
    model = nn.Sequential(nn.Conv2d(3, 4, 3).double())
    aa.prepare_(model, aa.Spec(acc_bits=9))
    model.double()
    aa.calibrate(model, [x])
    out = model(x)
    assert out.dtype == torch.float64
    out.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(dtype):
    x = torch.rand(4, 8)
    name = str(dtype).removeprefix("torch.")
    message = rf"^0: weights must be float32 or float64, not {name}, .*; call float\(\)"
    with pytest.raises(ValueError, match=message):
        aa.prepare_(nn.Sequential(nn.Linear(8, 4)).to(dtype), aa.Spec())
    model = prepared(nn.Linear(8, 4), x, scaled=False).to(dtype)
    for run in (lambda: model(x.to(dtype)), lambda: aa.certify(model)):
        with pytest.raises(ValueError, match=message):
            run()
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            run()
    assert model.float()(x).isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_an_empty_batch_gives_an_empty_output(kind):
    make, shape = CASES[kind]
    model = prepared(make(), dyadic(*shape))
    empty = torch.zeros(0, *shape[1:])
    model(empty).sum().backward()
    with torch.no_grad():
        assert model(empty).shape == (0, *model(dyadic(*shape)).shape[1:])


# The deployed integers and their cache ---------------------------------------------------------------------------


def test_deployed_integers_follow_every_change_of_the_weights():
    torch.manual_seed(0)
    x = torch.rand(16, 8)
    model = prepared(nn.Linear(8, 4), x, scaled=False)
    layer = model[0]

    def check():
        fresh = layer.weight_quant.deploy(layer.rows.split(layer.weight.detach()))
        for cached, exact in zip(layer.deployed(), fresh, strict=True):
            assert torch.equal(cached, exact)
        q, scale, _ = fresh
        with torch.no_grad():
            assert torch.equal(layer.quantized_weight(), (q * scale).float().reshape(4, 8))

    # Fused steps leave the version counters of the tensors alone.
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            before = layer.deployed()[0].clone()
            optimizer = kind([layer.weight], lr=0.1, **options)
            layer.weight.grad = torch.randn(4, 8)
            optimizer.step()
            check()
            assert not torch.equal(before, layer.deployed()[0]), (kind, options)
    layer.weight.data.mul_(-1)
    check()
    with torch.no_grad():
        layer.weight.mul_(-1)
    check()
    layer.weight = nn.Parameter(torch.randn(4, 8))
    check()
    state = {name: -value if name == "0.weight" else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    check()
    with torch.no_grad():
        layer.weight_quant.scale.mul_(2)
    check()


def test_deployed_integers_are_computed_once(monkeypatch):
    x = torch.rand(16, 8)
    model = prepared(nn.Linear(8, 4), x, scaled=False)
    calls = []
    deploy = model[0].weight_quant.deploy
    monkeypatch.setattr(model[0].weight_quant, "deploy", lambda rows: calls.append(1) or deploy(rows))
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(calls) == 1


def test_deepcopies_are_independent():
    x = torch.rand(16, 8)
    model = prepared(nn.Linear(8, 4), x, scaled=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
        twin[0].weight.mul_(-1)
        twin[0].input_quant.scale.mul_(2)
        assert not torch.equal(model(x), twin(x))
    twin(x).sum().backward()
    assert model[0].weight.grad is None
    assert aa.certify(twin).holds


def test_pickling(tmp_path):
    x = torch.rand(16, 8)
    model = prepared(nn.Linear(8, 4), x, scaled=False)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_weights_that_are_not_finite_have_no_integers():
    model = prepared(nn.Linear(8, 4), torch.rand(16, 8), scaled=False)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        for run in (lambda: model(torch.rand(2, 8)), lambda: aa.certify(model)):
            with pytest.raises(ValueError, match=r"^0: its weights and their scales must be finite"):
                run()


@pytest.mark.parametrize("method", ["a2q", "a2q+"])
def test_what_was_bound_without_gradients_can_be_trained(method):
    x = torch.rand(16, 8)
    calibrated = nn.Sequential(nn.Linear(8, 4))
    aa.prepare_(calibrated, aa.Spec(acc_bits=9, method=method, tile=3))
    loaded = copy.deepcopy(calibrated)
    with torch.inference_mode():
        aa.calibrate(calibrated, [x])
        loaded.load_state_dict(calibrated.state_dict())
        loaded(x)
    for model in (calibrated, loaded):
        model(x).sum().backward()
        assert model[0].weight.grad.isfinite().all()


def test_a_parametrization_makes_a_weight_that_no_proof_is_of():
    model = prepared(nn.Linear(8, 4), torch.rand(16, 8), scaled=False)
    parametrizations.weight_norm(model[0])
    model(torch.rand(2, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"^0: its weight must be a parameter, .* remove_parametrizations"):
        aa.certify(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert aa.certify(model).holds


# Start values and wrap-around --------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tile", [None, 3])
def test_the_free_preload_makes_the_range_fit(signed, tile):
    torch.manual_seed(0)
    x = dyadic(16, 12, signed=signed)
    model = prepared(nn.Linear(12, 6), x, preload="free", acc_bits=7, tile=tile)
    layer = model[0]
    with torch.no_grad():
        layer.weight.abs_()  # one-sided rows need the start value most
    q, _, _ = layer.deployed()
    b = layer.preload(q)
    codes = layer.input_quant.codes
    p, n = q.clamp(min=0).sum(-1), (-q).clamp(min=0).sum(-1)
    lo, hi = b + codes.lo * p - codes.hi * n, b + codes.hi * p - codes.lo * n
    assert b.shape == (6, layer.rows.parts)
    assert lo.min() >= -64
    assert hi.max() <= 63
    assert signed or int((b != 0).sum()) > 0
    # The nearest to 0 that fits.
    nearer = b - b.sign()
    fits = (nearer + hi - b <= 63) & (nearer + lo - b >= -64)
    assert not bool((fits & (b != 0)).any())


def test_without_a_free_preload_the_register_starts_at_zero():
    x = dyadic(4, 12)
    layer = prepared(nn.Linear(12, 6), x)[0]
    assert int(layer.preload(layer.deployed()[0]).abs().sum()) == 0


def test_all_input_ranks_of_a_linear_layer():
    x = dyadic(2, 3, 5, 8)
    model = prepared(nn.Linear(8, 4), x)
    assert torch.equal(model(x).reshape(-1, 4), model(x.reshape(-1, 8)))


def test_the_kept_layers_and_the_float_path_before_calibration():
    """A layer without codes passes its operands through."""
    for (case, (make, shape)), bits in itertools.product(list(CASES.items())[::4], (8, 12)):
        layer = make()
        x = torch.randn(*shape)
        expected = layer(x)
        model = nn.Sequential(layer)
        aa.prepare_(model, aa.Spec(acc_bits=bits))
        assert torch.equal(model(x), expected), case
        assert F.mse_loss(model(x), expected) == 0


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("method", ["projected", "a2q+"])
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_torch_compile_runs_forward_and_backward(backend, method):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    aa.prepare_(model, aa.Spec(acc_bits=8, method=method), sample=x)
    aa.calibrate(model, [x])
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        outputs = []
        for run, net in ((compiled, model), (eager, eager)):
            net.zero_grad()
            out = run(x)
            out.square().sum().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
            outputs.append(out.detach())
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for (name, p), (_, twin) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert aa.certify(model).holds
