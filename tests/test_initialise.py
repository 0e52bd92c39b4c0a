"""Cross-layer equalization and bias correction."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accaware as aa
from accaware.formats import Spec


class Chain(nn.Module):
    """Convolutions with batch-norm, depthwise, grouped, transposed and plain ones, then linear layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.bn_a = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.b = nn.Conv2d(6, 5, 1)
        self.p, self.q = nn.Linear(5, 7), nn.Linear(7, 2)
        self.drop, self.stream = nn.Dropout(0.5), aa.QuantIdentity()

    def forward(self, x):
        x = self.stream(F.relu(self.bn_a(self.a(x))))
        x = F.max_pool2d(F.relu(self.depthwise(x)), 2)
        x = F.interpolate(self.grouped(x).relu(), scale_factor=2, mode="nearest")
        x = self.drop(F.relu(self.up(x), inplace=True))
        x = F.adaptive_avg_pool2d(torch.sigmoid(self.b(x)), 1).flatten(1)
        return self.q(F.leaky_relu(self.p(x)))


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def chain():
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.uniform_(-2, 2)
            norm.running_var.uniform_(0.1, 3)
        for p in model.parameters():
            if p.dim() > 1:
                p *= torch.exp(2 * torch.randn(p.shape[0], *(1,) * (p.dim() - 1)))
    return model


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equalizing_keeps_the_function_and_balances_the_ranges(memory_format):
    model = chain().to(memory_format=memory_format)
    wanted = model(X)
    before = copy.deepcopy(model.state_dict())
    assert aa.equalize(model) == 5  # a-depthwise, depthwise-grouped, grouped-up, up-b, p-q
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    gain = model.bn_a.weight / (model.bn_a.running_var + model.bn_a.eps).sqrt()
    r1 = model.a.weight.abs().amax((1, 2, 3)) * gain.abs()
    torch.testing.assert_close(r1, model.depthwise.weight.abs().amax((1, 2, 3)), rtol=5e-3, atol=0)
    of_inputs = model.grouped.weight.view(2, 2, 4).abs().amax(1).flatten()
    torch.testing.assert_close(model.depthwise.weight.abs().amax((1, 2, 3)), of_inputs, rtol=5e-3, atol=0)
    of_outputs = model.up.weight.view(2, 2, 3, 4).abs().amax((1, 3)).flatten()
    torch.testing.assert_close(of_outputs, model.b.weight.abs().amax((0, 2, 3)), rtol=5e-3, atol=0)
    torch.testing.assert_close(model.p.weight.abs().amax(1), model.q.weight.abs().amax(0), rtol=5e-3, atol=0)
    assert torch.equal(model.a.weight, before["a.weight"])
    assert not torch.equal(model.bn_a.bias, before["bn_a.bias"])


def test_in_training_mode_the_function_stays_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    wanted = model(X)
    aa.equalize(model)
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


def test_a_channel_of_zeros_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    wanted = model(X)
    aa.equalize(model)
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


