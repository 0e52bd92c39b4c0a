"""Euclidean projections onto the sets that an accumulator can hold; pure functions, batched over leading dimensions.

Real-valued: the l1 ball (Duchi et al. 2008; A2Q+, EP-init) and its zero-centred slice. Integer-valued: the closest
integers under the exact budget of `accaware.bounds.Budget`, which is optimal (see `project_integers`), or where any
taps may share a tile (`project_any`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from accaware.bounds import Budget

__all__ = [
    "holds",
    "project_any",
    "project_capped",
    "project_integers",
    "project_l1",
    "project_l1_zero_centred",
    "simplex_threshold",
]

_BLOCK = 1 << 18  # elements of a matrix that are projected at once on a CPU: their temporaries stay in its cache
_GAINS = 1 << 23  # gains that the enumeration of coupled budgets sorts at once
_MOST_GAINS = 1 << 27  # that it sorts for one row: a GiB
_GUESSES = 8  # interpolated steps before plain bisection takes over


def simplex_threshold(v: Tensor, radius: Tensor) -> Tensor:
    """The theta for which sum_i max(v_i - theta, 0) = radius > 0. v: [..., K], radius: [..., 1]; returns [..., 1]."""
    ordered = v.sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    theta = (ordered.cumsum(-1) - radius) / count
    support = (ordered > theta).sum(-1, keepdim=True).clamp_(min=1)
    return theta.gather(-1, support - 1)


def _radius(v: Tensor, radius: Tensor | float) -> Tensor:
    r = torch.as_tensor(radius, dtype=v.dtype, device=v.device)
    if not bool((r > 0).all()):
        raise ValueError(f"the radius of an l1 ball must be positive, not {float(r.min())}")
    return r if r.ndim == 0 else r.expand(*v.shape[:-1], 1)


def project_l1(v: Tensor, radius: Tensor | float) -> Tensor:
    """The point of {x : ||x||_1 <= radius} that is closest to v (Duchi et al. 2008, figure 1).

    v: [..., K] floating point; radius: positive, a number or [..., 1]. Returns a tensor like v.
    Raises `ValueError` for a radius that is not positive.

    >>> project_l1(torch.tensor([3.0, -2.0]), 3.0)
    tensor([ 2., -1.])
    """
    r = _radius(v, radius)
    size = v.abs()
    theta = simplex_threshold(size, r)
    inside = size.sum(-1, keepdim=True) <= r
    return torch.where(inside, v, v.sign() * (size - theta).clamp(min=0))


def project_l1_zero_centred(v: Tensor, radius: Tensor | float) -> Tensor:
    """The point of {x : sum_i x_i = 0, ||x||_1 <= radius} that is closest to v.

    Such an x has a positive and a negative part of the same mass, radius/2 where the ball binds, so the two parts are
    two independent projections onto a simplex: x = max(v - a, 0) - max(b - v, 0). A2Q+ (section 4) leaves this open.
    v: [..., K] floating point; radius: positive, a number or [..., 1]. Returns a tensor like v.

    >>> project_l1_zero_centred(torch.tensor([4.0, 1.0, 1.0]), 2.0)
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    r = _radius(v, radius)
    centred = v - v.mean(-1, keepdim=True)
    upper = simplex_threshold(centred, r / 2)
    lower = -simplex_threshold(-centred, r / 2)
    inside = centred.abs().sum(-1, keepdim=True) <= r
    return torch.where(inside, centred, (centred - upper).clamp(min=0) - (lower - centred).clamp(min=0))


