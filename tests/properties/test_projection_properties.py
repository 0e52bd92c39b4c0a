"""The integer projection is optimal: it equals brute force on every small problem, and beats EP-init everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from accaware.bounds import a2q_budget, a2q_plus_budget, budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import holds, project_integers, project_l1, project_l1_zero_centred

FRACTION = 64  # weights are multiples of 1/64, so that errors are integers and ties are real
UNSIGNED = [IntFormat.unsigned(bits) for bits in (1, 2, 4)] + [IntFormat(0, 5), IntFormat(-6, 0)]
SIGNED = [IntFormat.signed(bits) for bits in (2, 3, 4)] + [IntFormat(-1, 6), IntFormat(-5, 2)]
PRELOADS = st.sampled_from(["none", "free", -3, 2])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def problems(draw):
    """(numerators [K], importance [K], qmax, codes, P, preload): small enough to enumerate."""
    size = draw(st.integers(1, 4))
    qmax = draw(st.sampled_from([1, 2, 3]))
    reach = (2 * qmax + 1) * FRACTION
    plain = st.integers(-reach, reach)
    tied = st.sampled_from([v * FRACTION // 2 for v in range(-2 * qmax - 1, 2 * qmax + 2)])
    numerators = draw(st.lists(st.one_of(plain, tied), min_size=size, max_size=size))
    importance = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    codes = draw(st.sampled_from(UNSIGNED + SIGNED))
    return np.array(numerators), np.array(importance), qmax, codes, draw(st.integers(4, 8)), draw(PRELOADS)


def fits(q: np.ndarray, codes: IntFormat, bits: int, preload: str | int) -> np.ndarray:
    """Whether each row of q [R, K] is safe, from the definition of the worst case."""
    highest = np.where(q > 0, q * codes.hi, q * codes.lo).sum(1)
    lowest = np.where(q > 0, q * codes.lo, q * codes.hi).sum(1)
    if preload == "free":
        return highest - lowest <= 2**bits - 1
    start = 0 if preload == "none" else preload
    return (start + highest <= 2 ** (bits - 1) - 1) & (start + lowest >= -(2 ** (bits - 1)))


def least_error(numerators, importance, tops, codes, bits, preload) -> int:
    """min sum h_i (64 q_i - n_i)^2 over all safe q with |q_i| <= tops_i."""
    grid = np.array(list(itertools.product(*(range(-top, top + 1) for top in tops))))
    safe = grid[fits(grid, codes, bits, preload)]
    return int((importance * (FRACTION * safe - numerators) ** 2).sum(1).min())


def limits_of(codes, bits, preload):
    """The budget; requests that it refuses are no problems."""
    free = preload == "free"
    try:
        return budget(
            codes, Accumulator(bits, preload="free" if free else "none"), None if isinstance(preload, str) else preload
        )
    except ValueError:
        reject()


@given(problems(), DTYPES, st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_projection_equals_brute_force(problem, dtype, weighted):
    numerators, importance, qmax, codes, bits, preload = problem
    importance = importance if weighted else np.ones_like(importance)
    u = torch.from_numpy(numerators).to(dtype) / FRACTION
    h = torch.from_numpy(importance).to(dtype) if weighted else None
    q = project_integers(u, limits_of(codes, bits, preload), qmax, h).numpy().astype(np.int64)
    assert np.abs(q).max() <= qmax
    assert fits(q[None], codes, bits, preload).all()
    error = int((importance * (FRACTION * q - numerators) ** 2).sum())
    assert error == least_error(numerators, importance, [qmax] * len(q), codes, bits, preload)


@given(problems(), DTYPES, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_qmax_of_each_weight_equals_brute_force(problem, dtype, tops):
    numerators, importance, _, codes, bits, preload = problem
    tops = tops[: len(numerators)]
    u, h = torch.from_numpy(numerators).to(dtype) / FRACTION, torch.from_numpy(importance).to(dtype)
    limits = limits_of(codes, bits, preload)
    q = project_integers(u, limits, torch.tensor(tops), h).numpy().astype(np.int64)
    assert (np.abs(q) <= tops).all()
    assert fits(q[None], codes, bits, preload).all()
    error = int((importance * (FRACTION * q - numerators) ** 2).sum())
    assert error == least_error(numerators, importance, tops, codes, bits, preload)


floats = st.floats(-20, 20, width=32)


@given(
    st.lists(floats, min_size=1, max_size=4), st.sampled_from(UNSIGNED + SIGNED), st.integers(4, 7), PRELOADS, DTYPES
)
@settings(max_examples=150, deadline=None)
def test_any_floats_are_projected_to_within_rounding(values, codes, bits, preload, dtype):
    u = torch.tensor(values, dtype=dtype)
    q = project_integers(u, limits_of(codes, bits, preload), 3).numpy().astype(np.int64)
    assert fits(q[None], codes, bits, preload).all()
    grid = np.array(list(itertools.product(range(-3, 4), repeat=len(values))))
    errors = ((grid[fits(grid, codes, bits, preload)] - np.array(values)) ** 2).sum(1)
    assert ((q - np.array(values)) ** 2).sum() - errors.min() <= (1e-5 if dtype == torch.float32 else 1e-12)


@given(
    st.integers(1, 40), st.integers(0, 2**31), st.floats(0.05, 30), st.sampled_from([1, 7, 127]),
    st.sampled_from(UNSIGNED + SIGNED), st.integers(5, 16), PRELOADS, DTYPES, st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_result_always_holds(size, seed, spread, qmax, codes, bits, preload, dtype, weighted):
    torch.manual_seed(seed)
    u = spread * torch.randn(5, size, dtype=dtype)
    h = torch.rand(5, size, dtype=dtype) + 1e-4 if weighted else None
    limits = limits_of(codes, bits, preload)
    q = project_integers(u, limits, qmax, h)
    assert bool(holds(q, limits).all())
    assert fits(q.numpy().astype(np.int64), codes, bits, preload).all()
    assert float(q.abs().max()) <= qmax
    assert bool((q * u >= 0).all()), "no weight changes its sign"


@given(
    st.integers(1, 40), st.integers(0, 2**31), st.floats(0.05, 30), st.sampled_from(UNSIGNED[:3] + SIGNED[:3]),
    st.integers(7, 14),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_never_worse_than_ep_init_and_truncation(size, seed, spread, codes, bits):
    torch.manual_seed(seed)
    u = (spread * torch.randn(4, size, dtype=torch.float64) * FRACTION).round() / FRACTION
    truncate = lambda x: x.trunc().clamp(-7, 7)  # noqa: E731

    def error(q):
        return (q - u).square().sum(-1)

    for name in ("none", "free"):
        limits = limits_of(codes, bits, name)
        best = error(project_integers(u, limits, 7))
        for radius, project in (
            (limits.l1, project_l1),  # the same budget, EP-init and truncation instead of the integer projection
            (float(a2q_budget(codes, bits)), project_l1),
            (float(a2q_plus_budget(codes, bits)), project_l1_zero_centred),
        ):
            if radius is not None:
                rival = truncate(project(u, radius))
                assert bool(holds(rival, limits).all())
                assert bool((best <= error(rival) + 1e-9).all())


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 20))
@settings(max_examples=100, deadline=None)
def test_l1_projections_satisfy_the_variational_inequality(seed, size, radius):
    """x is the projection of v onto a convex set exactly where (v - x) . (y - x) <= 0 for every y of the set."""
    torch.manual_seed(seed)
    v = 3 * torch.randn(size, dtype=torch.float64)
    others = torch.randn(64, size, dtype=torch.float64)
    for project, centred in ((project_l1, False), (project_l1_zero_centred, True)):
        x = project(v, radius)
        y = others - others.mean(-1, keepdim=True) if centred else others
        y = radius * y / y.abs().sum(-1, keepdim=True).clamp(min=1e-12)
        assert float(x.abs().sum()) <= radius * (1 + 1e-12)
        assert float(((v - x) * (y - x)).sum(-1).max()) <= 1e-9 * (1 + radius) * (1 + float(v.abs().max()))