class Branch(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if self.kind == "fan-out":
            y = F.relu(self.a(x))
            return self.b(y) + self.c(y)
        if self.kind == "residual":
            y = F.relu(self.a(x))
            return self.b(y) + y
        if self.kind == "sigmoid":
            return self.b(torch.sigmoid(self.a(x)))
        if self.kind == "relu6":
            return self.b(F.relu6(self.a(x)))
        if self.kind == "twice":
            return self.b(F.relu(self.a(F.relu(self.a(x)))))
        assert self.kind == "output"
        return self.a(x)


@pytest.mark.parametrize("kind", ["fan-out", "residual", "sigmoid", "relu6", "twice", "output"])
def test_what_would_change_the_function_is_no_pair(kind):
    torch.manual_seed(0)
    model = Branch(kind)
    wanted = model(X)
    assert aa.equalize(model) == 0
    assert torch.equal(model(X), wanted)


def hidden(*between, first=None):
    """Linear layers whose middle one has much larger weights, so that equalizing would change all."""
    torch.manual_seed(0)
    model = nn.Sequential(first or nn.Linear(8, 8), *between, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[-3].weight.data *= 10
    return model


def tied():
    model = hidden(nn.ReLU())
    model[4].weight = model[0].weight
    return model


def tied_norm():
    model = hidden(nn.BatchNorm1d(8), nn.ReLU())
    model.append(nn.BatchNorm1d(8))
    model[-1].weight = model[1].weight
    return model


def hooked(index):
    model = hidden(nn.ReLU())
    model[index].register_forward_hook(lambda module, args, out: out + 1)
    return model


def hooked_before():
    model = hidden(nn.ReLU())
    model[2].register_forward_pre_hook(lambda module, args: args[0] + 1)
    return model


class Again(nn.Sequential):
    def forward(self, x):
        return F.linear(super().forward(x), self[0].weight)


@pytest.mark.parametrize(
    ("make", "pairs"),
    [
        (lambda: hidden(nn.ReLU(), first=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), 1),
        (lambda: hidden(nn.ReLU(), first=nn.utils.weight_norm(nn.Linear(8, 8))), 1),
        (tied, 0),
        (tied_norm, 1),
        (lambda: Again(*hidden(nn.ReLU())), 1),
        (lambda: hooked(0), 1),
        (lambda: hooked(1), 1),
        (hooked_before, 0),
    ],
    ids=["parametrized", "computed by a hook", "tied", "tied norm", "read again", "hook", "hook of ReLU", "pre-hook"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_is_read_or_computed_elsewhere_is_left_alone(make, pairs):
    """Of its two pairs, those that would change the function."""
    model, x = make().eval(), torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    wanted = model(x)
    assert aa.equalize(model) == pairs
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pool", "pairs"), [(nn.AvgPool2d(2), 1), (nn.AvgPool3d(2), 0), (nn.AdaptiveAvgPool3d(4), 0)])
def test_pools_over_channels_make_no_pair(pool, pairs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Conv2d(8 if pairs else 4, 2, 1))
    model[0].weight.data *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    wanted = model(X)
    assert aa.equalize(model) == pairs
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


def test_a_residual_network_keeps_its_function():
    from accaware.experiments.models import build

    torch.manual_seed(0)
    model = build("resnet20", 10).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    assert aa.equalize(model) == 9  # within each block
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


TOKENS = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(4)).abs()


def scattered(*layers):
    """Layers in evaluation mode whose rows and statistics differ widely."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm1d):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.uniform_(0.1, 3)
            elif isinstance(layer, nn.Linear):
                layer.weight *= torch.exp(2 * torch.randn(layer.out_features, 1))
    return model


@pytest.mark.parametrize("outputs", [5, 8])
def test_linear_layers_of_tokens_are_balanced_feature_by_feature(outputs):
    """With as many features as tokens no mistake would show itself by a shape."""
    model = scattered(nn.Linear(3, outputs), nn.ReLU(), nn.Linear(outputs, 2))
    wanted = model(TOKENS)
    assert aa.equalize(model) == 1
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].weight.abs().amax(1), model[2].weight.abs().amax(0), rtol=5e-3, atol=0)


def test_a_batchnorm_after_a_linear_layer_is_balanced():
    model = scattered(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = TOKENS[:, 0]
    wanted = model(x)
    assert aa.equalize(model) == 1
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    r1 = model[0].weight.abs().amax(1) * model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    torch.testing.assert_close(r1, model[3].weight.abs().amax(0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_batchnorm_over_tokens_makes_no_pair(tokens):
    model = scattered(nn.Linear(3, 8), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Linear(8, 2))
    x = TOKENS[:, :tokens]
    wanted = model(x)
    assert aa.equalize(model) == 0
    assert torch.equal(model(x), wanted)


def test_equalizing_comes_first():
    model = chain()
    aa.prepare_(model, Spec(acc_bits=16), sample=X)
    assert aa.equalize(model) == 5
    aa.calibrate(model, [X])
    with pytest.raises(ValueError, match="calibrated already; equalize comes first"):
        aa.equalize(model)


class Curious(nn.Sequential):
    def forward(self, x):
        return self[0](x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_named():
    with pytest.raises(ValueError, match=r"Curious cannot be traced by torch\.fx"):
        aa.equalize(Curious(nn.Linear(2, 2)))


# Bias correction -------------------------------------------------------------------------------------------------


def corrected(reference, spec=None, x=X, **options):
    model = copy.deepcopy(reference)
    aa.prepare_(model, spec or Spec(3, 3, 16), sample=x)
    aa.calibrate(model, [x], **options)
    aa.bias_correct(model, reference, x.split(2))
    return model


def test_the_mean_output_is_that_of_the_float_layer():
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5))
    model = corrected(float_model)
    with torch.no_grad():
        wanted = float_model[0](X)
        torch.testing.assert_close(model[0](X).mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-5)
        got = model[2](wanted.flatten(1)).mean(0)
        torch.testing.assert_close(got, float_model[2](wanted.flatten(1)).mean(0), rtol=0, atol=1e-5)
        assert not torch.equal(model[0].bias, float_model[0].bias)


def test_the_error_goes_into_the_batchnorm_that_follows():
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        float_model[1].running_mean.uniform_(-1, 1)
        float_model[1].weight.uniform_(-1, 1)
    model = corrected(float_model, Spec(2, 2, 10, method="a2q"), init="ep")
    assert model[0].bias is None
    float_model.eval(), model.eval()
    with torch.no_grad():
        wanted, got = float_model[1](float_model[0](X)), model[1](model[0](X))
    torch.testing.assert_close(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-5)


def test_a_layer_with_nowhere_to_put_it_is_named():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="^0 has neither a bias nor a batch-norm"):
        corrected(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_linear_layers_of_tokens_are_corrected_feature_by_feature():
    float_model = scattered(nn.Linear(3, 5))
    model = corrected(float_model, x=TOKENS).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).mean((0, 1)), float_model(TOKENS).mean((0, 1)), rtol=1e-5, atol=1e-5)


def test_a_batchnorm_after_a_linear_layer_takes_its_error():
    float_model = scattered(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5))
    x = TOKENS[:, 0]
    model = corrected(float_model, x=x).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).mean(0), float_model(x).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [5, 8])
def test_a_batchnorm_over_tokens_takes_none(features):
    float_model = scattered(nn.Linear(3, features, bias=False), nn.BatchNorm1d(5))
    with pytest.warns(UserWarning, match="^0 has neither a bias nor a batch-norm"):
        model = corrected(float_model, x=TOKENS)
    assert torch.equal(model[1].running_mean, float_model[1].running_mean)


class Calls(nn.Module):
    """What torch.fx cannot trace: `steps` are run in order."""

    def __init__(self, steps, **modules):
        super().__init__()
        self.steps, self.parts = steps, nn.ModuleDict(modules)

    def forward(self, x):
        for step in self.steps if x.isfinite().all() else ():
            x = self.parts[step](x)
        return x


def test_a_batchnorm_that_always_follows_one_layer_takes_its_error():
    """However often both run."""
    torch.manual_seed(0)
    parts = {"p": nn.Linear(3, 3, bias=False), "q": nn.Linear(3, 3, bias=False), "norm": nn.BatchNorm1d(3)}
    float_model, x = Calls(("p", "norm", "p", "norm"), p=parts["p"], norm=parts["norm"]).eval(), TOKENS[:, 0]
    model = corrected(float_model, x=x).eval()
    with torch.no_grad():
        x = torch.cat([x, float_model.parts["norm"](float_model.parts["p"](x))])
        got, wanted = (m.parts["norm"](m.parts["p"](x)).mean(0) for m in (model, float_model))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.parts["norm"].running_mean, float_model.parts["norm"].running_mean)
    float_model = Calls(("p", "norm", "q", "norm"), **parts).eval()
    with pytest.warns(UserWarning, match="has neither a bias nor a batch-norm"):
        model = corrected(float_model, x=TOKENS[:, 0])
    assert torch.equal(model.parts["norm"].running_mean, float_model.parts["norm"].running_mean)


def test_bias_correction_says_what_it_needs():
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = aa.prepare_(copy.deepcopy(float_model), Spec())
    with pytest.raises(ValueError, match="needs a prepared and calibrated model"):
        aa.bias_correct(model, float_model, [X])
    aa.calibrate(model, [X])
    with pytest.raises(ValueError, match="needs at least one batch"):
        aa.bias_correct(model, float_model, [])
    with pytest.raises(ValueError, match=r"^0: the reference has no such float layer"):
        aa.bias_correct(model, copy.deepcopy(model), [X])
    assert not float_model[0]._forward_hooks


def test_the_papers_order_on_one_model():
    """Equalize, EP-init, bias correction: the certificate holds, and the float function is what it was."""
    float_model = chain()
    wanted = float_model(X)
    aa.equalize(float_model)
    torch.testing.assert_close(float_model(X), wanted, rtol=1e-4, atol=1e-5)
    model = corrected(float_model, Spec(4, 4, 12, method="a2q+"), init="ep")
    assert aa.certify(model).holds
