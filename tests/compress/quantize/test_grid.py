import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighten.compress.quantize.grid import (
    NEAR,
    SHRINKS,
    SIGNED_BELOW,
    GroupSize,
    Symmetry,
    dequantize,
    full_range,
    quantize,
    rtn,
    search,
    storable,
)


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([True, False, "positive"]), st.integers(0, 2**31 - 1))
def test_codes_fit_their_bits_and_zero_points_can_be_stored(bits: int, sym: Symmetry, seed: int) -> None:
    w = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed)) * 10 ** float(seed % 9 - 6)
    scale, zero = search(w, bits, sym)
    codes = quantize(w, scale, zero, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert ((zero >= 1) & (zero <= 2**bits - 1)).all()
    assert torch.equal(scale, scale.half().float())
    assert (scale != 0).all()
    if sym:
        assert (zero == 2 ** (bits - 1)).all()
    assert sym is True or (scale > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False, "positive"])
def test_full_range_clips_nothing_by_more_than_half_a_step_and_with_few_bits_one_end_by_a_step(
    bits: int, sym: Symmetry
) -> None:
    w = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    scale, zero = full_range(w, bits, sym)
    error = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).abs()
    stored = 2 ** (bits - 1) * 2.0**-11  # what rounding the scale to float16 moves the last code by, in steps
    most = 1.0 if sym is True and bits < SIGNED_BELOW else 0.5
    assert (error <= scale.abs() * (most + stored) * 1.0001).all()
    largest = w.abs().argmax(0, keepdim=True)
    assert (error.gather(0, largest)[0] <= scale.abs() * (0.5 + stored) * 1.0001).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_the_best_of_its_candidates(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    w, weight = torch.randn(32, 6, generator=generator), torch.rand(32, generator=generator)
    widest, zero = full_range(w, bits, True)
    scale, _ = search(w, bits, True, weight)
    for column in range(6):

        def error(shrink: float, column: int = column) -> float:
            candidate = storable(widest[column] * shrink)
            total = 0.0
            for row in range(32):
                code = min(max(round(float(w[row, column] / candidate)) + 2 ** (bits - 1), 0), 2**bits - 1)
                total += float(weight[row]) * (float(candidate) * (code - 2 ** (bits - 1)) - float(w[row, column])) ** 2
            return total

        best = min(SHRINKS, key=error)
        best = min((best, *(best + step for step in NEAR)), key=error)
        found = float(scale[column] / widest[column])
        assert error(found) == pytest.approx(error(best), rel=1e-3)
    assert torch.equal(zero, torch.full_like(zero, 2 ** (bits - 1)))


def nearest(values: list[float], bits: int, sym: bool, kind: torch.dtype) -> tuple[list[int], float, int]:
    """Rounds one group to the grid that just holds it, with plain numbers; returns codes, scale and zero point."""
    top = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (high - low) / top
    if sym:
        few = (low if -low >= high else high) / -(2 ** (bits - 1))
        scale = few if bits < SIGNED_BELOW else max(-low, high) / (top / 2)
    zero = 2 ** (bits - 1) if sym else min(max(round(-low / scale), 1), top)
    scale = float(torch.tensor(scale).to(kind))
    codes = [min(max(round(value / scale + zero), 0), top) for value in values]
    return codes, scale, zero


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1, "tensor"])
def test_rounding_to_nearest_is_that_of_a_plain_loop(
    group_size: GroupSize, bits: int, sym: bool, kind: torch.dtype
) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits)) + 0.3
    found = rtn(weight, bits, group_size, sym, kind)
    size = 32 if group_size == 32 else 64
    assert found.scales.shape == found.zeros.shape == (64 // size, 5)
    assert torch.equal(found.scales, found.scales.to(kind).float())
    assert torch.equal(found.g_idx, torch.arange(64) // size)
    off = 0
    for row in range(5):
        for group in range(64 // size):
            part = weight[row, group * size : (group + 1) * size]
            if group_size == "tensor":
                whole, scale, zero = nearest(weight.flatten().tolist(), bits, sym, kind)
                codes = whole[row * 64 : (row + 1) * 64]
            else:
                codes, scale, zero = nearest(part.tolist(), bits, sym, kind)
            assert float(found.scales[group, row]) == pytest.approx(
                scale, rel=2**-7 if kind == torch.bfloat16 else 1e-3
            )
            assert int(found.zeros[group, row]) == zero
            here = found.codes[group * size : (group + 1) * size, row].tolist()
            off += sum(abs(ours - theirs) for ours, theirs in zip(here, codes, strict=True))
            spread = (found.weight()[row, group * size : (group + 1) * size] - part).abs()
            most = 1.0 if sym is True and bits < SIGNED_BELOW else 0.5
            assert spread.max() <= (most + 2 ** (bits - 1) * torch.finfo(kind).eps) * abs(scale) * 1.001
    assert off <= 2  # values that lie between two codes, or a scale that does, may fall either way in float32


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_groups_searched_at_once_are_those_searched_one_by_one(sym: bool, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w, importance = torch.randn(6, 32, 7, generator=generator), torch.rand(6, 32, generator=generator)
    scale, zero = search(w, 3, sym, importance if weighted else None)
    for group in range(6):
        alone = search(w[group], 3, sym, importance[group] if weighted else None)
        assert torch.equal(scale[group], alone[0])
        assert torch.equal(zero[group], alone[1])


def test_outputs_are_those_of_the_whole() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
    found = rtn(weight, 4, 32, False)
    assert torch.equal(found.outputs(3, 9).weight(), found.weight()[3:9])
