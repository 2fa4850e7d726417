"""AWQ against what it stands for: the error of the layer's outputs on real inputs."""

import pytest
import torch

from lighten.compress.quantize import fold
from lighten.compress.quantize.awq import CLIPS, clip, output_error, search_scale
from lighten.compress.quantize.grid import dequantize, full_range, quantize, rtn
from tests.compress.quantize.test_gptq import problem


def lost(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    change = (rounded - weight).double()
    return float(torch.trace(change @ gram.double() @ change.t()))


def outliers(out: int = 48, width: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram of inputs some channels of which are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    loud = torch.ones(width)
    loud[::16] = 30.0
    inputs = torch.randn(300, width, generator=generator) * loud
    return weight, inputs.t() @ inputs


def after_scaling(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, bits: int = 4, group: int = 32
) -> float:
    return lost(weight, rtn(weight * scale, bits, group, False).weight() / scale, gram)


def test_output_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, change = torch.randn(100, 32, generator=generator), torch.randn(32, 7, generator=generator)
    expected = float((inputs.double() @ change.double()).square().sum())
    assert output_error(change, inputs.t() @ inputs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("seed", range(4))
def test_a_scale_never_makes_it_worse(bits: int, group_size: int, seed: int) -> None:
    for weight, gram in (problem(48, seed=seed), outliers(seed=seed)):
        scale = search_scale(weight, gram, bits=bits, group_size=group_size, sym=False, repeats=1, head_dim=1)
        assert (scale > 0).all()
        ours, plain = (after_scaling(weight, gram, each, bits, group_size) for each in (scale, torch.ones(64)))
        assert ours <= plain * 1.01  # the search compares products in bfloat16


def test_loud_channels_are_scaled_up_and_errors_halve() -> None:
    weight, gram = outliers()
    scale = search_scale(weight, gram, bits=4, group_size=32, sym=False, repeats=1, head_dim=1)
    loud = torch.zeros(64, dtype=torch.bool)
    loud[::16] = True
    assert scale[loud].min() > 2 * scale[~loud].max()
    assert after_scaling(weight, gram, scale) < 0.5 * after_scaling(weight, gram, torch.ones(64))


def test_heads_that_repeat_a_channel_share_its_scale() -> None:
    weight, gram = outliers()
    scale = search_scale(weight, gram, bits=4, group_size=32, sym=False, repeats=4, head_dim=8)
    heads = scale.reshape(2, 4, 8)
    assert not torch.equal(scale, torch.ones(64))
    assert torch.equal(heads, heads[:, :1].expand(-1, 4, -1))


def test_inputs_that_are_always_zero_keep_their_scale() -> None:
    weight, gram = outliers()
    gram[5], gram[:, 5] = 0, 0
    scale = search_scale(weight, gram, bits=4, group_size=32, sym=False, repeats=1, head_dim=1)
    assert scale[5] == 1
    assert torch.isfinite(scale).all()
    silent = search_scale(weight, torch.zeros(64, 64), bits=4, group_size=32, sym=False, repeats=1, head_dim=1)
    assert torch.equal(silent, torch.ones(64))


def test_nothing_changes_where_nothing_helps() -> None:
    """Weights that lie on the grid are rounded without error as they are."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight, (_, gram) = (codes - 8) * 0.25, outliers()
    scale = search_scale(weight, gram, bits=4, group_size=32, sym=False, repeats=1, head_dim=1)
    assert torch.equal(scale, torch.ones(64))
    assert torch.equal(clip(weight, gram, bits=4, group_size=32, sym=False).weight(), weight)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_clipping_never_makes_it_worse(bits: int, group_size: int, sym: bool) -> None:
    for seed in range(3):
        weight, gram = problem(24, seed=seed)
        found = clip(weight, gram, bits=bits, group_size=group_size, sym=sym)
        plain = rtn(weight, bits, group_size, sym)
        for row in range(len(weight)):  # each output on its own
            ours, theirs = (lost(weight[row : row + 1], each.weight()[row : row + 1], gram) for each in (found, plain))
            assert ours <= theirs * 1.001
        assert lost(weight, found.weight(), gram) < 0.99 * lost(weight, plain.weight(), gram)
        assert found.codes.max() <= 2**bits - 1
        assert torch.equal(found.scales, found.scales.half().float())


@pytest.mark.parametrize("sym", [True, False])
def test_clipping_is_the_best_fraction_of_one_group_after_the_other(sym: bool) -> None:
    """Every output and fraction by itself, the error of the whole row each time."""
    weight, gram = problem(6, 16, 40)
    found = clip(weight, gram, bits=3, group_size=4, sym=sym).weight()
    expected = rtn(weight, 3, 4, sym).weight().clone()
    for row in range(6):
        for start in range(0, 16, 4):
            own = weight[row, start : start + 4]
            trials = []
            for fraction in CLIPS:
                scale, zero = full_range((own * fraction)[:, None], 3, sym)
                trial = expected[row].clone()
                trial[start : start + 4] = dequantize(quantize(own, scale, zero, 3), scale, zero)
                trials.append((lost(weight[row : row + 1], trial[None], gram), trial))
            expected[row] = min(trials, key=lambda each: each[0])[1]
    assert torch.allclose(found, expected)


def test_a_gram_of_no_use_leaves_rounding_to_nearest() -> None:
    weight, gram = outliers()
    broken = torch.full_like(gram, torch.nan)
    scale = search_scale(weight, broken, bits=4, group_size=32, sym=False, repeats=1, head_dim=1)
    assert torch.equal(scale, torch.ones(64))
    assert torch.equal(
        clip(weight, broken, bits=4, group_size=32, sym=False).weight(), rtn(weight, 4, 32, False).weight()
    )


def test_shared_is_the_mean_over_the_heads_that_repeat_a_channel() -> None:
    values = torch.arange(12.0)
    expected = [(0 + 3) / 2, (1 + 4) / 2, (2 + 5) / 2] * 2 + [(6 + 9) / 2, (7 + 10) / 2, (8 + 11) / 2] * 2
    assert fold.shared(values, 2, 3).tolist() == expected
    assert torch.equal(fold.shared(values, 1, 3), values)
