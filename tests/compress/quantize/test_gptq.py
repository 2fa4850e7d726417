"""GPTQ against a slow reading of the paper: one column at a time, the inverse updated by elimination."""

import pytest
import torch

from lighten.compress.quantize.gptq import gptq
from lighten.compress.quantize.grid import dequantize, quantize, search
from lighten.compress.quantize.quantized_layers import relative_error


def problem(out: int = 24, width: int = 64, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(tokens, width, generator=generator) @ mix
    return weight, inputs.t() @ inputs


def reference(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, group_size: int, sym: bool, damp: float
) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, in float64: after each column, condition the rest on its error.

    The inverse Hessian of the remaining columns is updated by Gaussian elimination (equation 3 of the paper), with no
    Cholesky factor and no blocks.
    """
    w = weight.double().clone()
    h = gram.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    diagonal = [0.0] * w.shape[1]
    eliminated = inverse.clone()
    for j in range(w.shape[1]):  # the importance of every column is fixed by the order, before any rounding
        diagonal[j] = float(eliminated[j, j])
        eliminated = eliminated - torch.outer(eliminated[:, j], eliminated[j]) / eliminated[j, j]
    done = torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % group_size == 0:
            stop = j + group_size
            importance = 1 / torch.tensor(diagonal[j:stop]) ** 2
            scale, zero = search(w[:, j:stop].t().float(), bits, sym, importance)
        codes = quantize(w[:, j].float(), scale, zero, bits)
        done[:, j] = dequantize(codes, scale, zero).double()
        error = (w[:, j] - done[:, j]) / inverse[j, j]
        w[:, j:] -= torch.outer(error, inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return done


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_agrees_with_the_paper(bits: int, group_size: int, sym: bool) -> None:
    weight, gram = problem()
    result = gptq(weight, gram, bits=bits, group_size=group_size, sym=sym, desc_act=False, damp_percent=0.01)
    expected = reference(weight, gram, bits, 64 if group_size == -1 else group_size, sym, 0.01)
    # a value that lies between two codes may fall either way in float32: nearly all agree, and the error is the same
    agree = (result.weight() - expected).abs() < 1e-3
    assert agree.float().mean() > 0.99
    ours, theirs = (relative_error(weight, each.float(), gram) for each in (result.weight(), expected))
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("width", [128, 192, 384])
def test_blocks_do_not_show(width: int) -> None:
    """Widths of one, one and a half, and three blocks agree with the reference, which has no blocks."""
    weight, gram = problem(width=width, tokens=3 * width)
    result = gptq(weight, gram, bits=4, group_size=32, sym=True, desc_act=False, damp_percent=0.01)
    expected = reference(weight, gram, 4, 32, True, 0.01).float()
    ours, theirs = relative_error(weight, result.weight(), gram), relative_error(weight, expected, gram)
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("desc_act", [True, False, "static"])
def test_beats_rounding_to_nearest(desc_act: bool | str) -> None:
    weight, gram = problem(out=64, width=128)
    result = gptq(weight, gram, bits=3, group_size=32, sym=True, desc_act=desc_act, damp_percent=0.01)
    nearest = []
    for group in weight.t().split(32):
        scale, zero = search(group, 3, True)
        nearest.append(dequantize(quantize(group, scale, zero, 3), scale, zero))
    assert relative_error(weight, result.weight(), gram) < 0.8 * relative_error(weight, torch.cat(nearest).t(), gram)


def test_desc_act_permutes_the_problem() -> None:
    """Rounding in order of activation is rounding the permuted problem in order, and groups follow the order."""
    weight, gram = problem()
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    settings = {"bits": 4, "group_size": 32, "sym": True, "damp_percent": 0.01}
    ours = gptq(weight, gram, desc_act=True, **settings)
    sorted_ = gptq(weight[:, order], gram[order][:, order], desc_act=False, **settings)
    assert torch.equal(ours.weight()[:, order], sorted_.weight())
    assert torch.equal(ours.g_idx[order], torch.arange(64) // 32)


def test_static_groups_are_of_neighbours() -> None:
    """One group is searched before any rounding in both orders, and several keep their places."""
    weight, gram = problem()
    settings = {"bits": 4, "sym": True, "damp_percent": 0.01}
    whole = [gptq(weight, gram, group_size=-1, desc_act=order, **settings) for order in (True, "static")]
    assert torch.equal(whole[0].weight(), whole[1].weight())
    parts = gptq(weight, gram, group_size=32, desc_act="static", **settings)
    assert torch.equal(parts.g_idx, torch.arange(64) // 32)
    falling = torch.argsort(gram.diagonal(), descending=True, stable=True)
    first = int(falling[0])  # the first that is rounded bears no errors of others
    scale = parts.scales[first // 32]
    assert torch.equal(parts.codes[first].float(), quantize(weight[:, first], scale, parts.zeros[first // 32], 4))


def test_inputs_that_are_always_zero_get_weight_zero() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    result = gptq(weight, gram, bits=4, group_size=32, sym=True, desc_act=False, damp_percent=0.01)
    assert torch.equal(result.weight()[:, 5], torch.zeros(24))
