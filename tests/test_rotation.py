"""Rotated linear layers and a scale for each token: the same network, other codes, and the proof holds for both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import accaware as aa
from accaware.quantizers import ActivationQuantizer
from accaware.rotation import hadamard, turned
from cli_helpers import fails


@pytest.mark.parametrize(("features", "size"), [(1, 1), (2, 2), (7, 1), (12, 4), (64, 64), (96, 32), (1024, 256)])
def test_it_is_orthogonal_and_as_large_as_powers_of_two_allow(features, size):
    matrix = hadamard(features).double()
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix.abs(), matrix.abs()[0, 0].expand(size, size))


def test_its_signs_never_change():
    """They are in no state dict."""
    first = torch.tensor([1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1])  # Rudin-Shapiro
    assert torch.equal(hadamard(16)[:, 0] * 4, first.float())


def test_products_stay_and_an_outlier_is_spread_over_its_block():
    x, w, turn = torch.randn(5, 3, 96).double(), torch.randn(7, 96).double(), hadamard(96).double()
    torch.testing.assert_close(turned(x, turn) @ turned(w, turn).mT, x @ w.mT)
    assert turned(torch.zeros(0, 96), turn.float()).shape == (0, 96)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(turned(x.float(), turn).double(), turned(x, turn), rtol=1e-5, atol=1e-5)
    spike = torch.zeros(96)
    spike[40] = 1.0
    assert torch.equal(turned(spike, hadamard(96)).abs() > 0, torch.arange(96) // 32 == 1)
    positive = torch.rand(1000, 64)
    most = turned(positive, hadamard(64)).abs().amax(-1) / positive.norm(dim=-1)
    assert float(most.max()) < 0.5, "no coefficient holds the mean"


def test_each_token_has_the_scale_of_its_largest_value():
    quantizer = ActivationQuantizer(8, per_token=True)
    x = torch.randn(4, 50, 16) * torch.logspace(-3, 3, 50).unsqueeze(-1)
    quantizer.observe()
    assert quantizer(x) is x
    quantizer.observing = False
    quantizer.calibrate()
    assert quantizer.fixed_step() is None
    assert quantizer.step(x).shape == (4, 50, 1)
    off = (quantizer(x) - x).detach().norm(dim=-1) / x.norm(dim=-1)
    assert float(off.max()) < 0.02, "one scale would lose the small tokens"
    torch.testing.assert_close(quantizer(1000 * x), 1000 * quantizer(x))
    assert float(quantizer.to_codes(x).detach().abs().amax()) <= 127
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(quantizer(torch.zeros(3, 16, dtype=kind)), torch.zeros(3, 16))
        assert torch.equal(quantizer.to_codes(x.to(kind)), quantizer.to_codes(x.to(kind).float()))
    quantizer(x).sum().backward()
    assert torch.isfinite(quantizer.scale.grad)


class Mixed(nn.Module):
    """A convolution, tokens and two linear layers that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 2, 2)
        self.a, self.b = nn.Linear(24, 48), nn.Linear(24, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        return self.head(torch.relu(self.a(x)) * self.b(x)).mean(1)


def prepared(**request):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(64, 3, 8, 8)
    x[:, 0] *= 30
    reference = torch.nn.Sequential(model)
    wanted = reference(x).detach()
    aa.prepare_(model, aa.Spec(weight_bits=8, act_bits=8, **request), x[:2], keep={"head": 8})
    assert model(x).dist(wanted) < 1e-3 * wanted.norm(), "rotated, but not yet quantized"
    aa.calibrate(model, [x])
    return model.eval(), x, wanted


@pytest.mark.parametrize("request_", [{"act_scale": "token"}, {"rotate": True}, {"act_scale": "token", "rotate": True}])
def test_the_network_stays_the_proof_holds_and_the_integers_are_those_of_the_forward(request_):
    model, x, wanted = prepared(acc_bits=20, **request_)
    assert model(x).dist(wanted) < 0.1 * wanted.norm()
    certificate = aa.certify(model)
    assert certificate.holds
    assert model.conv.rotation is None
    assert model.head.rotation is None, "kept out of the request"
    assert ("a.rotation" in {op.name for op in certificate.operations}) == request_.get("rotate", False)
    assert not model.conv.input_quant.per_token
    assert model.a.input_quant is model.b.input_quant
    layer = next(layer for layer in aa.integer_layers(model) if layer.name == "a")
    tokens = model.conv(x).flatten(2).mT
    inputs = model.a.rotated(tokens)
    sums = model.a.input_quant.to_codes(inputs) @ torch.tensor(layer.rows).double().mT
    out = sums * torch.tensor(layer.scale) * model.a.input_quant.step(inputs) + model.a.bias
    torch.testing.assert_close(model.a(tokens), out.float(), rtol=1e-4, atol=1e-4)
    assert (layer.act_scale is None) == (request_.get("act_scale") == "token")
    assert ("rotated" in layer.note, "token" in layer.note) == ("rotate" in request_, "act_scale" in request_)
    with torch.no_grad(), aa.wrapping(model):
        wrapped = model(x)
    assert wrapped.dist(model(x)) < 1e-2 * wanted.norm(), "but for roundings of later codes, nothing wrapped"
    with torch.no_grad():
        integers = aa.integer_network(model, x)(x)
    assert integers.dist(model(x)) < 1e-2 * wanted.norm(), "but for roundings of later codes"


def test_ptq_sees_the_rotated_weights():
    torch.manual_seed(0)
    x = torch.randn(400, 32)
    x[:, 3] *= 200  # an outlier, which one scale cannot hold beside the rest
    reference = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    wanted, errors = reference(x).detach(), {}
    for rotate in (False, True):
        request = aa.Spec(weight_bits=8, act_bits=8, acc_bits=24, rotate=rotate)
        model = aa.prepare_(copy.deepcopy(reference), request, x[:2])
        aa.calibrate(model, [x])
        aa.reconstruct(model, reference, [x])
        assert aa.certify(model).holds
        errors[rotate] = float(model.eval()(x).detach().dist(wanted))
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("algorithm", ["axe-gpfq", "axe-gptq"])
def test_rivals_and_bias_correction_see_them_too(algorithm):
    torch.manual_seed(0)
    x = torch.randn(400, 32)
    reference = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model = aa.prepare_(copy.deepcopy(reference), aa.Spec(weight_bits=8, act_bits=8, acc_bits=20, rotate=True), x[:2])
    aa.calibrate(model, [x])
    aa.reconstruct(model, reference, [x], algorithm)
    assert aa.certify(model).holds
    assert float(model.eval()(x).detach().dist(reference(x).detach())) < 0.05 * float(reference(x).detach().norm())
    before = [layer.bias.detach().clone() for layer in (model[0], model[2])]
    aa.bias_correct(model, reference, [x])
    for bias, layer in zip(before, (model[0], model[2]), strict=True):
        torch.testing.assert_close(layer.bias.detach(), bias, atol=0.05, rtol=0)


@pytest.mark.parametrize("request_", [{"act_scale": "token"}, {"rotate": True}])
def test_training_steps_lower_the_loss(request_):
    model, x, wanted = prepared(acc_bits=14, **request_)
    optimizer, losses = torch.optim.Adam(model.train().parameters(), 1e-4), []
    for _ in range(20):
        loss = (model(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(x), model.eval()(x))
    assert aa.certify(twin).holds


def test_what_shares_a_weight_keeps_its_own():
    a, b, c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = c.weight = a.weight
    model, x = nn.Sequential(a, b, c), torch.randn(3, 8)
    wanted = model(x).detach()
    aa.prepare_(model, aa.Spec(8, 8, 20, rotate=True), x, keep={"1": 8, "2": "float"})
    torch.testing.assert_close(model(x).detach(), wanted)


def test_float_weights_and_equalization_come_first_and_earlier_state_dicts_load():
    model, _, _ = prepared(acc_bits=20, rotate=True)
    with pytest.raises(ValueError, match="a: its weights are rotated; load float weights before prepare_"):
        model.load_state_dict(Mixed().state_dict(), strict=False)
    fresh = aa.prepare_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), aa.Spec(rotate=True))
    with pytest.raises(ValueError, match="rotated already; equalize comes before prepare_"):
        aa.equalize(fresh)
    plain, x, _ = prepared(acc_bits=20)
    state = {name: t[:6] if name.endswith("request") else t for name, t in plain.state_dict().items()}
    other, _, _ = prepared(acc_bits=20)
    other.load_state_dict(state)
    assert torch.equal(other(x), plain(x))


def test_a_state_dict_of_another_kind_and_a_model_without_linear_layers_are_refused(capsys):
    model, _, _ = prepared(acc_bits=20, rotate=True)
    other, _, _ = prepared(acc_bits=20)
    with pytest.raises(ValueError, match="a: the checkpoint was made for rotate 1, not 0"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"for nn\.Linear, of which the request has none"):
        aa.prepare_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)), aa.Spec(rotate=True), keep={"1": 8})
    with pytest.raises(ValueError, match="act_scale must be one of tensor, token, not 'row'"):
        aa.Spec(act_scale="row")
    assert "act_scale must be one of" in fails(["train", "--act-scale", "row", "--out", "no"], capsys)
