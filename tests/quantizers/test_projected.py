"""The projected quantizer and its unbounded case, the baseline."""

from __future__ import annotations

import pytest
import torch

from accaware.bounds import budget
from accaware.formats import IntFormat, Spec
from accaware.projections import holds, project_integers
from accaware.quantizers import weight_quantizer

U4, S4 = IntFormat.unsigned(4), IntFormat.signed(4)
CASES = [("baseline", U4, "none"), ("projected", U4, "none"), ("projected", S4, "none"), ("projected", U4, "free")]


def quantizer(method, codes=U4, preload="none", channels=3, parts=1, acc_bits=8, per_channel=True):
    spec = Spec(4, 4, acc_bits, method, preload, per_channel=per_channel)
    made = weight_quantizer(spec, channels, parts)
    made.bind(codes, budget(codes, spec.accumulator), None)
    return made


@pytest.mark.parametrize(("method", "codes", "preload"), CASES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_value_and_gradients(method, codes, preload, per_channel, parts):
    """Exact, with power-of-two s: w_q = s q, straight-through where |w/s| <= qmax; to s: LSQ or fixed integers."""
    torch.manual_seed(0)
    ours = quantizer(method, codes, preload, 3, parts, per_channel=per_channel).double()
    with torch.no_grad():
        ours.scale.copy_(torch.tensor([0.5, 0.25, 1.0]).reshape(3, 1, 1) if per_channel else torch.tensor(0.5))
    rows = (torch.randint(-400, 400, (3, parts, 16)).double() / 64).requires_grad_()
    u = (rows / ours.scale).detach()
    q = u.round().clamp(-7, 7) if method == "baseline" else project_integers(u, ours.budget, 7)
    out = ours(rows)
    assert torch.equal(out, q * ours.scale)
    assert torch.equal(ours.integers(rows.detach()), q)
    grad = torch.randint(-9, 9, rows.shape).double()
    to_rows, to_scale = torch.autograd.grad(out, (rows, ours.scale), grad)
    inside = u.abs() <= 7
    assert torch.equal(to_rows, grad * inside)
    free = (q == u.round().clamp(-7, 7)).all(-1, keepdim=True)  # rows that the budget leaves as they are
    slope = (grad * (q - torch.where(inside & free, u, 0))).sum_to_size(ours.scale.shape)
    count = 16 * parts  # weights of one channel
    torch.testing.assert_close(to_scale, slope / (count * 7) ** 0.5, rtol=1e-12, atol=0)
    if method == "projected":
        assert bool((to_rows[(q == 0) & inside & (grad != 0)] != 0).all()), "weights set to 0 can return"
        assert not bool(holds(u.round().clamp(-7, 7), ours.budget).all()), "the budget should bind in this test"
        assert bool(holds(q, ours.budget).all())


@pytest.mark.parametrize("codes", [U4, S4])
def test_without_a_budget_that_binds_it_is_the_baseline(codes):
    rows = torch.randn(3, 1, 16)
    results = []
    for method in ("baseline", "projected"):
        ours = quantizer(method, codes, acc_bits=32)
        weight = rows.clone().requires_grad_()
        ours.initialise(rows, None, "search")
        ours(weight).square().sum().backward()
        results.append((ours(weight).detach(), ours.scale.detach(), weight.grad, ours.scale.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["baseline", "projected"])
def test_quantizing_twice_changes_nothing(method):
    ours = quantizer(method)
    rows = torch.randn(3, 1, 16)
    ours.initialise(rows, None, "search")
    once = ours(rows).detach()
    assert torch.equal(ours(once), once)


def test_scales_of_signed_inputs_are_searched_within_the_budget():
    ours = quantizer("projected", S4, acc_bits=9)
    rows = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0)) * 4
    start, q = ours.start(rows), ours.integers(rows)
    assert bool(holds(start, ours.budget).all())
    assert 0 < (start - q).abs().sum((1, 2)).max() <= 8  # of 31 units and more


def test_long_rows_keep_their_dtype():
    ours = weight_quantizer(Spec(8, 8, 24), 1, 1)
    ours.bind(U4, budget(U4, Spec(acc_bits=24).accumulator), None)
    rows = torch.randn(1, 1, 2**24 // 127 + 1)
    assert ours(rows).dtype == torch.float32
    assert ours.integers(rows).dtype == torch.float32


def test_the_scale_never_becomes_zero_or_negative():
    ours = quantizer("projected")
    with torch.no_grad():
        ours.scale.fill_(-1.0)
    assert bool((ours.step() > 0).all())
    assert bool(ours(torch.randn(3, 1, 4)).isfinite().all())
