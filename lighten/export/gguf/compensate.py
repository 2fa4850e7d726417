"""Codes of ggml's blocks that make good for each other's errors.

The loss of a matrix is tr(E H Eᵀ), with E = W − Ŵ and H the mean of x xᵀ over its inputs. ggml's own search gives the
grid: scales and mins. On this grid the codes are rounded column by column as in GPTQ (Frantar et al., 2023). Then
`refine` goes through the blocks again and again. In each block it solves d and dmin anew, then of part after part the
scale, the min and every code, each with all others held. A step is taken only where it lowers the loss.

A column of the matrix is a row of the tensors here, which are `[in, out]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lighten.model.gguf.blocks import Grid, Kind

SPAN = 256
"""Columns that are worked on before the others hear of it: a multiple of every type's block."""
TRIES = (1.0, 0.8, 0.86, 0.91, 0.96, 1.04, 1.09)
"""What the scale of a part is multiplied by, for a trial."""
TURNS = 2
"""Number of times that the scale and the codes of a part are solved in turn, before the next part."""


@dataclass
class _State:
    """A grid as floats, transposed."""

    kind: Kind
    levels: torch.Tensor
    """`[in, out]`."""
    scales: torch.Tensor
    """`[in / part, out]`."""
    mins: torch.Tensor
    """`[in / part, out]`."""
    d: torch.Tensor
    """`[in / block, out]`."""
    dmin: torch.Tensor
    """`[in / block, out]`."""
    table: torch.Tensor
    """Levels by code, `[codes]`."""

    @staticmethod
    def of(grid: Grid) -> _State:
        table = torch.tensor(grid.kind.levels, dtype=torch.float32)
        scales, mins, d, dmin = (_turned(each) for each in (grid.scales, grid.mins, grid.d, grid.dmin))
        return _State(grid.kind, table[grid.codes.int()].t().contiguous(), scales, mins, d, dmin, table)

    def grid(self) -> Grid:
        scales, mins = self.scales.t().short(), self.mins.t().short()
        codes = torch.searchsorted(self.table, self.levels.t().contiguous()).byte()
        return Grid(self.kind, codes, scales, mins, self.d.t().half(), self.dmin.t().half())

    def take(self, other: _State, rows: torch.Tensor) -> None:
        """Takes over some outputs, `[out]`, of another state."""
        for name in ("levels", "scales", "mins", "d", "dmin"):
            setattr(self, name, torch.where(rows, getattr(other, name), getattr(self, name)))

    def put(self, p: int, grids: _Tried, best: torch.Tensor) -> None:
        """Sets the grid of a part to one of several; `best` has its number for every output."""
        self.scales[p], self.mins[p] = (each.gather(0, best[None])[0] for each in (grids.scales, grids.mins))
        if not self.kind.numbers:
            self.d[p], self.dmin[p] = (each.gather(0, best[None])[0] for each in (grids.d, grids.dmin))

    def steps(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what levels of some parts are multiplied by, and what is taken off, `[parts, out]`."""
        parts = self.kind.block // self.kind.part
        blocks = torch.arange(len(self.scales))[part] // parts
        return self.d[blocks] * self.scales[part], self.dmin[blocks] * self.mins[part]

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the nearest levels."""
        table = self.table
        if self.kind.even:
            return wanted.round_().clamp_(float(table[0]), float(table[-1]))
        return table[torch.bucketize(wanted, (table[1:] + table[:-1]) / 2)]

    def values(self, columns: slice = slice(None)) -> torch.Tensor:
        """Returns the weights that it stands for, of some columns (whole parts of them), `[columns, out]`."""
        part = self.kind.part
        parts = slice(*((each and each // part) for each in (columns.start, columns.stop)))
        step, off = (each.repeat_interleave(part, 0) for each in self.steps(parts))
        return self.levels[columns] * step - off


def _turned(field: torch.Tensor) -> torch.Tensor:
    return field.t().float().contiguous()


def compensated(weight: torch.Tensor, metric: torch.Tensor, factor: torch.Tensor, grid: Grid, passes: int) -> Grid:
    """Returns the blocks of a matrix with codes, scales and mins that lose less than those of `grid`.

    Args:
        weight: `[out, in]`, float32.
        metric: H `[in, in]`, damped.
        factor: U, upper triangular, with H⁻¹ = UᵀU.
        grid: blocks that ggml's own rounding made of the weight.
        passes: number of times that `refine` goes through the blocks.
    """
    wide = weight.t().contiguous()
    state, rounded = _State.of(grid), _State.of(grid)
    columns(wide, factor, rounded)
    state.take(rounded, losses(wide, metric, rounded) < losses(wide, metric, state))
    for _ in range(passes):
        refine(wide, metric, state)
    return state.grid()


def losses(wide: torch.Tensor, metric: torch.Tensor, state: _State) -> torch.Tensor:
    """Returns the loss of every output, `[out]`."""
    error = wide - state.values()
    return (error * (metric @ error)).sum(0)


def columns(wide: torch.Tensor, factor: torch.Tensor, state: _State, tries: Sequence[float] = TRIES) -> None:
    """Rounds column by column. Each part takes the scale and min at which GPTQ loses least in it.

    An error e in column j costs (e / U[j,j])², because later columns make good for the rest.

    Args:
        wide: the weights, `[in, out]`.
        factor: U, `[in, in]`.
        state: is changed.
        tries: what the scale of a part is multiplied by, in turn.
    """
    w, part = wide.clone(), state.kind.part
    for start in range(0, len(w), SPAN):
        stop = min(start + SPAN, len(w))
        errors = torch.empty_like(w[start:stop])
        for first in range(start, stop, part):
            last = first + part
            found = _round_part(w[first:last], factor[first:last, first:last], state, first // part, tries)
            errors[first - start : last - start] = found
            w[last:stop].addmm_(factor[first:last, last:stop].t(), found, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


def _round_part(w: torch.Tensor, factor: torch.Tensor, state: _State, p: int, tries: Sequence[float]) -> torch.Tensor:
    """Rounds the columns of a part on the best of several grids. Returns e / U[j,j], `[part, out]`."""
    grids = _tried(state, p, tries)
    step, off = grids.d * grids.scales, grids.dmin * grids.mins
    inverse = torch.where(step == 0, 0.0, 1 / step)
    left = w[:, None] + off  # [part, tries, out]
    levels, errors, flat = torch.empty_like(left), torch.empty_like(left), left.flatten(1)
    for j in range(len(w)):
        levels[j] = state.nearest(left[j] * inverse)
        torch.addcmul(left[j], levels[j], step, value=-1, out=errors[j]).div_(factor[j, j])
        flat[j + 1 :].addr_(factor[j, j + 1 :], errors[j].flatten(), alpha=-1)
    best = errors.square().sum(0).argmin(0)
    state.put(p, grids, best)
    at = best.expand(len(w), 1, -1)
    state.levels[p * len(w) : (p + 1) * len(w)] = levels.gather(1, at)[:, 0]
    return errors.gather(1, at)[:, 0]


@dataclass
class _Tried:
    """Scales and mins that a part may have, `[tries, out]` each."""

    scales: torch.Tensor
    mins: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor


def _tried(state: _State, p: int, tries: Sequence[float]) -> _Tried:
    """Returns the grids of a part with its scale times each of `tries`. The middle of a grid with a min stays."""
    kind, block = state.kind, p // (state.kind.block // state.kind.part)
    by = torch.tensor(tries)[:, None]
    scale, least, d, dmin = state.scales[p], state.mins[p], state.d[block], state.dmin[block]
    middle = (kind.levels[-1] + kind.levels[0]) / 2
    if kind.numbers:
        scales = (scale * by).round().clamp(*kind.numbers.scales)
        shift = torch.where(dmin == 0, 0.0, d * (scales - scale) * middle / dmin)
        mins = (least + shift).round().clamp(*kind.numbers.mins)
        return _Tried(scales, mins, d.expand_as(scales), dmin.expand_as(scales))
    steps = (d * by).half().float()
    offs = (dmin - (steps - d) * middle).half().float() if kind.has_mins else dmin.expand_as(steps)
    return _Tried(scale.expand_as(steps), least.expand_as(steps), steps, offs)


def refine(wide: torch.Tensor, metric: torch.Tensor, state: _State) -> None:
    """Goes through all blocks once; never raises the loss."""
    pull = metric @ (wide - state.values())  # minus half the derivative of the loss by the rounded weight
    width, kind = len(wide), state.kind
    for start in range(0, width, SPAN):
        span = slice(start, min(start + SPAN, width))
        inner, own = metric[span, span], pull[span].clone()
        before = state.values(span)
        if kind.numbers:
            _solve_block(state, span, inner, own)
        for first in range(span.start, span.stop, kind.part):
            part = slice(first, first + kind.part)
            at = slice(first - start, part.stop - start)
            old, here = state.values(part), own[at].clone()
            for _ in range(TURNS):
                _solve_part(state, part, inner[at, at], here)
                _solve_codes(state, part, inner[at, at], here)
            own.addmm_(inner[:, at], state.values(part) - old, alpha=-1)
        pull.addmm_(metric[:, span], state.values(span) - before, alpha=-1)


def _solve_part(state: _State, part: slice, inner: torch.Tensor, own: torch.Tensor) -> None:
    if state.kind.numbers:
        _solve_numbers(state, part, inner, own)
    else:
        _solve_block(state, part, inner, own)


def _solve_block(state: _State, span: slice, h: torch.Tensor, own: torch.Tensor) -> None:
    """Solves d and dmin of a block."""
    kind, n = state.kind, span.start // state.kind.block
    parts = slice(span.start // kind.part, span.stop // kind.part)
    by_d = state.levels[span] * state.scales[parts].repeat_interleave(kind.part, 0)
    image = h @ by_d
    dd, bd = (by_d * image).sum(0), (by_d * own).sum(0)
    if kind.has_mins:
        by_min = -state.mins[parts].repeat_interleave(kind.part, 0)
        dm, mm = (by_min * image).sum(0), (by_min * (h @ by_min)).sum(0)
        bm = (by_min * own).sum(0)
        change_d, change_min = _solved(dd, dm, mm, bd, bm)
    else:
        by_min = torch.zeros_like(by_d)
        dm = mm = bm = torch.zeros_like(dd)
        change_d, change_min = torch.where(dd > 0, bd / dd, 0.0), torch.zeros_like(dd)
    d, dmin = (state.d[n] + change_d).half().float(), (state.dmin[n] + change_min).half().float()
    t, u = d - state.d[n], dmin - state.dmin[n]
    gain = 2 * (t * bd + u * bm) - (t * t * dd + 2 * t * u * dm + u * u * mm)
    better = gain > 0  # false for NaN
    t, u = torch.where(better, t, 0.0), torch.where(better, u, 0.0)
    state.d[n] += t
    state.dmin[n] += u
    own.addmm_(h, by_d * t + by_min * u, alpha=-1)


def _solved(
    dd: torch.Tensor, dm: torch.Tensor, mm: torch.Tensor, bd: torch.Tensor, bm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the solution of two equations with two unknowns; of the first alone where they are alike."""
    scale = dd * mm - dm * dm
    alike = scale <= 1e-6 * dd * mm
    first = torch.where(alike, torch.where(dd > 0, bd / dd, 0.0), (mm * bd - dm * bm) / scale)
    return first, torch.where(alike, 0.0, (dd * bm - dm * bd) / scale)


def _solve_numbers(state: _State, part: slice, h: torch.Tensor, own: torch.Tensor) -> None:
    """Solves the scale and the min of a part, in whole numbers."""
    kind, p = state.kind, part.start // state.kind.part
    assert kind.numbers
    d, dmin = state.d[part.start // kind.block], state.dmin[part.start // kind.block]
    by_scale = state.levels[part] * d
    image = h @ by_scale
    ss, bs = (by_scale * image).sum(0), (by_scale * own).sum(0)
    sm, mm, bm = -dmin * image.sum(0), dmin * dmin * h.sum(), -dmin * own.sum(0)
    scale, least = state.scales[p], state.mins[p]
    middle = (_solved(ss, sm, mm, bs, bm)[0] if kind.has_mins else torch.where(ss > 0, bs / ss, 0.0)).round()
    best, t, u = torch.zeros_like(ss), torch.zeros_like(ss), torch.zeros_like(ss)
    for tried in (torch.zeros_like(ss), middle - 1, middle, middle + 1):
        a = (scale + tried).clamp(*kind.numbers.scales) - scale
        b = torch.where(mm > 0, (bm - a * sm) / mm, 0.0).round()
        b = (least + b).clamp(*kind.numbers.mins) - least
        gain = 2 * (a * bs + b * bm) - (a * a * ss + 2 * a * b * sm + b * b * mm)
        better = gain > best
        best, t, u = torch.where(better, gain, best), torch.where(better, a, t), torch.where(better, b, u)
    state.scales[p] += t
    state.mins[p] += u
    own.addmm_(h, by_scale * t - dmin * u, alpha=-1)


def _solve_codes(state: _State, part: slice, h: torch.Tensor, own: torch.Tensor) -> None:
    """Moves every code of a part to its best, one column after the other."""
    p = part.start // state.kind.part
    (step,), _ = state.steps(slice(p, p + 1))
    inverse = torch.where(step == 0, 0.0, 1 / step)
    for j, level in enumerate(state.levels[part]):
        moved = state.nearest(torch.addcmul(level, own[j], inverse, value=1 / float(h[j, j])))
        own.addr_(h[j], (moved - level).mul_(step), alpha=-1)
        level.copy_(moved)


def losses_of(weight: torch.Tensor, metric: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the loss of every output `[out]` of a matrix `[out, in]` that is rounded to `grid`."""
    error = weight - grid.weight()
    return ((error @ metric) * error).sum(1)