@torch.no_grad()
def project_integers(
    u: Tensor, budget: Budget | Sequence[Budget], qmax: int | Tensor, importance: Tensor | None = None
) -> Tensor:
    """The integers q closest to u that an accumulator can hold: argmin sum_i h_i (q_i - u_i)^2 under `budget`.

    u: [..., K] float32 or float64, one row of weights divided by their scale; the budget, or every one of several
    (which are no `l1` ones), holds for each row. Raises `ValueError` where a row of signed inputs is too large.
    qmax: the largest |q_i|, a number or a tensor that broadcasts to u. importance: h_i > 0, broadcasts to u; default 1.
    Returns integers in the dtype of u (float64 where float32 could not hold a row's sum).

    Raising |q_i| from k - 1 to k lowers the error by h_i (2 (|u_i| - k) + 1), which falls with k: the problem is
    separable and convex, so keeping the units with the largest positive gains is optimal. They are found by bisection
    on the gain of the last unit (the multiplier of the budget); units of equal gain are granted in order of the row.

    >>> project_integers(torch.tensor([2.6, -1.4, 0.9]), Budget(up=1, down=1, hi=None, lo=None, l1=4), qmax=7)
    tensor([ 2., -1.,  1.])
    """
    if u.device.type == "cpu" and u.numel() > max(_BLOCK, u.shape[-1]):
        return _in_blocks(u, budget, qmax, importance)
    if u.shape[-1] * float(qmax.max() if isinstance(qmax, Tensor) else qmax) >= 2**24:
        u = u.double()
    budgets = (budget,) if isinstance(budget, Budget) else tuple(budget)
    if budgets[0].l1 is not None:
        return _fill(u.abs(), budgets[0].l1, qmax, importance) * u.sign()
    positive, negative = [b.positive for b in budgets], [b.negative for b in budgets]
    if None in positive or None in negative:
        return _project_coupled(u, budgets, qmax, importance)
    upper, lower = (min(x for x in caps if x is not None) for caps in (positive, negative))
    return project_capped(u, upper, lower, qmax, importance)


@torch.no_grad()
def project_capped(
    u: Tensor, positive: int | Tensor, negative: int | Tensor, qmax: int | Tensor, importance: Tensor | None = None
) -> Tensor:
    """`project_integers` where sum q+ <= positive and sum q- <= negative, numbers or tensors [..., 1], one per row.

    >>> project_capped(torch.tensor([[2.6, -1.4], [2.6, -1.4]]), torch.tensor([[3.0], [1.0]]), 1, qmax=7)
    tensor([[ 3., -1.],
            [ 1., -1.]])
    """
    sides = torch.stack([u, -u]).clamp_(min=0)  # at once: small layers cost what their calls cost
    caps = [torch.as_tensor(cap, dtype=u.dtype, device=u.device) for cap in (positive, negative)]
    filled = _fill(sides, torch.stack([cap.expand(*u.shape[:-1], 1) for cap in caps]), qmax, importance)
    return filled[0] - filled[1]


@torch.no_grad()
def project_any(
    u: Tensor, tile: int, positive: int, negative: int, qmax: int | Tensor, importance: Tensor | None = None
) -> Tensor:
    """The integers closest to u of which no `tile` positive ones pass `positive`, no `tile` negative ones `negative`.

    Arguments as in `project_integers`, u: [R, K]; the sums are those of the `tile` largest of each sign, for tiles that
    any taps may share. With c the `tile`-th largest, all but tile - 1 integers are at most c, and those exceed it by
    at most limit - tile c together, so every c is tried. Which ones exceed it: those that gain most if they alone do.
    That is optimal for tiles of two, and for others where all h_i are equal.

    >>> project_any(torch.tensor([[5.0, 4.0, 1.0, -9.0]]), 2, 7, 7, qmax=8)
    tensor([[ 4.,  3.,  1., -7.]])
    """
    top = torch.as_tensor(qmax, dtype=u.dtype, device=u.device).expand_as(u)
    h = None if importance is None else importance.expand_as(u)
    up, down = u.clamp(min=0), (-u).clamp(min=0)
    return _largest_fit(up, tile, positive, top, h) - _largest_fit(down, tile, negative, top, h)


