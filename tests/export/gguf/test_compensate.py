"""Codes, scales and mins on ggml's grids, against brute force and closed forms."""

import numpy as np
import pytest
import torch

from lighten.export.gguf import compensate, ggml
from lighten.model.gguf.blocks import KINDS, Grid, unpack
from lighten.numerics.damping import damped, inverse_factor

each_kind = pytest.mark.parametrize("name", KINDS)


def case(name: str, rows: int = 8, width: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    """Returns a weight, H of inputs that depend on each other, its factor, and ggml's own blocks."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2048, width, generator=random) @ torch.randn(width, width, generator=random) / width**0.5
    gram = damped(x.T @ x / len(x), 0.01)
    weight = torch.randn(rows, width, generator=random) * 0.1
    packed = ggml.quantize(weight.numpy(), name, gram.diagonal().numpy())
    return weight, gram, inverse_factor(gram, 0.0)[0], unpack(torch.from_numpy(packed), KINDS[name])


def total(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> float:
    error = (weight - grid.weight()).double()
    return float(torch.trace(error @ gram.double() @ error.T))


@each_kind
def test_every_pass_lowers_the_loss(name: str) -> None:
    weight, gram, factor, grid = case(name)
    found = [total(weight, gram, grid)]
    found += [total(weight, gram, compensate.compensated(weight, gram, factor, grid, passes)) for passes in (0, 1, 3)]
    assert found == sorted(found, reverse=True)
    assert found[3] < found[1] < found[0]
    assert found[2] < 0.75 * found[0]
    losses = compensate.losses_of(weight, gram, grid)
    assert float(losses.sum()) == pytest.approx(found[0], rel=1e-3)


@each_kind
def test_no_row_gets_worse(name: str) -> None:
    weight, gram, factor, grid = case(name)
    before = compensate.losses_of(weight, gram, grid)
    after = compensate.losses_of(weight, gram, compensate.compensated(weight, gram, factor, grid, 1))
    assert (after <= before * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_NL", "Q8_0"])
def test_in_the_end_no_other_code_is_better(name: str) -> None:
    """Every code of a row is tried in every place."""
    weight, gram, factor, grid = case(name, rows=2, width=256)
    found = compensate.compensated(weight, gram, factor, grid, 25)
    best = total(weight, gram, found)
    values = found.weight()
    step, off = (each.repeat_interleave(found.kind.part, 1) for each in found.steps())
    pull = (weight - values) @ gram
    for level in found.kind.levels:
        change = level * step - off - values
        gain = 2 * change * pull - change**2 * gram.diagonal()
        assert float(gain.max()) < 1e-4 * best


def test_columns_are_those_of_the_paper() -> None:
    """Each column is rounded, then the rest solved anew by least squares: what the factor does in one step."""
    weight, gram, factor, grid = case("Q4_K", rows=3, width=256)
    state = compensate._State.of(grid)
    compensate.columns(weight.T.contiguous(), factor, state, tries=[1.0])
    levels = state.levels.T
    steps, offs = (each.repeat_interleave(32, 1).double() for each in grid.steps())
    w, h = weight.double().clone(), gram.double()
    for j in range(256):
        level = ((w[:, j] + offs[:, j]) / steps[:, j]).round().clamp(0, 15)
        error = w[:, j] - (level * steps[:, j] - offs[:, j])
        w[:, j] -= error
        rest = torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j]) if j < 255 else torch.zeros(0).double()
        w[:, j + 1 :] += error[:, None] * rest
        assert (levels[:, j].double() != level).float().mean() <= 1 / 3, j
    rounded = levels.double() * steps - offs
    error, own = rounded - weight, w - weight
    assert float(((error @ h) * error).sum()) == pytest.approx(float(((own @ h) * own).sum()), rel=0.02)


@each_kind
def test_a_grid_is_chosen_by_what_it_costs(name: str) -> None:
    """Of an output whose grids are all llama.cpp's but one, the cheapest of all is no worse than any by itself."""
    weight, gram, factor, grid = case(name, width=256)
    wide, found = weight.T.contiguous(), []
    for tries in ([1.0], [0.9], [1.0, 0.9]):
        state = compensate._State.of(grid)
        part = slice(0, grid.kind.part)
        errors = compensate._round_part(wide[part], factor[part, part], state, 0, tries)
        own = wide[part] - state.values()[part]
        # what is left of the loss once all later columns have made good for it
        left = torch.linalg.inv(torch.linalg.inv(gram)[part, part])
        cost = ((left @ own) * own).sum(0)
        assert torch.allclose(errors.square().sum(0), cost, rtol=1e-2)
        found.append(cost)
    assert torch.allclose(found[2], torch.minimum(found[0], found[1]), rtol=1e-2)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_1"])
def test_d_and_dmin_are_the_least_squares(name: str) -> None:
    weight, gram, _, grid = case(name, width=256)
    state = compensate._State.of(grid)
    wide, block = weight.T.contiguous(), slice(0, state.kind.block)
    pull = gram @ (wide - state.values())
    compensate._solve_block(state, block, gram[block, block], pull[block])
    lower = torch.linalg.cholesky(gram).T.double()  # H = RᵀR
    parts = grid.scales.repeat_interleave(state.kind.part, 1), grid.mins.repeat_interleave(state.kind.part, 1)
    for row in range(len(weight)):
        codes = torch.tensor(grid.kind.levels)[grid.codes[row].int()]
        by_d, by_min = (
            (each * (torch.arange(256) < block.stop)).double() for each in (codes * parts[0][row], -parts[1][row])
        )
        rest = weight[row].double() - grid.weight()[row].double() * (torch.arange(256) >= block.stop)
        design = torch.stack([by_d, by_min] if grid.kind.has_mins else [by_d], 1)
        wanted = torch.linalg.lstsq(lower @ design, (lower @ rest)[:, None]).solution.flatten()
        assert float(state.d[0, row]) == pytest.approx(float(wanted[0]), rel=2e-3)
        if grid.kind.has_mins:
            assert float(state.dmin[0, row]) == pytest.approx(float(wanted[1]), rel=1e-2, abs=1e-4)


def test_blocks_of_zeros_stay_zeros() -> None:
    for name in KINDS:
        weight, gram, factor, _ = case(name, rows=4)
        weight[0] = weight[:, :256] = 0.0
        packed = ggml.quantize(weight.numpy(), name, np.ones(512, dtype=np.float32))
        found = compensate.compensated(weight, gram, factor, unpack(torch.from_numpy(packed), KINDS[name]), 2).weight()
        assert found.isfinite().all()
        assert (found[0] == 0).all()
