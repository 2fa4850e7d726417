"""Linears in ggml's blocks: weights against the Python package of llama.cpp, derivatives against brute force."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.nn import functional

from lighten.compress.polish.blocks import Back, BlockLinear, Blocks
from lighten.model.gguf.blocks import KINDS, Grid, pack, unpack, with_halves
from lighten.model.gguf.turns import deinterleave

each_kind = pytest.mark.parametrize("name", KINDS)
OUT, IN = 6, 512


def grid_of(name: str, seed: int = 0) -> Grid:
    """Returns a matrix with random fields; its weights are about as large as those of a model."""
    kind, random = KINDS[name], torch.Generator().manual_seed(seed)
    low, high = kind.numbers.scales if kind.numbers else (1, 1)
    least, most = kind.numbers.mins if kind.numbers else (-1, -1)
    parts, blocks = (OUT, IN // kind.part), (OUT, IN // kind.block)
    d, dmin = (torch.randn(blocks, generator=random).mul(2.0 / kind.levels[-1] / high).half() for _ in range(2))
    return Grid(
        kind,
        torch.randint(len(kind.levels), (OUT, IN), generator=random, dtype=torch.uint8),
        torch.randint(low, high + 1, parts, generator=random, dtype=torch.int16),
        torch.randint(least, most + 1, parts, generator=random, dtype=torch.int16),
        d,
        dmin if kind.has_mins else torch.zeros_like(d),
    )


def dequantized(packed: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


def alone(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def linear_of(*names: str, back: Back = alone, bias: torch.Tensor | None = None) -> BlockLinear:
    return BlockLinear([Blocks(grid_of(name, number)) for number, name in enumerate(names)], back, bias)


@each_kind
def test_it_begins_as_the_file_has_it(name: str) -> None:
    linear, packed = linear_of(name), pack(grid_of(name))
    assert torch.equal(linear.stored(), dequantized(packed, name))
    assert torch.equal(linear.weight, linear.stored())
    halves = [*linear.matrices[0].rounded().half()]
    assert torch.equal(with_halves(packed, KINDS[name], halves), packed)
    inputs = torch.randn(3, IN)
    with torch.no_grad():
        assert torch.equal(linear(inputs), functional.linear(inputs, linear.stored()))


@each_kind
def test_derivatives_are_those_through_the_dense_weight(name: str) -> None:
    bias = torch.randn(OUT)
    linear, grid = linear_of(name, bias=bias), grid_of(name)
    (matrix,) = linear.matrices
    with torch.no_grad():
        matrix.theta.normal_(0, 0.1)
    inputs, wanted = torch.randn(2, 5, IN, requires_grad=True), torch.randn(2, 5, OUT)
    (linear(inputs) * wanted).sum().backward()

    theta = matrix.theta.detach().double().requires_grad_()
    again = inputs.detach().double().requires_grad_()
    block, part = grid.kind.block, grid.kind.part
    levels = torch.tensor(grid.kind.levels)[grid.codes.int()].double()
    scale, least = (each.double().repeat_interleave(part, 1) for each in (grid.scales, grid.mins))
    d = (grid.d.double() * theta[0].exp()).repeat_interleave(block, 1)
    weight = d * scale * levels
    if grid.kind.has_mins:
        weight = weight - (grid.dmin.double() * theta[1].exp()).repeat_interleave(block, 1) * least
    (functional.linear(again, weight, bias.double()) * wanted).sum().backward()
    assert matrix.theta.grad is not None and theta.grad is not None
    assert inputs.grad is not None and again.grad is not None
    largest = float(theta.grad.abs().max())
    assert torch.allclose(matrix.theta.grad.double(), theta.grad, rtol=1e-4, atol=1e-5 * largest)
    assert torch.allclose(inputs.grad.double(), again.grad, rtol=1e-4, atol=1e-4)


@each_kind
def test_derivatives_by_brute_force(name: str) -> None:
    """W is linear in d and in dmin: doubling one in the bytes changes ΣG·W by d · ∂/∂d. The package reads the bytes."""
    grid, kind = grid_of(name), KINDS[name]
    packed, matrix, by_weight = pack(grid), Blocks(grid), torch.randn(OUT, IN)
    steps = matrix.steps(stored=False)
    (found,) = torch.autograd.grad(steps, [matrix.theta], matrix.by_steps(by_weight))
    own = [*matrix.first.half()]
    before = dequantized(packed, name).double()
    for number, half in enumerate(own):
        halves = [half * 2 if number == each else other for each, other in enumerate(own)]
        change = (dequantized(with_halves(packed, kind, halves), name).double() - before) * by_weight
        wanted = change.view(OUT, -1, kind.block).sum(-1)
        assert torch.allclose(found[number].double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@each_kind
def test_other_halves_and_nothing_else(name: str) -> None:
    kind, grid = KINDS[name], grid_of(name)
    packed = pack(grid)
    given = [each * 1.5 + 0.01 for each in ([grid.d, grid.dmin] if kind.has_mins else [grid.d])]
    made = with_halves(packed, kind, given)
    found = unpack(made, kind)
    assert torch.equal(found.d, given[0]) and (not kind.has_mins or torch.equal(found.dmin, given[1]))
    assert all(torch.equal(getattr(found, field), getattr(grid, field)) for field in ("codes", "scales", "mins"))
    changed = (made != packed).view(-1, kind.size).any(0)
    assert int(changed.sum()) <= 2 * len(given)


def test_a_linear_of_several_matrices_in_another_order() -> None:
    """As where a file has the rows of heads in another order, and what a model joins apart."""

    def back(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([deinterleave(tensors[0], 3), tensors[1] / 2, tensors[2]], 0)

    linear = linear_of("Q4_K", "Q6_K", "Q5_1", back=back)
    assert (linear.out_features, linear.in_features) == (3 * OUT, IN)
    inputs, wanted = torch.randn(4, IN), torch.randn(4, 3 * OUT)
    (linear(inputs) * wanted).sum().backward()
    dense = [matrix.weight(matrix.steps(stored=True), torch.float32).requires_grad_() for matrix in linear.matrices]
    (functional.linear(inputs, back(dense)) * wanted).sum().backward()
    for matrix, each in zip(linear.matrices, dense, strict=True):
        assert each.grad is not None and matrix.theta.grad is not None
        (theirs,) = torch.autograd.grad(matrix.steps(stored=False), [matrix.theta], matrix.by_steps(each.grad))
        assert torch.allclose(matrix.theta.grad, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_judged_is_what_is_stored() -> None:
    linear = linear_of("Q4_K")
    (matrix,) = linear.matrices
    with torch.no_grad():
        matrix.theta.normal_(0, 0.1)
        packed = with_halves(pack(grid_of("Q4_K")), KINDS["Q4_K"], [*matrix.rounded().half()])
        assert torch.equal(linear(torch.eye(IN)), dequantized(packed, "Q4_K").t())
    zero: Any = grid_of("Q2_K")
    zero.d.zero_()
    with torch.no_grad():
        (other := Blocks(zero)).theta.fill_(1.0)
    assert np.array_equal(other.rounded()[0], np.zeros((OUT, IN // 256)))
