"""Projections: against slow float64 references, batch semantics, dtypes, edge cases. Optimality is in properties/."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accaware import projections
from accaware.bounds import Budget, budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import holds, project_integers, project_l1, project_l1_zero_centred

U4, S4 = IntFormat.unsigned(4), IntFormat.signed(4)
ONE_SIDED = budget(U4, Accumulator(8, preload="free"))  # l1
TWO_SIDED = budget(U4, Accumulator(8))  # p and n have caps of their own
COUPLED = budget(S4, Accumulator(8))
BUDGETS = {"l1": ONE_SIDED, "two-sided": TWO_SIDED, "coupled": COUPLED}


def bisect(function, low, high):
    """The zero of a decreasing function, to twenty digits of the interval."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def slow_l1(v, radius):
    """Soft thresholding by the theta that meets the radius."""
    v = np.asarray(v, np.float64)
    shrink = lambda theta: np.maximum(np.abs(v) - theta, 0)  # noqa: E731
    if np.abs(v).sum() <= radius:
        return v
    return np.sign(v) * shrink(bisect(lambda theta: shrink(theta).sum() - radius, 0.0, np.abs(v).max()))


def slow_zero_centred(v, radius):
    """Soft thresholding around a mean: for every theta the mean that makes the sum 0, then theta for the radius."""
    v = np.asarray(v, np.float64)
    ends = (v.min() - 1, v.max() + 1)
    shrink = lambda u, theta: np.sign(u) * np.maximum(np.abs(u) - theta, 0)  # noqa: E731

    def point(theta):
        return shrink(v - bisect(lambda mean: shrink(v - mean, theta).sum(), *ends), theta)

    if np.abs(v - v.mean()).sum() <= radius:
        return v - v.mean()
    return point(bisect(lambda theta: np.abs(point(theta)).sum() - radius, 0.0, np.ptp(v)))


