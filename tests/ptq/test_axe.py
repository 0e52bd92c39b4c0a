"""GPTQ, GPFQ and AXE: against literal transcriptions of the published formulas, one channel and one tap at a time."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import holds, project_integers
from accaware.ptq import scales
from accaware.ptq.axe import Axe
from accaware.ptq.descent import Problem, output_error
from accaware.ptq.gpfq import gpfq
from accaware.ptq.gptq import gptq
from accaware.ptq.rounding import Exact, Nearest
from accaware.ptq.scales import at_best_scale

LOOSE = Accumulator(40)


def problem_of(codes, register, tiles, rows=4, groups=2, fan_in=7, qmax=7, seed=0, diagonal=False):
    """Inputs x of a quantized network, near those of a float one, and weights of different sizes."""
    random = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    floats = new(groups, 40, fan_in) @ new(groups, fan_in, fan_in) + 0.5
    x = floats + 0.3 * new(groups, 40, fan_in)
    gram = x.mT @ x / 40
    gram = torch.diag_embed(gram.diagonal(dim1=1, dim2=2)) if diagonal else gram
    mixed = gram if diagonal else x.mT @ floats / 40
    w = new(rows, fan_in) * new(rows, 1).exp()
    cross = (w.unflatten(0, (groups, -1)) @ mixed.mT).flatten(0, 1)
    numbers = torch.arange(fan_in) // (tiles or fan_in)
    return Problem(gram, cross, numbers, budget(codes, register), qmax, mixed), w


class Slow:
    """AXE's two steps for one channel, with the letters of the paper; `register` None for plain rounding."""

    def __init__(self, w, s, tiles, codes, register, qmax):
        self.s, self.mu, self.nu, self.qmax = s, codes.lo, codes.hi, qmax
        self.bits = None if register is None else register.bits
        self.tiles, self.sums = tiles, {t: [0, 0] for t in set(tiles)}
        self.soft = {}
        if register is not None:
            for tile in set(tiles):
                u = [a / s for a, t in zip(w, tiles, strict=True) if t == tile]
                self.soft[tile] = duchi([x - sum(u) / len(u) for x in u], (2**self.bits - 2) / (self.nu - self.mu))

    def __call__(self, v, tap):
        if self.bits is None:
            return v, min(max(round(v / self.s), -self.qmax), self.qmax)
        tile, big, mu, nu = self.tiles[tap], 2 ** (self.bits - 1) - 1, self.mu, self.nu
        p, n = self.sums[tile]
        v = math.copysign(max(abs(v) - self.s * self.soft[tile], 0), v)
        upper, lower = [(big - nu * p - mu * n) / nu], [(-big - mu * p - nu * n) / nu]
        if mu:
            upper.append((-big - mu * p - nu * n) / mu)
            lower.append((big - nu * p - mu * n) / mu)
        u, l = min(upper) - 0.5, max(lower) + 0.5  # noqa: E741
        z = min(max(v / self.s, min(l, 0)), max(u, 0))
        q = min(max(round(z), -self.qmax), self.qmax)
        self.sums[tile][q < 0] += q
        return z * self.s, q


def duchi(u, radius):
    """By bisection."""
    low, high = 0.0, max(map(abs, u))
    if sum(map(abs, u)) <= radius:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(abs(x) - middle, 0) for x in u) > radius else (low, middle)
    return high


def slow_gptq(w, s, gram, rounding):
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    w, q = w.copy(), np.zeros(len(w))
    for i, t in enumerate(order):
        z, q[t] = rounding(w[t], t)
        e = (z - s * q[t]) / upper[i, i]
        for j in range(i, len(order)):
            w[order[j]] -= e * upper[i, j]
    return q


def slow_gpfq(w, s, gram, mixed, rounding):
    order = np.argsort(-np.diag(gram), kind="stable")
    q = np.zeros(len(w))
    for i, t in enumerate(order):
        before = sum(mixed[t, j] * w[j] - gram[t, j] * s * q[j] for j in order[:i])
        _, q[t] = rounding(mixed[t, t] / gram[t, t] * w[t] + before / gram[t, t], t)
    return q


CODES = {"unsigned": IntFormat.unsigned(2), "signed": IntFormat.signed(3), "uneven": IntFormat(-2, 5)}


