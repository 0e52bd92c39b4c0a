"""A2Q and A2Q+: their formulas written down again from the papers, their bounds as properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accaware.bounds import budget
from accaware.formats import IntFormat, Spec
from accaware.quantizers import A2QQuantizer, weight_quantizer

FORMATS = {"unsigned": IntFormat.unsigned(4), "signed": IntFormat.signed(4)}


def quantizer(codes, channels=3, parts=1, centred=False, acc_bits=12, weight_bits=4, per_channel=True, valid=None):
    method = "a2q+" if centred else "a2q"
    spec = Spec(weight_bits, 4, acc_bits, method, per_channel=per_channel)
    made = A2QQuantizer(spec, channels, parts, centred)
    made.bind(codes, budget(codes, spec.accumulator), valid)
    return made


def bound(codes, acc_bits, centred):
    """The right-hand sides of A2Q's equation 15 and A2Q+'s proposition 3.1."""
    n = math.log2(codes.span + 1)
    if centred:
        return (2**acc_bits - 2) / (2**n - 1)
    return (2 ** (acc_bits - 1) - 1) * 2.0 ** (codes.is_signed - n)


def slow(v, d, t, codes, acc_bits, qmax, centred):
    """One row, one weight at a time, in Python floats: q = clip(trunc(g/s v/||v||_1)), g = min(2^t, s T)."""
    v = [float(x) for x in v]
    if centred:
        mean = math.fsum(v) / len(v)
        v = [x - mean for x in v]
    norm = math.fsum(abs(x) for x in v)
    s = 2.0**d
    g = min(2.0**t, s * bound(codes, acc_bits, centred))
    return [max(-qmax, min(qmax, math.trunc(g / s * x / norm))) for x in v]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sign", FORMATS)
@pytest.mark.parametrize("acc_bits", [8, 11, 20])
def test_integers_equal_the_formula(centred, sign, acc_bits):
    torch.manual_seed(acc_bits)
    codes = FORMATS[sign]
    ours = quantizer(codes, 4, 1, centred, acc_bits)
    rows = torch.randn(4, 1, 30, dtype=torch.float64)
    with torch.no_grad():
        ours.d.copy_(-3 * torch.rand(4, 1, 1))
        ours.t.copy_(5 * torch.rand(4, 1, 1))
    q = ours.integers(rows)
    for channel in range(4):
        d, t = ours.d[channel].item(), ours.t[channel].item()
        assert q[channel, 0].tolist() == slow(rows[channel, 0], d, t, codes, acc_bits, 7, centred)
    assert int(q.abs().sum()) > 0
    deployed, scale, repaired = ours.deploy(rows)
    assert torch.equal(deployed, q.long())
    torch.testing.assert_close(scale, torch.exp2(ours.d.detach().double()), rtol=1e-6, atol=0)
    assert not bool(repaired.any())


@given(
    st.integers(0, 2**31), st.integers(1, 30), st.booleans(), st.sampled_from(list(FORMATS)), st.integers(6, 16),
    st.floats(-6, 3), st.floats(-4, 30),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_norm_stays_within_the_bound_and_the_sum_within_the_register(seed, size, centred, sign, acc_bits, d, t):
    torch.manual_seed(seed)
    codes = FORMATS[sign]
    ours = quantizer(codes, 2, 1, centred, acc_bits, weight_bits=8)
    with torch.no_grad():
        ours.d.fill_(d)
        ours.t.fill_(t)
    q, _, repaired = ours.deploy(torch.randn(2, 1, size) + torch.randn(()))
    q = q[:, 0].numpy()
    assert not bool(repaired.any())
    assert (np.abs(q).sum(1) <= bound(codes, acc_bits, centred)).all()
    highest = np.where(q > 0, q * codes.hi, q * codes.lo).sum(1)
    lowest = np.where(q > 0, q * codes.lo, q * codes.hi).sum(1)
    assert highest.max() <= 2 ** (acc_bits - 1) - 1
    assert lowest.min() >= -(2 ** (acc_bits - 1))


def reference(rows, d, t, codes, acc_bits, qmax, centred):
    """The paper's expression for autograd: equations 13 to 17, straight-through truncation, per row."""
    v = rows - rows.mean(-1, keepdim=True) if centred else rows
    s = 2.0**d
    g = 2.0 ** torch.minimum(t, d + math.log2(bound(codes, acc_bits, centred)))
    u = g / s * v / v.abs().sum(-1, keepdim=True)
    return s * (u + (u.trunc() - u).detach()).clamp(-qmax, qmax)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("t", [2.0, 30.0])
