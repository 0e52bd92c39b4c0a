"""What all weight quantizers share: the first scale, half precision, and the repair of what is deployed."""

from __future__ import annotations

import pytest
import torch

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat, Spec
from accaware.projections import holds, project_integers
from accaware.quantizers import weight_quantizer

METHODS = ["baseline", "projected", "a2q", "a2q+"]
U4 = IntFormat.unsigned(4)


def quantizer(method, channels=4, parts=1, acc_bits=9, per_channel=True):
    spec = Spec(4, 4, acc_bits, method, per_channel=per_channel)
    made = weight_quantizer(spec, channels, parts)
    register = Accumulator(64) if method == "baseline" else spec.accumulator
    made.bind(U4, budget(U4, register), None)
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_finds_the_scale_of_smallest_error(method, per_channel, weighted):
    torch.manual_seed(0)
    rows = torch.randn(4, 1, 144) * torch.tensor([0.1, 1.0, 3.0, 0.5]).reshape(4, 1, 1)
    importance = 3 ** torch.randn(4, 1, 144) if weighted else torch.ones_like(rows)
    ours = quantizer(method, per_channel=per_channel)
    ours.initialise(rows, importance if weighted else None, "search")
    chosen = ours.step().detach().clone()
    axes = (1, 2) if per_channel else (0, 1, 2)
    base = rows.abs().amax(axes, keepdim=True) / 7

    def error(scale):
        ours.set_step(scale)
        return (importance * (ours.start(rows) - rows).square()).sum(axes, keepdim=True)

    best = error(chosen)
    # Among the scales from a third of max|w|/qmax to 2.8 times it.
    for ratio in torch.logspace(-1.6, 1.5, 200, base=2.0).tolist():
        assert bool((best <= 1.05 * error(base * ratio)).all()), ratio


@pytest.mark.parametrize("method", ["projected", "a2q", "a2q+"])
def test_finer_codes_lose_nothing_where_the_budget_is_narrow(method):
    """Integers of 8 bits hold those of 4, at the scale that these choose."""
    rows = torch.randn(4, 1, 144)
    errors = []
    for bits in (4, 8):
        ours = weight_quantizer(Spec(bits, 4, 9, method), 4, 1)
        ours.bind(U4, budget(U4, Accumulator(9)), None)
        ours.initialise(rows, None, "search")
        errors.append((ours.start(rows) - rows).square().sum())
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["none", "ep"])
def test_without_a_search_the_largest_weight_is_the_last_code(method, init):
    rows = torch.randn(4, 1, 36)
    ours = quantizer(method)
    ours.initialise(rows, None, init)
    torch.testing.assert_close(ours.step().detach(), rows.abs().amax((1, 2), keepdim=True) / 7)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_leaves_the_codes_unchanged(method):
    rows = torch.randn(4, 1, 36)
    ours = quantizer(method)
    rows = ours.initialise(rows, None, "search")
    plain = ours(rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(rows)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)
    with torch.no_grad():
        assert torch.equal(plain, ours.integers(rows) * ours.step())


@pytest.mark.parametrize("method", METHODS)
def test_float64_rows_stay_float64(method):
    ours = quantizer(method).double()
    rows = torch.randn(4, 1, 36, dtype=torch.float64)
    rows = ours.initialise(rows, None, "search").requires_grad_()
    out = ours(rows)
    assert out.dtype == torch.float64
    out.square().sum().backward()
    assert rows.grad.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_what_is_deployed_is_what_the_forward_computes(method):
    torch.manual_seed(1)
    ours = quantizer(method)
    rows = ours.initialise(torch.randn(4, 1, 36), None, "search")
    q, scale, repaired = ours.deploy(rows)
    assert (q.dtype, scale.dtype, repaired.dtype) == (torch.int64, torch.float64, torch.bool)
    assert (scale.shape, repaired.shape) == ((4, 1, 1), (4, 1))
    assert not bool(repaired.any())
    torch.testing.assert_close((q * scale).float(), ours(rows).detach(), rtol=1e-6, atol=0)
    assert bool(holds(q, ours.budget).all())


@pytest.mark.parametrize("method", ["projected", "a2q", "a2q+"])
def test_a_row_that_broke_its_budget_is_repaired_and_reported(method, monkeypatch):
    ours = quantizer(method)
    broken = torch.zeros(4, 1, 36, dtype=torch.float64)
    broken[2, 0] = 7.0
    broken[2, 0, :10] = -6.0
    broken[3, 0, 0] = 7.0  # within the budget: must stay as it is
    monkeypatch.setattr(ours, "integers", lambda rows: broken.clone())
    q, _, repaired = ours.deploy(torch.randn(4, 1, 36))
    assert repaired.tolist() == [[False], [False], [True], [False]]
    assert bool(holds(q, ours.budget).all())
    assert torch.equal(q[[0, 1, 3]], broken[[0, 1, 3]].long())
    assert torch.equal(q[2], project_integers(broken[2], ours.budget, 7).long())
    assert int(q[2].abs().sum()) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_scales_that_are_not_finite_have_no_integers(method, value):
    ours = quantizer(method)
    rows = ours.initialise(torch.randn(4, 1, 36), None, "search")
    ours.where = "block.a"
    ours.deploy(rows)
    with pytest.raises(ValueError, match=r"^block\.a: its weights and their scales must be finite"):
        ours.deploy(rows.index_fill(2, torch.tensor(7), value))
    ours.set_step(ours.step().detach() * value)
    with pytest.raises(ValueError, match="must be finite"):
        ours.deploy(rows)


@pytest.mark.parametrize("method", METHODS)
def test_which_entries_are_taps_moves_with_the_quantizer(method):
    ours = quantizer(method)
    ours.bind(U4, ours.budget, torch.ones(4, 1, 36, dtype=torch.bool))
    assert ours.to("meta").valid.device.type == "meta"
    assert "valid" not in ours.state_dict()


def test_unknown_methods_do_not_exist():
    with pytest.raises(ValueError, match="method must be one of projected, a2q\\+, a2q, baseline, not 'a2q2'"):
        Spec(method="a2q2")
