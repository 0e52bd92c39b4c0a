"""Reconstruction of whole networks: the budget, the integers that are deployed, and outputs nearer the float ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accaware as aa
from accaware.cli import run
from accaware.layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantLayer, QuantLinear
from accaware.prepare import quant_layers
from accaware.ptq import model as ptq
from accaware.ptq.moments import Moments
from cli_helpers import fails


class Net(nn.Module):
    """Plain, grouped, depthwise, strided, transposed and linear layers; one is called twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1, dilation=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.down = nn.Conv2d(6, 12, 3, stride=2)
        self.p = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.grouped(F.relu(self.grouped(x))))
        x = F.relu(self.down(self.up(x)))
        return self.p(x.mean((2, 3)))


BATCHES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)).cumsum(2) for i in range(3)]


def prepared(calibrated=True, init="search", **options):
    torch.manual_seed(0)
    reference = Net().train()
    for batch in BATCHES:
        reference(batch)
    model = copy.deepcopy(reference.eval())
    aa.prepare_(model, aa.Spec(**{"weight_bits": 4, "act_bits": 4, "acc_bits": 9, **options}), BATCHES[0])
    if calibrated:
        aa.calibrate(model, BATCHES, init=init)
    return model, reference


def distance(model, reference):
    with torch.no_grad():
        return sum(float((model(x) - reference(x)).square().sum()) for x in BATCHES)


@pytest.mark.parametrize(
    "options",
    [{}, {"preload": "free"}, {"tile": 5, "acc_bits": 8}, {"tile": 5, "acc_bits": 8, "order": "hwc"}, {"acc_bits": 32}],
)
def test_the_integers_fit_and_bring_the_outputs_nearer(options):
    model, reference = prepared(**options)
    model.eval()
    before = distance(model, reference)
    up = model.up.weight.clone()
    chosen = {name: layer.rows.merge(layer.deployed()[0]) for name, layer in quant_layers(model).items()}
    aa.reconstruct(model, reference, BATCHES)
    assert distance(model, reference) < 0.7 * before
    assert aa.certify(model).holds
    for name, layer in quant_layers(model).items():
        q, scale, repaired = layer.deployed()
        assert not repaired.any()
        same = torch.equal(layer.rows.merge(q), chosen[name])
        if name == "up":  # transposed ones stay
            assert same
            assert torch.equal(layer.weight, up)
        else:
            assert not same
            kept = layer.rows.merge(q), layer.rows.merge(scale.expand_as(q))
            near = reference.get_submodule(name).weight / kept[1] - kept[0]  # what rounding took away
            torch.testing.assert_close(layer.weight / kept[1] - kept[0], near.clamp(-0.49, 0.49), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["axe-gptq", "axe-gpfq"])
@pytest.mark.parametrize("options", [{}, {"tile": 5, "acc_bits": 8}])
def test_rivals_fit_and_are_deployed_as_they_are(algorithm, options, monkeypatch):
    chosen = {}
    inner = ptq.at_best_scale

    def noted(*args):
        q, scale = inner(*args)
        chosen[len(chosen)] = q
        return q, scale

    monkeypatch.setattr(ptq, "at_best_scale", noted)
    model, reference = prepared(**options)
    model.eval()
    before = distance(model, reference)
    aa.reconstruct(model, reference, BATCHES, algorithm)
    assert distance(model, reference) < before
    assert aa.certify(model).holds
    layers = [layer for name, layer in quant_layers(model).items() if name != "up"]
    for layer, q in zip(layers, chosen.values(), strict=True):
        deployed, _, repaired = layer.deployed()
        assert not repaired.any()
        assert torch.equal(layer.rows.merge(deployed).reshape(q.shape).double(), q)


@pytest.mark.parametrize(("algorithm", "method"), [("axe-gptq", "projected"), ("gpfq", "baseline")])
def test_rivals_may_keep_the_scales_of_calibration(algorithm, method):
    """As published: of the largest weight (init "none"). A hundred scales to choose from end nearer."""
    distances = {}
    for fixed in (True, False):
        model, reference = prepared(method=method, acc_bits=9, init="none")
        scales = {name: layer.weight_quant.step().clone() for name, layer in quant_layers(model).items()}
        aa.reconstruct(model.eval(), reference, BATCHES, algorithm, fixed_scale=fixed)
        distances[fixed] = distance(model, reference)
        kept = {
            name: torch.equal(layer.weight_quant.step(), scales[name]) for name, layer in quant_layers(model).items()
        }
        assert all(kept.values()) if fixed else not all(kept.values())
        assert aa.certify(model).holds == (method == "projected")
    assert distances[False] < distances[True]


