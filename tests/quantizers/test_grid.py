"""Fake quantization: exact values through power-of-two scales, gradients against autograd on the LSQ formula."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accaware.formats import IntFormat
from accaware.quantizers.grid import fake_quantize

FORMS = [IntFormat.unsigned(1), IntFormat.unsigned(4), IntFormat.signed(4), IntFormat.narrow(3), IntFormat(-3, 9)]


def lsq(x, scale, form, codes=None):
    """The same function, written with `detach` for autograd (LSQ, Esser et al. 2020)."""
    u = x / scale
    q = u.round().clamp(form.lo, form.hi) if codes is None else codes(u.detach())
    inside = (u >= form.lo) & (u <= form.hi)
    return torch.where(inside, u + (q - u).detach(), q.detach()) * scale


@given(
    st.integers(-3000, 3000),
    st.integers(-4, 4),
    st.sampled_from(FORMS),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_values_are_exact(numerator, exponent, form, dtype):
    scale = Fraction(2) ** exponent
    value = Fraction(numerator, 128)
    code = min(max(round(value / scale), form.lo), form.hi)  # Python rounds halves to even, as torch does
    out = fake_quantize(torch.tensor(float(value), dtype=dtype), torch.tensor(float(scale), dtype=dtype), form)
    assert out.dtype == dtype
    assert Fraction(float(out)) == code * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1)])
@pytest.mark.parametrize("grad_scale", [1.0, 0.125])
def test_gradients_equal_the_lsq_formula(form, shape, grad_scale):
    torch.manual_seed(0)
    # Multiples of 1/64 and powers of two: every sum is exact, so the gradients are equal to the last bit.
    x = (torch.randint(-1000, 1000, (4, 200)).double() / 64).requires_grad_()
    x.data[:, :3] = torch.tensor([form.lo, form.hi, 0.5]) / 2  # the ends of the range are inside
    scale = torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True)
    grad = torch.randint(-50, 50, x.shape).double() / 16
    ours = torch.autograd.grad(fake_quantize(x, scale, form, grad_scale), (x, scale), grad)
    theirs = torch.autograd.grad(lsq(x, scale, form), (x, scale), grad)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].shape == scale.shape
    assert torch.equal(ours[1], theirs[1] * grad_scale)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_one_scale_is_the_same_in_every_layout(layout):
    torch.manual_seed(0)
    x = (torch.randint(-1000, 1000, (2, 3, 4, 5)).double() / 64).to(memory_format=layout).requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    grad = torch.randint(-50, 50, x.shape).double() / 16  # never channels_last, and once of one element in memory
    for g in (grad, grad[:1, :1, :1, :1].expand_as(x)):
        ours = torch.autograd.grad(fake_quantize(x, scale, IntFormat.unsigned(4)), (x, scale), g)
        theirs = torch.autograd.grad(lsq(x, scale, IntFormat.unsigned(4)), (x, scale), g)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_training_keeps_no_tensor_but_the_input_and_the_output():
    """The layers before and after keep both anyway, so fake quantization costs their memory and no more."""
    x, scale = torch.randn(1000).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = fake_quantize(x, scale, IntFormat.unsigned(4))
    assert set(kept) == {x.data_ptr(), out.data_ptr(), scale.data_ptr()}


def test_where_a_budget_holds_the_integers_the_scale_sees_them_fixed():
    form = IntFormat.narrow(4)
    x = (torch.arange(-40, 41).double() / 8).reshape(3, 27).requires_grad_()
    x.data[2] = x.data[2].clamp(max=0.4)  # a row that the budget below leaves alone
    x.data[2, 0] = 9.0
    scale = torch.full((3, 1), 0.25, dtype=torch.float64, requires_grad=True)

    def codes(u):
        bounded = u.trunc().clamp(-2, 2)
        bounded[2] = u[2].round().clamp(form.lo, form.hi)
        return bounded

    out = fake_quantize(x, scale, form, codes=codes)
    q = codes(x.detach() / scale.detach())
    assert torch.equal(out, q * scale)
    grad = (torch.arange(81).double() - 40).reshape(3, 27)
    ours = torch.autograd.grad(out, (x, scale), grad)
    theirs = torch.autograd.grad(lsq(x, scale, form), (x, scale), grad)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1][:2], (grad * q).sum(-1, keepdim=True)[:2])
    assert torch.equal(ours[1][2], theirs[1][2])
    assert not torch.equal(ours[1], theirs[1])


@given(st.floats(1e-3, 1e3), st.sampled_from(FORMS), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_quantizing_twice_changes_neither_value_nor_gradient(scale, form, seed):
    torch.manual_seed(seed)
    x = (6 * torch.randn(64)).requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    once = fake_quantize(x * scale, s, form)
    twice = fake_quantize(once, s, form)
    assert torch.equal(once, twice)
    grad = torch.randn(64)
    (x_once, s_once), (x_twice, s_twice) = (
        torch.autograd.grad(y, (x, s), grad, retain_graph=True) for y in (once, twice)
    )
    assert torch.equal(x_once, x_twice)
    torch.testing.assert_close(s_once, s_twice, rtol=1e-4, atol=1e-3 * (1 + abs(form.lo) + form.hi))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(1000).to(dtype).requires_grad_()
    scale = torch.tensor(0.0371)
    out = fake_quantize(x, scale, IntFormat.signed(8))
    assert out.dtype == torch.float32
    assert torch.equal(out, fake_quantize(x.detach().float(), scale, IntFormat.signed(8)))
    out.sum().backward()
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x.detach(), scale, IntFormat.signed(8)), out)


def test_no_gradient_beyond_the_range():
    x = torch.tensor([-3.0, -0.1, 0.0, 1.9, 3.0, 3.1], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), IntFormat.unsigned(2)).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0]


def test_the_input_is_left_alone():
    x = torch.randn(10)
    before = x.clone()
    fake_quantize(x, torch.tensor(0.5), IntFormat.signed(3))
    assert torch.equal(x, before)