def test_value_and_gradients_equal_autograd_on_the_paper(centred, t):
    torch.manual_seed(3)
    codes, acc_bits = FORMATS["unsigned"], 11
    ours = quantizer(codes, 3, 1, centred, acc_bits)
    rows = torch.randn(3, 1, 40, requires_grad=True)
    with torch.no_grad():
        ours.d.copy_(torch.tensor([-4.0, -5.0, -1.5]).reshape(3, 1, 1))
        ours.t.fill_(t)
    inputs = (rows, ours.d, ours.t)
    out = ours(rows)
    expected = reference(rows, ours.d, ours.t, codes, acc_bits, 7, centred)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(out, ours.integers(rows) * ours.step())
    grad = torch.randn(out.shape)
    for name, a, b in zip(
        ("weight", "d", "t"),
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    # Where the bound caps the norm, t has no gradient: that is what the penalty is for.
    assert bool((torch.autograd.grad(ours(rows).sum(), ours.t)[0] == 0).all()) == (t == 30)


def test_the_penalty_is_what_exceeds_the_bound():
    codes, acc_bits = FORMATS["unsigned"], 11
    for centred in (False, True):
        ours = quantizer(codes, 3, 1, centred, acc_bits)
        limit = math.log2(bound(codes, acc_bits, centred))
        with torch.no_grad():
            ours.d.copy_(torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1))
            ours.t.copy_(torch.tensor([limit - 1, limit + 3, limit + 4]).reshape(3, 1, 1))
        assert ours.penalty().item() == pytest.approx(0 + 2 + 2, rel=1e-5)
        gradients = torch.autograd.grad(ours.penalty(), (ours.t, ours.d))
        assert [g.flatten().tolist() for g in gradients] == [[0, 1, 1], [0, -1, -1]]


@pytest.mark.parametrize("centred", [False, True])
def test_parts_and_padding_are_rows_of_their_own(centred):
    torch.manual_seed(0)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]).expand(2, 2, 6)
    rows = torch.randn(2, 2, 6) * valid
    ours = quantizer(FORMATS["unsigned"], 2, 2, centred, 9, valid=valid)
    with torch.no_grad():
        ours.d.fill_(-3.0)
        ours.t.fill_(3.0)
    q = ours.integers(rows)
    assert bool((q[~valid] == 0).all())
    alone = quantizer(FORMATS["unsigned"], 1, 1, centred, 9)
    with torch.no_grad():
        alone.d.fill_(-3.0)
        alone.t.fill_(3.0)
    for channel in range(2):
        for part, taps in ((0, 6), (1, 4)):
            expected = alone.integers(rows[channel : channel + 1, part : part + 1, :taps])
            assert torch.equal(q[channel, part, :taps], expected[0, 0])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("init", ["none", "ep", "search"])
def test_initialisation(centred, init):
    torch.manual_seed(0)
    rows = torch.randn(3, 1, 50)
    ours = quantizer(FORMATS["unsigned"], 3, 1, centred, 10)
    start = ours.initialise(rows, None, init)
    limit = bound(FORMATS["unsigned"], 10, centred)
    if init == "none":
        assert torch.equal(start, rows)
    else:  # EP-init: within the l1 ball of radius s times the bound
        assert bool((start.abs().sum(-1, keepdim=True) <= ours.step() * limit * (1 + 1e-5)).all())
    if init != "search":
        assert torch.allclose(ours.step(), rows.abs().amax(-1, keepdim=True) / 7)
    # g is the norm of the rows themselves, so that nothing but the bound and the grid changes them.
    centred_rows = start - start.mean(-1, keepdim=True) if centred else start
    assert torch.allclose(torch.exp2(ours.t), centred_rows.abs().sum(-1, keepdim=True), rtol=1e-4)
    error = lambda q: float((q.detach() - rows).square().sum())  # noqa: E731
    if init == "search":
        plain = quantizer(FORMATS["unsigned"], 3, 1, centred, 10)
        assert error(ours(start)) < error(plain(plain.initialise(rows, None, "ep")))


def test_zero_weights_are_no_trouble():
    for centred in (False, True):
        ours = quantizer(FORMATS["unsigned"], 2, 1, centred, 10)
        rows = torch.zeros(2, 1, 5)
        start = ours.initialise(rows, None, "search").requires_grad_()
        out = ours(start)
        out.sum().backward()
        assert torch.equal(out, rows)
        assert all(bool(p.grad.isfinite().all()) for p in (ours.d, ours.t, start))


def test_a2q_plus_is_centred():
    assert weight_quantizer(Spec(method="a2q+"), 4, 1).centred
    assert not weight_quantizer(Spec(method="a2q"), 4, 1).centred


def test_a_bound_below_one_names_the_layer():
    ours = A2QQuantizer(Spec(acc_bits=5, method="a2q"), 2, 1, centred=False)
    codes = FORMATS["unsigned"]
    with pytest.raises(ValueError, match=r"^stem\.conv: acc_bits=5 is too small .*A2Q budget is below 1.* at least 6"):
        ours.bind(codes, budget(codes, Spec(acc_bits=5).accumulator), None, "stem.conv")


def test_one_scale_for_the_tensor():
    ours = quantizer(FORMATS["unsigned"], 3, 1, False, 10, per_channel=False)
    assert ours.d.shape == (1, 1, 1)
    assert ours.t.shape == (3, 1, 1)
    q, scale, _ = ours.deploy(ours.initialise(torch.randn(3, 1, 9), None, "search"))
    assert scale.shape == (3, 1, 1)
    assert len(set(scale.flatten().tolist())) == 1
    assert q.abs().sum() > 0


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_are_numbers_however_far_the_parameters_went(centred):
    ours = quantizer(FORMATS["unsigned"], 2, 1, centred, 10)
    with torch.no_grad():
        ours.d.fill_(-43.6)
        ours.t.fill_(90.0)
    rows = torch.randn(2, 1, 9, requires_grad=True)
    ours(rows).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (ours.d, ours.t, rows))