def test_budgets_cost_what_plain_rounding_does_not_pay():
    """Without a budget the outputs are nearer, and no register is proven."""
    distances = {}
    for algorithm, method in (("gptq", "baseline"), ("gpfq", "baseline"), ("axe-gptq", "projected")):
        model, reference = prepared(method=method, acc_bits=8)
        aa.reconstruct(model.eval(), reference, BATCHES, algorithm)
        distances[algorithm] = distance(model, reference)
        assert aa.certify(model).holds == (method == "projected")
    assert distances["gptq"] < 0.8 * distances["axe-gptq"]
    assert distances["gpfq"] < 0.8 * distances["axe-gptq"]


def test_means_and_variances_stay_those_of_the_float_network():
    model, reference = prepared(acc_bits=8)
    aa.reconstruct(model, reference, BATCHES)
    x = torch.cat(BATCHES)
    seen = {}
    for key, network in (("quantized", model.eval()), ("float", reference)):
        hooks = [
            getattr(network, name).register_forward_hook(lambda _, __, out, k=(key, name): seen.setdefault(k, out))
            for name in ("norm", "depthwise")
        ]
        with torch.no_grad():
            network(x)
        for hook in hooks:
            hook.remove()
    for name in ("norm", "depthwise"):
        mean, wanted = (seen[key, name].mean((0, 2, 3)) for key in ("quantized", "float"))
        torch.testing.assert_close(mean, wanted, rtol=1e-3, atol=1e-4)
    deviations = (seen[key, "norm"].std((0, 2, 3)) for key in ("quantized", "float"))
    torch.testing.assert_close(*deviations, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (QuantConv1d, (2, 4, 9), {"groups": 2, "stride": 2, "dilation": 2}),
        (QuantConv2d, (2, 4, 7, 6), {"padding": (1, 0), "groups": 4, "padding_mode": "circular"}),
        (QuantConv2d, (4, 7, 6), {"padding": "same", "dilation": 2}),
        (QuantConv3d, (1, 2, 4, 5, 4), {"padding": 1, "stride": (1, 2, 1)}),
    ],
)
def test_the_moments_are_those_of_the_layer(kind, shape, options):
    """With x the float network's own input, cross must be H w: each tap meets the weight that it is multiplied by.

    With another one, cross is G w.
    """
    torch.manual_seed(0)
    float_kind = next(k for k in kind.__mro__ if k.__module__.startswith("torch"))
    reference = float_kind(shape[-float_kind(1, 1, 1).weight.dim() + 1], 8, 3, **options)
    layer = copy.deepcopy(reference)
    layer.__class__ = kind
    assert isinstance(layer, QuantLayer)
    x = torch.randn(shape)
    with torch.no_grad():
        moments = Moments(layer, reference, mixing=True)
        moments.add(x, x, reference(x))
        moments.finish(centred=True)
        other = Moments(layer, reference, mixing=True)
        other.add(x.round(), x, reference(x))
        other.finish(centred=True)
    weight = reference.weight.double().reshape(moments.cross.shape)
    torch.testing.assert_close(moments.cross, weight @ moments.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.mixed, moments.gram)
    torch.testing.assert_close(other.cross, weight @ other.mixed.mT, rtol=1e-4, atol=1e-4)
    power = (weight * (weight @ moments.gram)).sum(-1)
    torch.testing.assert_close(moments.power, power, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_of_inputs_that_are_all_but_constant(centred):
    """Sums in float32 of their squares would know the constant alone."""
    torch.manual_seed(0)
    reference = torch.nn.Linear(6, 4)
    layer = copy.deepcopy(reference)
    layer.__class__ = QuantLinear
    x = 5 + torch.rand(6) + 2**-9 * torch.randn(3, 300, 6)
    with torch.no_grad():
        moments = Moments(layer, reference, mixing=True)
        for batch in x:
            moments.add(batch, batch + 1, reference(batch))
        moments.finish(centred)
    rows = x.flatten(0, 1).double()
    weight = reference.weight.detach().double()
    rows, others = (rows - rows.mean(0), rows - rows.mean(0)) if centred else (rows, rows + 1)
    torch.testing.assert_close(moments.gram[0], rows.T @ rows / 900, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(moments.mixed[0], rows.T @ others / 900, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(moments.cross[0], weight @ rows.T @ rows / 900, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments.x[0], x.double().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.power[0], (rows @ weight.T).square().mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(moments.y[0], weight @ moments.x[0], rtol=1e-6, atol=1e-7)


def test_sums_of_moments_are_where_the_layer_is():
    layer = nn.Linear(2, 3, device="meta")
    moments = Moments(layer, layer)
    assert all(t.is_meta for t in (moments.gram, moments.power, moments.mixed, moments.shift))


def quantized(reference, x):
    model = copy.deepcopy(reference)
    aa.prepare_(model, aa.Spec(acc_bits=12), x)
    aa.calibrate(model, [x])
    return model


class SharedNorm(nn.Module):
    """Two layers of one batch-norm, in a network that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.b(self.norm(self.a(x)))) if x.isfinite().all() else x


@pytest.mark.parametrize(
    ("reference", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(5)), (6, 5, 3)),
        (nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)), (6, 5, 3)),
        (SharedNorm(), (6, 3)),
    ],
)
def test_a_batchnorm_over_tokens_or_of_two_layers_is_left_alone(reference, shape):
    """The former has as many channels as there are tokens, which may be as many as the layer has outputs."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = quantized(reference.eval(), x)
    aa.reconstruct(model, reference, [x])
    kept, norms = model.state_dict(), {n: t for n, t in reference.state_dict().items() if "running" in n}
    assert len(norms) == 2
    assert all(torch.equal(kept[name], t) for name, t in norms.items())


def test_batchnorm_brings_means_back_where_its_variance_is_small_and_does_so_once():
    """Batch-norm adds epsilon to the variance; its running mean is never quite that of the images."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).eval()
    x = torch.randn(200, 6)
    with torch.no_grad():
        reference[0].weight *= 3e-3
        y = reference[0](x)
        reference[1].running_mean.copy_(y.mean(0) - 2 * y.std(0))
        reference[1].running_var.copy_(y.var(0))
    model = copy.deepcopy(reference)
    aa.prepare_(model, aa.Spec(weight_bits=2, act_bits=4, acc_bits=9), x)
    aa.calibrate(model, [x])
    aa.reconstruct(model, reference, [x])
    with torch.no_grad():
        got, wanted = (network.eval()(x).mean(0) for network in (model, reference))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model[1].running_var, reference[1].running_var, rtol=1e-3, atol=0)
    first = copy.deepcopy(model.state_dict())
    aa.reconstruct(model, reference, [x])
    assert all(torch.equal(t, first[name]) for name, t in model.state_dict().items())


def test_a_variance_that_is_rounding_stays():
    """Inputs between two codes become either of them."""
    torch.manual_seed(0)
    reference, x = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).eval(), torch.rand(300, 6)
    model = quantized(reference, x)
    x = 2.5 * model[0].input_quant.step(x).item() * (1 + 1e-7 * torch.randn_like(x))
    aa.reconstruct(model, reference, [x], "axe-gptq")
    assert torch.equal(model[1].running_var, reference[1].running_var)


class InPlace(nn.Module):
    """Two layers that read one tensor, a third that reads it changed, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.twice, self.inplace = nn.Linear(4, 4), False

    def forward(self, x):
        x = x + 1
        y = F.relu(self.a(x), self.inplace) + F.relu(self.b(x), self.inplace)
        x = F.relu(x, self.inplace)
        y = y + F.relu(self.c(x), self.inplace)
        y = F.relu(self.twice(y), self.inplace)
        return F.relu(self.twice(y), self.inplace)


def test_operations_in_place_change_nothing():
    torch.manual_seed(0)
    reference, x = InPlace().eval(), torch.randn(50, 6)
    model = quantized(reference, x)
    states = []
    for inplace in (False, True):
        reference.inplace, one = inplace, copy.deepcopy(model)
        one.inplace = inplace
        aa.reconstruct(one, reference, [x], "axe-gpfq")
        states.append(one.state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


class Added(nn.Module):
    """What the first layer gives is added to what it read, and both are the second one's input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + 1
        x += self.a(x)
        return self.b(x)


def test_a_tensor_that_changed_is_another():
    model = quantized(Added().eval(), torch.randn(5, 6))
    with torch.no_grad():
        _, groups = ptq._calls(model, quant_layers(model), torch.randn(5, 6))
    assert groups == [["a"], ["b"]]


def test_nothing_is_rewritten_before_it_is_refused():
    reference, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 8, 3)
    model = quantized(reference, x[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="iterates over the batches many times"):
        aa.reconstruct(model, reference, iter(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    kept = aa.prepare_(copy.deepcopy(reference), aa.Spec(), x[0], keep={"*": 8})
    for unfit in (reference, kept):
        with pytest.raises(ValueError, match=r"^reconstruct needs a prepared model with layers inside the request$"):
            aa.reconstruct(unfit, reference, x)


def test_a_weight_that_two_modules_hold_is_refused():
    reference = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    reference[2].weight = reference[0].weight
    model, data = copy.deepcopy(reference), [torch.randn(32, 6)]
    aa.prepare_(model, aa.Spec(4, 4, 10), data[0])
    aa.calibrate(model, data)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"^0: another module holds the same weight, which reconstruct writes; give"):
        aa.reconstruct(model, reference, data)
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, before)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    aa.reconstruct(model, reference, data)


def test_what_cannot_be_reconstructed_is_refused():
    model, reference = prepared()
    with pytest.raises(ValueError, match="reconstruct needs at least one batch"):
        aa.reconstruct(model, reference, [])
    with pytest.raises(ValueError, match="iterates over the batches many times"):
        aa.reconstruct(model, reference, iter(BATCHES[:1]))
    with pytest.raises(ValueError, match="a: the reference has no such float layer"):
        aa.reconstruct(model, model, BATCHES)
    with pytest.raises(ValueError, match="a: not calibrated"):
        aa.reconstruct(*prepared(calibrated=False), BATCHES)
    with pytest.raises(ValueError, match=r"a: reconstruct needs method projected or baseline .* not a2q with"):
        aa.reconstruct(*prepared(method="a2q", acc_bits=16), BATCHES)
    with pytest.raises(ValueError, match="per_channel=False"):
        aa.reconstruct(*prepared(per_channel=False), BATCHES)
    with pytest.raises(ValueError, match=r"algorithm must be one of budgeted, .*, not 'axe'"):
        aa.reconstruct(*prepared(), BATCHES, "axe")
    with pytest.raises(ValueError, match="algorithm 'budgeted' finds its scales: fixed_scale is for the others"):
        aa.reconstruct(*prepared(), BATCHES, fixed_scale=True)
    with pytest.raises(ValueError, match="a: algorithm 'gptq' knows no accumulator: it needs method 'baseline'"):
        aa.reconstruct(*prepared(), BATCHES, "gptq")
    with pytest.raises(ValueError, match="a: algorithm 'axe-gpfq' needs method projected and no free preload"):
        aa.reconstruct(*prepared(preload="free"), BATCHES, "axe-gpfq")


def test_the_command_line(ptq_options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ptq", *ptq_options, "--acc-bits", "9"]
    for algorithm in ("projection", "budgeted", "axe-gptq"):
        assert run([*words, "--algorithm", algorithm, "--out", algorithm]) == 0
        assert json.loads(Path(algorithm, "result.json").read_text())["holds"]
    assert run([*words, "--algorithm", "axe-gptq", "--init", "none", "--fixed-scale", "--out", "fixed"]) == 0
    assert "fixed_scale: true" in Path("fixed", "config.yaml").read_text()
    assert run([*words, "--out", "default"]) == 0
    models = [Path(name, "model.safetensors").read_bytes() for name in ("default", "budgeted", "projection")]
    assert models[0][-1000:] == models[1][-1000:] != models[2][-1000:]
    assert "not 'a2q'; algorithm 'projection' takes all" in fails([*words, "--method", "a2q", "--out", "no"], capsys)
    assert "algorithm 'budgeted' corrects biases itself" in fails([*words, "--bias-correct", "--out", "no"], capsys)
    assert "not algorithm 'budgeted'" in fails([*words, "--fixed-scale", "--out", "no"], capsys)
    assert "algorithm 'gpfq' knows no accumulator" in fails([*words, "--algorithm", "gpfq", "--out", "no"], capsys)
    assert not Path("no").exists()
