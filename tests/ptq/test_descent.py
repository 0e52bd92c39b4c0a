"""Descent on the output error: against brute force, for every kind of budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import holds, project_integers
from accaware.ptq import descent
from accaware.ptq.descent import Problem, descend, output_error

BUDGETS = {
    "unsigned": budget(IntFormat.unsigned(2), Accumulator(6)),
    "signed": budget(IntFormat.signed(3), Accumulator(7)),
    "free": budget(IntFormat.unsigned(2), Accumulator(5, preload="free")),
    "loose": budget(IntFormat.unsigned(2), Accumulator(20)),
}


def problem_of(limits, tiles=None, rows=6, groups=2, fan_in=6, diagonal=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, fan_in, generator=random, dtype=torch.float64) + 0.5
    w = torch.randn(rows, fan_in, generator=random, dtype=torch.float64)
    gram = x.mT @ x / 40
    gram = torch.diag_embed(gram.diagonal(dim1=1, dim2=2)) if diagonal else gram
    tiles = torch.zeros(fan_in, dtype=torch.int64) if tiles is None else torch.tensor(tiles)
    problem = Problem(gram, torch.zeros_like(w), tiles, limits, 3)
    return Problem(gram, problem.times(w), tiles, limits, 3), w


def safe(q, problem):
    return torch.stack([holds(q[:, problem.tiles == t], problem.budget) for t in problem.tiles.unique()]).all(0)


def neighbours(row):
    """Every row that one or two changes by one, of different taps, lead to."""
    steps = [(tap, sign) for tap in range(len(row)) for sign in (1, -1)]
    for moves in [*((s,) for s in steps), *itertools.combinations(steps, 2)]:
        if len({tap for tap, _ in moves}) == len(moves):
            new = row.clone()
            for tap, sign in moves:
                new[tap] += sign
            yield new


@pytest.mark.parametrize("tiles", [None, [0, 1, 0, 1, 1, 0]])
@pytest.mark.parametrize("name", BUDGETS)
def test_no_move_within_the_budget_improves(name, tiles, monkeypatch):
    monkeypatch.setattr(descent, "_FIRST", 1)  # which leaves work for the search of all moves
    monkeypatch.setattr(descent, "_PAIRS", 200)
    for seed in range(5):
        problem, w = problem_of(BUDGETS[name], tiles, seed=seed)
        begin, scale = torch.zeros_like(w), torch.full((len(w), 1), 0.2, dtype=torch.float64)
        q, scale = descend(begin, scale, problem)
        assert bool(safe(q, problem).all())
        assert bool((q == q.round()).all())
        assert float(q.abs().max()) <= 3
        for row, (integers, s) in enumerate(zip(q, scale, strict=True)):
            near = torch.stack([n for n in neighbours(integers) if float(n.abs().max()) <= 3])
            near = near[safe(near, problem)]
            of_row = slice(row // 3, row // 3 + 1)
            alone = Problem(
                problem.gram[of_row], problem.cross[row].expand(len(near), -1), problem.tiles, problem.budget, 3
            )
            own = output_error(q, scale, problem)[row]
            assert float((output_error(near, s.expand(len(near), 1), alone) - own).min()) > -1e-7
            for factor in (0.99, 1.01):  # nor does another scale
                assert float(output_error(q, scale * factor, problem)[row]) >= float(own)


@pytest.mark.parametrize("name", BUDGETS)
def test_the_error_never_rises_above_the_projection(name):
    problem, w = problem_of(BUDGETS[name], rows=20, fan_in=12, seed=7)
    scale = torch.full((20, 1), 0.4, dtype=torch.float64)
    power = problem.gram.diagonal(dim1=1, dim2=2).repeat_interleave(10, 0)
    start = project_integers(w / scale, problem.budget, 3, power)
    before = output_error(start, scale, problem)
    q, s = descend(start, scale, problem)
    after = output_error(q, s, problem)
    assert bool((after <= before + 1e-12).all())
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert torch.equal(start, project_integers(w / scale, problem.budget, 3, power))  # left as it was


@pytest.mark.parametrize("name", BUDGETS)
def test_separable_problems_are_solved_as_brute_force_does(name):
    """Without correlations no pair of moves is missing: the integers are the best ones at their scale."""
    problem, w = problem_of(BUDGETS[name], groups=1, rows=8, fan_in=4, diagonal=True)
    q, scale = descend(torch.zeros_like(w), torch.full((8, 1), 0.3, dtype=torch.float64), problem)
    every = torch.tensor(np.array(list(itertools.product(range(-3, 4), repeat=4))), dtype=torch.float64)
    every = every[holds(every, problem.budget)]
    for row in range(8):
        alone = Problem(problem.gram, problem.cross[row].expand(len(every), -1), problem.tiles, problem.budget, 3)
        least = output_error(every, scale[row].expand(len(every), 1), alone).min()
        torch.testing.assert_close(output_error(q, scale, problem)[row], least, rtol=1e-6, atol=1e-9)