@pytest.mark.parametrize("solve", [gptq, gpfq])
@pytest.mark.parametrize("tiles", [None, 3])
@pytest.mark.parametrize(("codes", "bits"), [("unsigned", 5), ("signed", 6), ("uneven", 6), ("uneven", None)])
def test_it_does_what_the_formulas_say(solve, tiles, codes, bits, monkeypatch):
    monkeypatch.setattr(f"accaware.ptq.{solve.__name__}.BLOCK", 3)
    codes, register, bound = CODES[codes], None if bits is None else Accumulator(bits), 0
    for seed in range(10):
        problem, w = problem_of(codes, register or LOOSE, tiles, seed=seed)
        scale = w.abs().amax(-1, keepdim=True) / 5
        found = solve(w, scale, problem, Nearest if register is None else Axe)
        for row, (weights, s) in enumerate(zip(w.numpy(), scale[:, 0].tolist(), strict=True)):
            rounding = Slow(weights.tolist(), s, problem.tiles.tolist(), codes, register, problem.qmax)
            moments = [problem.gram[row // 2].numpy(), problem.mixed[row // 2].numpy()]
            wanted = slow_gptq(weights, s, moments[0], rounding) if solve is gptq else None
            wanted = slow_gpfq(weights, s, *moments, rounding) if solve is gpfq else wanted
            assert found[row].tolist() == wanted.tolist()
        bound += int((found != solve(w, scale, problem, Nearest)).any(1).sum())
    assert bound >= 20 or bits is None  # the budgets were felt


def test_a_case_worked_by_hand():
    """Two taps, H = [[2, 1], [1, 1]], s = 1, w = (1.6, 2.4): H^-1 = [[1, -1], [-1, 2]], so U = [[1, -1], [0, 1]].

    GPTQ rounds 1.6 to 2, e = -0.4, and makes 2.4 into 2.4 - (-0.4)(-1) = 2.0. GPFQ with G = H rounds 1.6 to 2, and then
    2.4 + (1.6 - 2) = 2.0. With codes [0, 1] and P = 3, M = 3: the centred weights (-0.4, 0.4) lie in the ball, the
    first tap is clamped to 2.5 and becomes 2, the second to 3 - 2 - 1/2 = 0.5 and becomes 0.
    The exact budget leaves it 1.
    """
    gram = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    w, one = torch.tensor([[1.6, 2.4]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    tiles = torch.zeros(2, dtype=torch.int64)
    problem = Problem(gram, w @ gram[0], tiles, budget(IntFormat.unsigned(1), Accumulator(3)), 7, gram)
    for solve in (gptq, gpfq):
        assert solve(w, one, problem, Nearest).tolist() == [[2, 2]]
        assert solve(w, one, problem, Axe).tolist() == [[2, 0]]
        assert solve(w, one, problem, Exact).tolist() == [[2, 1]]


@settings(max_examples=60, deadline=None)
@given(
    lo=st.integers(-9, 0),
    hi=st.integers(0, 9),
    bits=st.integers(2, 9),
    tiles=st.sampled_from([None, 1, 2, 5]),
    qmax=st.sampled_from([1, 7, 127]),
    seed=st.integers(0, 10**6),
)
def test_integers_stay_within_the_exact_budget(lo, hi, bits, tiles, qmax, seed):
    codes = IntFormat(lo, hi)
    if codes.span == 0 or max(hi, -lo) > 2 ** (bits - 1) - 1:
        return
    problem, w = problem_of(codes, Accumulator(bits), tiles, qmax=qmax, seed=seed)
    scale = w.abs().amax(-1, keepdim=True) / qmax
    for solve, kind in itertools.product((gptq, gpfq), (Axe, Exact)):
        q = solve(w, scale, problem, kind)
        assert torch.equal(q, q.round())
        assert float(q.abs().max()) <= qmax
        for tile in problem.tiles.unique():
            part = q[:, problem.tiles == tile]
            assert bool(holds(part, problem.budget).all())
            assert torch.equal(project_integers(part, problem.budget, qmax), part)  # what the quantizer would deploy


@pytest.mark.parametrize("solve", [gptq, gpfq])
def test_taps_without_correlation_are_rounded_to_nearest(solve):
    problem, w = problem_of(CODES["unsigned"], LOOSE, None, diagonal=True)
    scale = w.abs().amax(-1, keepdim=True) / 5
    for kind in (Nearest, Exact, Axe):
        assert torch.equal(solve(w, scale, problem, kind), (w / scale).round())


@pytest.mark.parametrize("solve", [gptq, gpfq])
def test_feedback_lowers_the_error_of_rounding(solve):
    problem, w = problem_of(CODES["unsigned"], LOOSE, None, rows=400, fan_in=12)
    scale = w.abs().amax(-1, keepdim=True) / 5
    cross = problem.times(w) if solve is gptq else problem.cross  # the outputs that each aims at
    problem = Problem(problem.gram, cross, problem.tiles, problem.budget, problem.qmax, problem.mixed)
    power = (w * problem.times(w)).sum(-1)
    near, fed = (
        output_error(q, scale, problem) / power for q in ((w / scale).round(), solve(w, scale, problem, Nearest))
    )
    assert float(fed.mean() + 1) < 0.8 * float(near.mean() + 1)


def test_the_scale_of_least_error_is_taken(monkeypatch):
    problem, w = problem_of(CODES["unsigned"], Accumulator(5), None, rows=6)
    ratios = torch.tensor([0.5, 0.7, 1.0, 1.4, 2.0, 2.8], dtype=torch.float64)
    base = w.abs().amax(-1, keepdim=True) / problem.qmax
    each = torch.stack([output_error(gptq(w, base * r, problem, Axe), base * r, problem) for r in ratios])
    assert len(each.argmin(0).unique()) > 1
    for at_once in (1 << 24, 2 * w.numel()):
        monkeypatch.setattr(scales, "_ELEMENTS", at_once)
        q, scale = at_best_scale(partial(gptq, kind=Axe), w, problem, ratios)
        torch.testing.assert_close(scale, base * ratios[each.argmin(0)].unsqueeze(1))
        torch.testing.assert_close(output_error(q, scale, problem), each.amin(0))


def test_axe_knows_no_free_preload():
    problem, w = problem_of(CODES["unsigned"], Accumulator(5, preload="free"), None)
    with pytest.raises(ValueError, match="AXE knows no free preload"):
        gptq(w, torch.ones(4, 1, dtype=torch.float64), problem, Axe)
