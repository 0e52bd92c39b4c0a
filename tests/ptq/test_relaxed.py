"""Where the descent starts: within every kind of budget, at the best real weights, and better than a projection."""

from __future__ import annotations

import itertools

import pytest
import torch

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import holds, project_integers
from accaware.ptq import relaxed
from accaware.ptq.descent import Problem, output_error
from accaware.ptq.relaxed import Relaxation, start, sweep

BUDGETS = {
    "unsigned": budget(IntFormat.unsigned(2), Accumulator(6)),
    "signed": budget(IntFormat.signed(3), Accumulator(7)),
    "uneven": budget(IntFormat(-1, 5), Accumulator(7)),
    "free": budget(IntFormat.unsigned(2), Accumulator(5, preload="free")),
    "loose": budget(IntFormat.unsigned(2), Accumulator(20)),
}


def problem_of(limits, tiles, rows=40, fan_in=12, seed=0):
    """Two groups of rows; tiles: [K] numbers."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 60, fan_in, generator=random, dtype=torch.float64)
    x = x @ torch.randn(2, fan_in, fan_in, generator=random, dtype=torch.float64)
    w = torch.randn(rows, fan_in, generator=random, dtype=torch.float64)
    gram = x.mT @ x / 60 + 0.1 * torch.eye(fan_in, dtype=torch.float64)
    problem = Problem(gram, torch.zeros_like(w), torch.tensor(tiles), limits, 7)
    return Problem(gram, problem.times(w), problem.tiles, limits, 7), w


def safe(q, problem):
    fits = [holds(q[:, problem.tiles == t], problem.budget) for t in problem.tiles.unique()]
    return bool(torch.stack(fits).all()) and torch.equal(q, q.round()) and float(q.abs().max()) <= problem.qmax


@pytest.mark.parametrize("tiles", [[0] * 12, [0, 1, 2] * 4, [0] * 5 + [1] * 5 + [2] * 2])
@pytest.mark.parametrize("name", BUDGETS)
def test_the_start_is_safe_and_near_and_sweeps_lower_its_error(name, tiles, monkeypatch):
    monkeypatch.setattr(relaxed, "BLOCK", 5)
    problem, w = problem_of(BUDGETS[name], tiles)
    q, scale = start(w, problem)
    assert safe(q, problem)
    power = (w * problem.cross).sum(-1)
    began = output_error(q, scale, problem) + power
    if name != "uneven":  # there the sum of both limits may be far from each
        step = w.abs().amax(-1, keepdim=True) / problem.qmax
        errors, relaxation = [], Relaxation(problem)
        for ratio in torch.arange(-1.5, 3, 0.1).exp2():
            near = relaxation.split(w / (step * ratio)).flatten(0, 1)
            near = relaxation.merge(project_integers(near, problem.budget, 7).unflatten(0, (2, -1)))
            errors.append(output_error(near, problem.best_scale(near, step), problem) + power)
        assert float(began.sum()) < 0.95 * float(torch.stack(errors).amin(0).sum())
    for _ in range(2):
        q, scale = sweep(q, scale, problem)
        assert safe(q, problem)
        after = output_error(q, scale, problem) + power
        assert bool((after <= began + 1e-9).all())
        began = after


@pytest.mark.parametrize("name", ["unsigned", "free"])
def test_the_real_weights_are_the_best_within_the_budget(name):
    """No small step towards any corner of the budget, or towards another row within it, lowers the error."""
    problem, w = problem_of(BUDGETS[name], [0] * 12)
    scale = torch.full((len(w), 1), 0.2, dtype=torch.float64)
    relaxation = Relaxation(problem)
    rows = relaxation.split(w)
    v = relaxation.merge(relaxation.solve(rows, torch.zeros_like(rows), scale, 300)[0])
    assert bool((v.abs() <= 0.2 * 7 + 1e-6).all())
    sums = v.clamp(min=0).sum(-1), (-v).clamp(min=0).sum(-1)
    limits = (problem.budget.positive, problem.budget.negative)
    if name == "free":
        assert float((sums[0] + sums[1]).max()) <= 0.2 * problem.budget.l1 + 1e-5
    else:
        assert all(float(s.max()) <= 0.2 * limit + 1e-5 for s, limit in zip(sums, limits, strict=True))
    slope = problem.times(v) - problem.cross
    for tap, sign in itertools.product(range(12), (-1, 1)):
        corner = torch.zeros_like(v)
        corner[:, tap] = sign * 0.2 * min(7, problem.budget.l1 or limits[sign < 0])
        assert float((slope * (corner - v)).sum(-1).min()) > -1e-3


@pytest.mark.parametrize("name", BUDGETS)
def test_a_dozen_steps_come_near_and_half_of_it_from_another_scale(name):
    problem, w = problem_of(BUDGETS[name], [0, 1] * 6)
    relaxation, cold, warm = Relaxation(problem), *relaxed._STEPS
    power = (w * problem.cross).sum(-1)

    def excess(rows, best):
        """How much more of the output error is left than has to be, relative to the outputs."""
        errors = [output_error(relaxation.merge(v), torch.ones(len(w), 1), problem) for v in (rows, best)]
        return float((errors[0] - errors[1]).sum() / power.sum())

    rows = relaxation.split(problem.unbounded())
    duals = torch.zeros_like(rows)
    for scale, steps in ((0.1, cold), (0.14, warm), (0.1, warm)):
        scales = torch.full((len(w), 1), scale, dtype=torch.float64)
        best, _ = relaxation.solve(rows, duals, scales, 300)
        rows, duals = relaxation.solve(rows, duals, scales, steps)
        assert excess(rows, best) < 2e-3