def _largest_fit(a: Tensor, tile: int, limit: int, top: Tensor, h: Tensor | None) -> Tensor:
    """One sign of `project_any`: a, top: [R, K] >= 0."""
    tile = min(tile, a.shape[-1])
    wanted = torch.minimum((a - 0.5).ceil().clamp(min=0), top)
    broken = wanted.topk(tile).values.sum(-1) > limit
    if not bool(broken.any()):
        return wanted
    rows, full, weights = a[broken], wanted[broken], torch.ones_like(a[broken]) if h is None else h[broken]
    best, least = torch.zeros_like(rows), (weights * rows**2).sum(-1)
    for c in range(min(limit // tile, int(full.max())) + 1):
        q = full.clamp(max=c)
        alone = torch.minimum(full, torch.full_like(full, limit - (tile - 1) * c))
        gain = weights * ((q - rows) ** 2 - (alone - rows) ** 2)
        chosen = gain.topk(tile - 1).indices
        x, room, w = (t.gather(-1, chosen) for t in (rows - c, full - q, weights))
        if tile > 1:
            q.scatter_add_(-1, chosen, _fill(x.clamp(min=0), limit - tile * c, room, w))
        error = (weights * (q - rows) ** 2).sum(-1)
        better = error < least
        best[better], least = q[better], torch.minimum(error, least)
    wanted[broken] = best
    return wanted


def _in_blocks(u: Tensor, budget: Budget | Sequence[Budget], qmax: int | Tensor, h: Tensor | None) -> Tensor:
    """`project_integers` a few rows at a time."""
    rows = u.flatten(0, -2)
    limits = qmax.expand_as(u).flatten(0, -2) if isinstance(qmax, Tensor) else None
    weights = None if h is None else h.expand_as(u).flatten(0, -2)
    step = max(1, _BLOCK // u.shape[-1])
    done = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        top = qmax if limits is None else limits[part]
        done.append(project_integers(rows[part], budget, top, None if weights is None else weights[part]))
    return torch.cat(done).reshape(u.shape)


def holds(q: Tensor, budget: Budget | Sequence[Budget]) -> Tensor:
    """Whether each row of integers is within every budget, decided in Python integers. q: [..., K] -> bool [...]."""
    p, n = (side.clamp(min=0).sum(-1).long().cpu().numpy() for side in (q, -q))
    budgets = (budget,) if isinstance(budget, Budget) else budget
    safe = np.logical_and.reduce([b.allows(p, n) for b in budgets])
    return torch.as_tensor(np.asarray(safe, dtype=bool), device=q.device)


def _fill(a: Tensor, limit: int | Tensor, qmax: int | Tensor, h: Tensor | None) -> Tensor:
    """argmin sum_i h_i (q_i - a_i)^2 over integers 0 <= q_i <= qmax with sum_i q_i <= limit; a: [..., K] >= 0."""
    top = torch.as_tensor(qmax, dtype=a.dtype, device=a.device)
    room = torch.as_tensor(limit, dtype=a.dtype, device=a.device)
    base = a - 0.5
    buffer = torch.empty_like(base)

    def units(multiplier: Tensor) -> Tensor:  # those whose gain exceeds 2 * multiplier
        torch.sub(base, multiplier if h is None else multiplier / h, out=buffer)
        buffer.ceil_()
        return buffer.clamp_(min=0).clamp_(max=top) if top.ndim else buffer.clamp_(0, float(top))

    wanted = units(torch.zeros((), dtype=a.dtype, device=a.device)).sum(-1, keepdim=True)
    solved = wanted <= room
    if a.device.type == "cpu" and bool(solved.all()):
        return buffer
    low = torch.zeros_like(wanted)
    high = (a + 0.5 if h is None else (a + 0.5) * h).amax(-1, keepdim=True).masked_fill_(solved, 0)
    # The first guesses weigh the ends by the roots of the units too many at `low` and to spare at `high`: between
    # regula falsi, which leaves one end where it is, and bisection, which forgets what was counted.
    above, below = (wanted - room).clamp_(min=0).sqrt_(), room.sqrt().expand_as(wanted)
    for step in range(_GUESSES + (32 if a.dtype == torch.float32 else 62)):
        share = above / (above + below).clamp_(min=1) if step < _GUESSES else 0.5
        middle = low + (high - low) * share
        spare = room - units(middle).sum(-1, keepdim=True)
        fits = spare >= 0
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        if step < _GUESSES:
            root = spare.abs().sqrt_()
            above, below = torch.where(fits, above, root), torch.where(fits, root, below)
        solved = solved | (spare == 0)
        # A row that spends its budget to the last unit is solved; asking would make a GPU wait.
        if a.device.type == "cpu" and bool(solved.all()):
            return units(high)
    full = units(low).clone()
    q = units(high)
    tied = full.sub_(q)
    left = room - q.sum(-1, keepdim=True)
    return q + torch.minimum((left - tied.cumsum(-1) + tied).clamp_(min=0), tied)


def _project_coupled(u: Tensor, budget: Sequence[Budget], qmax: int | Tensor, h: Tensor | None) -> Tensor:
    """`project_integers` where positive and negative weights share both ends of the register (signed inputs)."""
    top = torch.as_tensor(qmax, dtype=u.dtype, device=u.device)
    q = torch.minimum((u.abs() - 0.5).ceil_().clamp_(min=0), top) * u.sign()
    broken = ~holds(q, budget)
    if not bool(broken.any()):
        return q
    rows = u[broken]
    rows_top = top.expand_as(u)[broken] if top.ndim else top
    rows_h = None if h is None else h.expand_as(u)[broken]
    each = u.shape[-1] * int(top.max())
    if each > _MOST_GAINS:
        raise ValueError(
            f"{u.shape[-1]} weights of up to {int(top.max())} are too many to split a budget between signs"
        )
    step = max(1, _GAINS // each)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        part_h = None if rows_h is None else rows_h[part]
        part_top = rows_top[part] if top.ndim else rows_top
        positive, negative = _best_split(rows[part], budget, part_top, part_h)
        rows[part] = _fill(rows[part].clamp(min=0), positive, part_top, part_h) - _fill(
            (-rows[part]).clamp(min=0), negative, part_top, part_h
        )
    q[broken] = rows
    return q


def _best_split(u: Tensor, budgets: Sequence[Budget], top: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many units the positive and the negative weights of each row get; u: [R, K], returns two of [R, 1].

    With F(p) and G(n) the sums of the p and n largest gains of the two sides, both concave, every p is tried with the
    largest n that the budgets then allow.
    """
    most = u.shape[-1] * int(top.max())
    for budget in budgets:
        most = min(most, *(limit // x for x, limit in _slopes(budget, "p") if x))
    p = torch.arange(most + 1, device=u.device)
    n = torch.full_like(p, u.shape[-1] * int(top.max()))
    for budget in budgets:
        for (x, limit), (y, _) in zip(_slopes(budget, "p"), _slopes(budget, "n"), strict=True):
            if y:
                n = torch.minimum(n, (limit - x * p) // y)
    gain_p = _prefix_gains(u.clamp(min=0), top, h, most)
    gain_n = _prefix_gains((-u).clamp(min=0), top, h, int(n.max()))
    total = gain_p + gain_n[:, n.clamp(max=gain_n.shape[1] - 1)]
    best = total.argmax(-1)
    return best.unsqueeze(-1).to(u.dtype), n[best].unsqueeze(-1).to(u.dtype)


def _slopes(budget: Budget, side: str) -> list[tuple[int, int]]:
    """The two conditions up p + down n <= hi and down p + up n <= lo, as the slope of one side and the limit."""
    assert budget.hi is not None
    assert budget.lo is not None
    up, down = (budget.up, budget.down) if side == "p" else (budget.down, budget.up)
    return [(up, budget.hi), (down, budget.lo)]


def _prefix_gains(a: Tensor, top: Tensor, h: Tensor | None, most: int) -> Tensor:
    """[R, most + 1]: the sum of the j largest positive gains of each row, j = 0..most; float64."""
    k = torch.arange(1, int(top.max()) + 1, device=a.device, dtype=torch.float64)
    gains = 2 * (a.double().unsqueeze(-1) - k) + 1
    gains = gains.masked_fill(k > top.unsqueeze(-1), 0) if top.ndim else gains
    gains = (gains if h is None else gains * h.unsqueeze(-1)).clamp_(min=0).flatten(1)
    count = min(most, gains.shape[1])
    sums = gains.topk(count, dim=-1).values.cumsum(-1)
    sums = torch.cat([sums, sums[:, -1:].expand(-1, most - count)], dim=-1) if count else gains.new_zeros(len(a), most)
    return torch.cat([gains.new_zeros(len(a), 1), sums], dim=-1)
