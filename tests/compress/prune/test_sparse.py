"""Zeros among weights: the order of removal, SparseGPT's update, and masks that survive a quantizer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.patterns import zeros_of
from lighten.compress.prune import sparse
from lighten.compress.prune.amounts import parse_count, parse_pattern
from lighten.compress.quantize.awq import clip
from lighten.compress.quantize.gptq import gptq
from lighten.compress.quantize.grid import rtn


def problem(outputs: int = 12, width: int = 32, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns inputs, their Gram and a weight matrix; inputs are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.linspace(0.2, 3.0, width)[torch.randperm(width, generator=generator)]
    mixing = torch.randn(width, width, generator=generator) * sizes
    inputs = torch.randn(rows, width, generator=generator) @ mixing
    return inputs, inputs.t() @ inputs, torch.randn(outputs, width, generator=generator)


def loss(inputs: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    return float((inputs @ (before - after).t()).square().sum())


@given(st.floats(0.05, 0.95), st.integers(2, 20), st.integers(2, 40))
@settings(deadline=None, max_examples=50)
def test_rows_keep_exactly_as_many_as_asked(sparsity: float, rows: int, width: int) -> None:
    kept = sparse.keep_largest(torch.rand(rows, width), sparsity)
    assert (kept.sum(1) == width - int(sparsity * width)).all()


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 4)]), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_a_pattern_keeps_the_largest_of_every_group(pattern: tuple[int, int], groups: int) -> None:
    count, of = pattern
    scores = torch.rand(5, of * groups)
    kept = sparse.keep_largest(scores, 0.0, f"{count}:{of}")
    for row, mask in zip(scores, kept, strict=True):
        for start in range(0, len(row), of):
            best = set(torch.argsort(row[start : start + of], descending=True)[:count].tolist())
            assert set(mask[start : start + of].nonzero().flatten().tolist()) == best


def test_magnitude_compares_the_whole_matrix_and_wanda_each_output() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [10.0, 20.0, -30.0, 40.0]])
    assert sparse.magnitude(weight, 0.5).count_nonzero(1).tolist() == [0, 4]
    found = sparse.wanda(weight, torch.tensor([100.0**2, 1.0, 1.0, 1.0]), 0.5)
    assert found.tolist() == [[1.0, 0.0, 0.0, -4.0], [10.0, 0.0, 0.0, 40.0]]


def test_a_global_threshold_is_that_of_all_weights_together() -> None:
    matrices = [torch.randn(50, 40).bfloat16(), 3 * torch.randn(60, 40).bfloat16()]
    counted = sparse.Magnitudes()
    for matrix in matrices:
        counted.add(matrix)
    threshold = counted.threshold(0.4)
    everything = torch.cat([matrix.flatten() for matrix in matrices]).float().abs()
    assert abs(float((everything < threshold).float().mean()) - 0.4) < 0.01
    assert threshold == pytest.approx(float(everything.sort().values[int(0.4 * len(everything))]), rel=1e-6)
    left = [float((sparse.above(matrix, threshold) != 0).float().mean()) for matrix in matrices]
    assert left[0] < left[1]


def test_sparsegpt_of_one_output_is_the_closed_form_column_by_column() -> None:
    """After column j is removed, the later weights are those of least squares given all the earlier ones."""
    _, gram, weight = problem(outputs=1, width=8)
    damping = 0.01 * float(gram.diagonal().mean())
    found = sparse.sparsegpt(weight, sparse.prepare(gram, 0.01), 0.5)
    h = gram.double() + damping * torch.eye(8).double()
    w = weight[0].double().clone()
    mask = found[0] != 0
    for j in range(8):
        if mask[j]:
            continue
        later = list(range(j + 1, 8))
        # minimise (w' - w) H (w' - w)ᵀ over the later weights, with w'[j] = 0 and the earlier ones as they are
        if later:
            change = torch.linalg.solve(h[later][:, later], h[later][:, [j]] @ w[[j]])
            w[later] += change
        w[j] = 0
    assert torch.allclose(found[0].double(), w, rtol=1e-3, atol=1e-4)


def test_sparsegpt_removes_what_costs_least_first() -> None:
    """With a diagonal Gram nothing can be repaired: the mask is that of W² · H."""
    weight, sizes = torch.randn(6, 16), torch.rand(16) * 5 + 0.1
    found = sparse.sparsegpt(weight, sparse.prepare(sizes.diag(), 1e-8), 0.5)
    scores = (weight.square() * sizes).flatten()
    expected = torch.zeros(96, dtype=torch.bool)
    expected[scores.topk(48).indices] = True
    assert torch.equal(found.flatten() != 0, expected)
    assert torch.allclose(found[found != 0], weight[found != 0], rtol=1e-5)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern: str | None) -> None:
    inputs, gram, weight = problem(outputs=64, width=256, rows=2000)
    lost = [
        loss(inputs, weight, sparse.sparsegpt(weight, sparse.prepare(gram), 0.5, pattern)),
        loss(inputs, weight, sparse.wanda(weight, gram.diagonal(), 0.5, pattern)),
        loss(inputs, weight, sparse.magnitude(weight, 0.5, pattern)),
    ]
    assert lost == sorted(lost) and lost[0] < 0.7 * lost[1]


def test_sparsegpt_keeps_the_pattern_and_the_share() -> None:
    _, gram, weight = problem(outputs=16, width=256, rows=1000)
    found = sparse.sparsegpt(weight, sparse.prepare(gram), 0.6)
    for start in (0, 128):
        assert (found[:, start : start + 128] == 0).float().mean() == pytest.approx(0.6, abs=0.001)
    patterned = sparse.sparsegpt(weight, sparse.prepare(gram), 0.0, "2:4")
    assert ((patterned.view(16, -1, 4) != 0).sum(-1) == 2).all()


def test_inputs_that_are_always_zero_get_no_weight() -> None:
    inputs, _, weight = problem()
    inputs[:, [3, 7]] = 0
    found = sparse.sparsegpt(weight, sparse.prepare(inputs.t() @ inputs), 0.25)
    assert torch.equal(found[:, [3, 7]], torch.zeros(len(weight), 2))
    assert torch.isfinite(found).all()


def test_a_gram_without_a_factor_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match="not positive definite"):
        sparse.prepare(torch.full((8, 8), torch.nan))


def test_only_a_pruned_matrix_has_a_mask() -> None:
    weight = torch.randn(32, 32)
    weight[0, 0] = 0
    assert zeros_of([weight]) is None
    pruned = sparse.magnitude(weight, 0.5)
    found = zeros_of([weight, pruned])
    assert torch.equal(found, torch.cat([torch.zeros(32, 32, dtype=torch.bool), pruned == 0]))


@pytest.mark.parametrize(("sym", "bits", "desc_act"), itertools.product([True, False], [3, 4], [True, False]))
def test_gptq_leaves_the_zeros_of_a_pruned_matrix(sym: bool, bits: int, desc_act: bool) -> None:
    inputs, gram, weight = problem(outputs=24, width=128, rows=1500)
    pruned = sparse.sparsegpt(weight, sparse.prepare(gram), 0.0, "2:4")
    settings_ = {"bits": bits, "group_size": 32, "sym": sym, "desc_act": desc_act, "damp_percent": 0.05}
    found = gptq(pruned, gram, gone=zeros_of([pruned]), **settings_).weight()
    assert (found[pruned == 0] == 0).all()
    plain = rtn(pruned, bits, 32, sym).weight()
    assert loss(inputs, pruned, found) < loss(inputs, pruned, plain)
    blind = gptq(pruned, gram, **settings_).weight()
    assert not (blind[pruned == 0] == 0).all()  # without the mask they are filled


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_to_nearest_and_awq_leave_zeros_by_themselves(bits: int, sym: bool) -> None:
    _, gram, weight = problem(outputs=24, width=128)
    pruned = sparse.magnitude(weight, 0.5)
    assert (rtn(pruned, bits, 32, sym).weight()[pruned == 0] == 0).all()
    if bits == 4 and not sym:
        assert (clip(pruned, gram, bits=4, group_size=32, sym=False).weight()[pruned == 0] == 0).all()


@pytest.mark.parametrize("pattern", ["4:2", "2-4", "0:4", "2:4:8", "4:4"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="N:M"):
        parse_pattern(pattern)


def test_numbers_of_weights_are_read() -> None:
    assert [parse_count(text) for text in ("100M", "1.1B", "5000", "2k")] == [10**8, 11 * 10**8, 5000, 2000]
    with pytest.raises(ValueError, match="100M"):
        parse_count("many")
