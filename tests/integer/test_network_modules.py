"""The integer network computes what the prepared model does, whatever else reads what its layers give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import accaware as aa
from accaware.integer.network import IntegerOp, integer_network


class Normalized(nn.Module):
    """Batch-norm after a convolution, and what `rest` makes of both."""

    def __init__(self, rest, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm, self.rest = nn.Conv2d(3, 4, 3), norm(4), rest

    def forward(self, x):
        return self.rest(self.conv(x), self.norm)


class WithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def written(y, norm):
    y[:, 0] = 0
    return norm(y)


def twice(layer, norm):
    return nn.Sequential(layer, norm, layer, norm), (5,)


def linear(channels):
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(channels)), (channels, 6)


IMAGE = (3, 6, 6)
NETWORKS = {
    "alone": (Normalized(lambda y, norm: norm(y)), IMAGE),
    "alone twice": twice(nn.Linear(5, 5), nn.BatchNorm1d(5)),
    "returned": (Normalized(lambda y, norm: {"norm": norm(y), "conv": [y]}), IMAGE),
    "of a list": (Normalized(lambda y, norm: torch.cat([y, norm(y)])), IMAGE),
    "into a tuple": (Normalized(lambda y, norm: y.chunk(2, 1)[0] + norm(y)[:, :2]), IMAGE),
    "written": (Normalized(written), IMAGE),
    "more than batch-norm": (Normalized(lambda y, norm: norm(y), WithReLU), IMAGE),
    "other channels": linear(5),
    "more channels": linear(7),
}


def prepared(model, shape):
    torch.manual_seed(0)
    x = torch.randn(16, *shape)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    model.train()(x)
    aa.prepare_(model, aa.Spec(acc_bits=14), sample=x[:2])
    aa.calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("name", NETWORKS)
def test_batchnorm_is_folded_where_nothing_else_reads(name) -> None:
    model, x = prepared(*NETWORKS[name])
    network = integer_network(model, x)
    with torch.no_grad():
        for ours, theirs in zip(tree_leaves(network(x)), tree_leaves(model(x)), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert any(isinstance(module, nn.Identity) for module in network.modules()) == name.startswith("alone")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two, self.three, self.four = self.one, aa.QuantIdentity(), nn.Sequential(nn.ReLU(), self.one)

    def forward(self, x):
        return self.four(self.two(self.three(self.one(x))))


def test_a_layer_of_several_names_is_an_integer_layer_under_each() -> None:
    model, x = prepared(Shared(), (6,))
    network = integer_network(model, x)
    assert network.one is network.two is network.four[1]
    assert isinstance(network.one, IntegerOp)
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-5)


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=(14, 14))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [(Upsampled(), IMAGE, "^up: .*output_padding$"), (nn.Linear(6, 2), (6,), "nn.Sequential before prepare_$")],
)
def test_what_has_no_integer_network_is_one_line(model, shape, message) -> None:
    model, x = prepared(model, shape)
    with pytest.raises(ValueError, match=message):
        integer_network(model, x)(x)
