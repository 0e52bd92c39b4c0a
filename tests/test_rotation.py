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


@pytest.mark.parametrize(("features", "size"), [(1, 1), (2, 2), (7, 1), (12, 4), (64, 64), (96, 32)])
def test_it_is_orthogonal_and_as_large_as_powers_of_two_allow(features, size):
    matrix = hadamard(features).double()
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix.abs(), matrix.abs()[0, 0].expand(size, size))
    assert torch.equal(hadamard(features), hadamard(features)), "the same for every layer and run"


def test_products_stay_and_an_outlier_is_spread_over_its_block():
    x, w, turn = torch.randn(5, 3, 96).double(), torch.randn(7, 96).double(), hadamard(96).double()
    torch.testing.assert_close(turned(x, turn) @ turned(w, turn).mT, x @ w.mT)
    spike = torch.zeros(96)
    spike[40] = 1.0
    assert torch.equal(turned(spike, hadamard(96)).abs() > 0, torch.arange(96) // 32 == 1)
    positive = torch.rand(1000, 64)
    most = turned(positive, hadamard(64)).abs().amax(-1) / positive.norm(dim=-1)
    assert float(most.mean()) < 0.5, "no coefficient holds the mean"


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
    assert torch.equal(quantizer(torch.zeros(3, 16)), torch.zeros(3, 16))
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
    assert not model.conv.input_quant.per_token
    assert model.a.input_quant is model.b.input_quant
    layer = next(layer for layer in aa.integer_layers(model) if layer.name == "a")
    tokens = model.conv(x).flatten(2).mT
    inputs = model.a.rotated(tokens)
    sums = model.a.input_quant.to_codes(inputs) @ torch.tensor(layer.rows).double().mT
    out = sums * torch.tensor(layer.scale) * model.a.input_quant.step(inputs) + model.a.bias
    torch.testing.assert_close(model.a(tokens), out.float(), rtol=1e-4, atol=1e-4)
    assert (layer.act_scale is None) == (request_.get("act_scale") == "token")
    with torch.no_grad(), aa.wrapping(model):
        wrapped = model(x)
    assert wrapped.dist(model(x)) < 1e-2 * wanted.norm(), "but for roundings of later codes, nothing wrapped"
    with pytest.raises(ValueError, match="a: act_scale 'token' and rotate have no integer network"):
        aa.integer_network(model, x)


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


def test_a_state_dict_of_another_kind_and_a_model_without_linear_layers_are_refused(capsys):
    model, _, _ = prepared(acc_bits=20, rotate=True)
    other, _, _ = prepared(acc_bits=20)
    with pytest.raises(ValueError, match="a: the checkpoint was made for rotate 1, not 0"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"for nn\.Linear, which this model has none of"):
        aa.prepare_(nn.Sequential(nn.Conv2d(3, 4, 1)), aa.Spec(rotate=True))
    with pytest.raises(ValueError, match="act_scale must be one of tensor, token, not 'row'"):
        aa.Spec(act_scale="row")
    assert "act_scale must be one of" in fails(["train", "--act-scale", "row", "--out", "no"], capsys)