@pytest.mark.parametrize("fan_in", [1, 2, 3, 17])
@pytest.mark.parametrize("radius", [0.01, 0.7, 3.0, 1000.0])
def test_l1_projections_equal_the_slow_references(fan_in, radius):
    torch.manual_seed(fan_in)
    v = torch.randn(3, fan_in, dtype=torch.float64)
    for fast, slow in ((project_l1, slow_l1), (project_l1_zero_centred, slow_zero_centred)):
        expected = np.stack([slow(row, radius) for row in v.numpy()])
        torch.testing.assert_close(fast(v, radius), torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_l1_projections_of_rows_with_radii_of_their_own():
    v = torch.randn(3, 2, 5, dtype=torch.float64)
    radius = torch.rand(3, 2, 1, dtype=torch.float64) + 0.1
    for project in (project_l1, project_l1_zero_centred):
        batched = project(v, radius)
        alone = [[project(v[i, j], float(radius[i, j])) for j in range(2)] for i in range(3)]
        assert torch.equal(batched, torch.stack([torch.stack(row) for row in alone]))


@pytest.mark.parametrize("project", [project_l1, project_l1_zero_centred])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_projections_keep_the_dtype_the_input_and_the_points_of_the_set(project, dtype):
    v = torch.tensor([[0.25, -0.5, 0.25], [3.0, -1.0, -2.0]], dtype=dtype)
    before = v.clone()
    x = project(v, 4.0)
    assert x.dtype == dtype
    assert torch.equal(v, before)
    assert torch.equal(x[0], v[0])
    assert float(x[1].abs().sum()) == pytest.approx(4.0)


def test_zero_centred_projection_sums_to_zero():
    x = project_l1_zero_centred(torch.randn(50, 9, dtype=torch.float64) + 2, 1.5)
    assert float(x.sum(-1).abs().max()) < 1e-12
    assert float(x.abs().sum(-1).max()) < 1.5 + 1e-12


@pytest.mark.parametrize("project", [project_l1, project_l1_zero_centred])
@pytest.mark.parametrize("radius", [0.0, -1.0, torch.tensor([[1.0], [0.0]])])
def test_a_radius_that_is_not_positive_is_refused(project, radius):
    with pytest.raises(ValueError, match="radius of an l1 ball must be positive, not"):
        project(torch.ones(2, 3), radius)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_independent_and_the_input_is_left_alone(name, dtype):
    torch.manual_seed(0)
    u = 4 * torch.randn(4, 3, 11, dtype=dtype)
    before = u.clone()
    q = project_integers(u, BUDGETS[name], 7)
    assert torch.equal(u, before)
    assert q.dtype == dtype
    assert torch.equal(q, q.round())
    assert q.abs().max() <= 7
    assert bool(holds(q, BUDGETS[name]).all())
    assert not bool(holds(u.round().clamp(-7, 7), BUDGETS[name]).all()), "the budget should bind in this test"
    alone = [project_integers(row, BUDGETS[name], 7) for row in u.flatten(0, 1)]
    assert torch.equal(q.flatten(0, 1), torch.stack(alone))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_that_does_not_bind_leaves_the_nearest_integers(name):
    u = torch.tensor([[2.2, -1.4, 0.6, 0.5, -0.49, 9.0, -9.0]])
    wide = {
        "l1": Budget(15, 0, l1=10**9),
        "two-sided": budget(U4, Accumulator(32)),
        "coupled": budget(S4, Accumulator(32)),
    }
    # A unit that gains nothing is not spent: halves go toward zero.
    assert project_integers(u, wide[name], 7).tolist() == [[2, -1, 1, 0, 0, 7, -7]]


@pytest.mark.parametrize("name", BUDGETS)
def test_importance_decides_who_gets_the_last_units(name):
    u = torch.tensor([[6.0, 6.0, 6.0, -6.0, -6.0, -6.0]])
    heavy = torch.tensor([[1.0, 1.0, 100.0, 100.0, 1.0, 1.0]])
    q = project_integers(u, BUDGETS[name], 7, heavy)[0]
    assert bool(holds(q, BUDGETS[name]))
    if name == "l1":  # 17 units: 12 to the heavy ones
        assert (q[2], q[3]) == (6, -6)
    assert q[2] == max(q[:3])
    assert q[3] == min(q[3:])
    assert q[2] - q[0] >= 2


@pytest.mark.parametrize("name", BUDGETS)
def test_units_of_equal_gain_are_granted_in_the_order_of_the_row(name):
    u = torch.full((1, 6), 5.0)
    q = project_integers(u, BUDGETS[name], 7)[0]
    total = {"l1": 255 // 15, "two-sided": 127 // 15, "coupled": 128 // 8 if 128 // 8 * 7 <= 127 else 127 // 8}[name]
    assert int(q.sum()) == min(total, 30)
    assert q.tolist() == sorted(q.tolist(), reverse=True)
    assert max(q) - min(q) <= 1


def test_qmax_may_differ_from_weight_to_weight():
    u = torch.tensor([[9.0, 9.0, -9.0, 9.0]])
    qmax = torch.tensor([[1, 3, 2, 0]])
    for case in BUDGETS.values():
        q = project_integers(u, case, qmax)
        assert bool((q.abs() <= qmax).all())
        assert bool(holds(q, case).all())
    assert project_integers(u, Budget(1, 0, l1=100), qmax).tolist() == [[1, 3, -2, 0]]


@pytest.mark.parametrize("codes", [U4, S4, IntFormat(-3, 9), IntFormat(-15, 0)])
@pytest.mark.parametrize("start", [-100, 0, 37])
def test_a_given_preload_shifts_the_budget(codes, start):
    limits = budget(codes, Accumulator(8), preload=start)
    torch.manual_seed(1)
    q = project_integers(5 * torch.randn(64, 8), limits, 7)
    assert bool(holds(q, limits).all())
    p, n = q.clamp(min=0).sum(-1), (-q).clamp(min=0).sum(-1)
    hi, lo = start + codes.hi * p - codes.lo * n, start + codes.lo * p - codes.hi * n
    assert hi.max() <= 127
    assert lo.min() >= -128
    assert float(torch.maximum(hi, 1 - lo).max()) > 128 - codes.magnitude, "some row should come close to the end"


@pytest.mark.parametrize("name", BUDGETS)
def test_large_matrices_are_projected_in_blocks_of_rows(name, monkeypatch):
    torch.manual_seed(0)
    u, qmax, importance = 3 * torch.randn(2, 5, 20), torch.randint(3, 8, (5, 20)), torch.rand(2, 1, 20) + 0.1
    whole = [project_integers(u, BUDGETS[name], 7), project_integers(u, BUDGETS[name], qmax, importance)]
    monkeypatch.setattr(projections, "_BLOCK", 60)  # three rows of ten
    sizes = []
    inner = projections.project_integers

    def counted(rows, *rest):
        sizes.append(len(rows))
        return inner(rows, *rest)

    monkeypatch.setattr(projections, "project_integers", counted)
    parts = [project_integers(u, BUDGETS[name], 7), project_integers(u, BUDGETS[name], qmax, importance)]
    assert all(torch.equal(p, w) for p, w in zip(parts, whole, strict=True))
    assert sizes == [3, 3, 3, 1, 3, 3, 3, 1]


def test_large_rows_are_summed_exactly():
    # 2^18 weights of 127: their sum is not a float32 integer.
    u = torch.full((1, 2**18 + 1), 130.0)
    limit = 2**24 + 2**22 + 1
    q = project_integers(u, Budget(1, 0, l1=limit), 127)
    assert q.dtype == torch.float64
    assert int(q.long().sum()) == limit


def test_holds_is_decided_in_integers():
    limits = Budget(1, 0, l1=2**24)
    q = torch.ones(1, 3, dtype=torch.float64)
    q[0, 0] = 2**24 - 2
    assert holds(q, limits).tolist() == [True]
    q[0, 2] = 2.0
    assert holds(q, limits).tolist() == [False]
    assert holds(q[0], limits).shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", BUDGETS)
def test_gpu_and_cpu_agree(name):
    u = 4 * torch.randn(64, 33, dtype=torch.float64)
    gpu = project_integers(u.cuda(), BUDGETS[name], 7)
    assert torch.equal(gpu.cpu(), project_integers(u, BUDGETS[name], 7))
