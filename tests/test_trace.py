"""One run over a sample: which functions of torch accumulate, and how many values each adds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accaware as aa
from accaware.trace import trace

X = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
IMAGE = X[None, None]
ROWS = torch.arange(4)


class Runs(nn.Module):
    """Whatever `function` does."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.clone())


def kinds(function, x=X):
    return [(op.kind, op.terms) for op in trace(Runs(function), {}, x).others]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.__rmatmul__(x),
        lambda x: x.addmm_(x, x),
        lambda x: torch.linalg.multi_dot([x, x, x]),
        lambda x: torch.linalg.vecdot(x, x),
        lambda x: torch.chain_matmul(x, x),
        lambda x: torch.matrix_power(x, 2),
        lambda x: torch.convolution(x[None], torch.ones(1, 4, 3), None, [1], [0], [1], False, [0], 1),
        lambda x: torch.cdist(x, x),
        lambda x: F.cosine_similarity(x, x),
        lambda x: F.embedding_bag(ROWS[None], x),
        lambda x: torch.zeros(4, 4).index_add(0, ROWS, x),
        lambda x: torch.zeros(4, 4).scatter_add_(0, ROWS.expand(4, 4), x),
        lambda x: F.fold(x.reshape(1, 4, 4), (3, 3), (2, 2)),
        lambda x: F.lp_pool1d(x, 2, 2),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x[None, None], None, 2, "bicubic"),
        lambda x: F.grid_sample(x[None, None], torch.zeros(1, 2, 2, 2), align_corners=False),
        lambda x: torch.logsumexp(x, 1),
        lambda x: torch.var_mean(x),
        lambda x: x.var(1),
        lambda x: torch.linalg.vector_norm(x),
        lambda x: torch.norm(x),
        lambda x: x.trace(),
        lambda x: torch.fft.rfft2(x),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_functions_that_accumulate_are_seen(function):
    assert [terms for _, terms in kinds(function)] == [None]


def test_additions_are_seen_in_every_form():
    def additions(x):
        x += x
        x -= x
        x = x.sub_(x) + (x - x)
        x = torch.rsub(x, other=x)
        return torch.add(other=x, input=x)

    assert kinds(additions) == [(kind, 2) for kind in ("add", "sub", "sub", "sub", "add", "rsub", "add")]


def test_arguments_may_have_names():
    assert kinds(lambda x: torch.sum(input=x)) == [("sum", 16)]
    assert kinds(lambda x: torch.nansum(x, dim=1)) == [("nansum", 4)]
    assert kinds(lambda x: torch.cumsum(dim=0, input=x)) == [("cumsum", 4)]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 1 - x,
        lambda x: torch.add(x, 1, out=torch.empty(4, 4)),
        lambda x: F.interpolate(x[None, None], scale_factor=2),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="nearest-exact"),
        lambda x: torch.cat([x, x]).relu().amax(1),
    ],
)
def test_what_adds_nothing_is_not_listed(function):
    assert kinds(function) == []


@pytest.mark.parametrize(("size", "bins"), [(7, 3), (7, 10), (8, 4), (5, 1), (1, 4), (9, 4), (11, 8)])
def test_windows_of_adaptive_pooling(size, bins):
    """A pool of ones that a derivative counts."""
    x = torch.zeros(1, 1, size, 6, requires_grad=True)
    rows = F.adaptive_avg_pool2d(x, (bins, 4))[0, 0]
    counts = [int((torch.autograd.grad(y, x, retain_graph=True)[0] != 0).sum()) for y in rows.flatten()]
    (found,) = kinds(lambda x: F.adaptive_avg_pool2d(x, (bins, 4)), x.detach())
    assert found == ("adaptive_avg_pool2d", max(counts))


def test_a_running_sum_has_as_many_terms_as_its_dimension():
    assert kinds(lambda x: x.cumsum(-1), torch.rand(2, 3, 7)) == [("cumsum", 7)]
    assert kinds(lambda x: x.cumsum(0), torch.tensor(1.0)) == [("cumsum", 1)]


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(input=x)


def test_a_layer_called_by_keyword_is_named():
    message = r"^fc: called with its input by keyword; a layer takes it by position, as in fc\(x\)$"
    with pytest.raises(ValueError, match=message):
        aa.prepare_(ByKeyword(), aa.Spec(), sample=X)
    model = aa.prepare_(ByKeyword(), aa.Spec())
    with pytest.raises(ValueError, match=message):
        aa.calibrate(model, [X])
