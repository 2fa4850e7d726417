import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighten.compress.grid import SHRINKS, dequantize, full_range, quantize, search, storable


@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 2**31 - 1))
def test_codes_fit_their_bits_and_zero_points_can_be_stored(bits: int, sym: bool, seed: int) -> None:
    w = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed)) * 10 ** float(seed % 9 - 6)
    scale, zero = search(w, bits, sym)
    codes = quantize(w, scale, zero, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert ((zero >= 1) & (zero <= 2**bits - 1)).all()
    assert torch.equal(scale, scale.half().float())
    assert (scale > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_full_range_clips_nothing_by_more_than_half_a_step(bits: int, sym: bool) -> None:
    w = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    scale, zero = full_range(w, bits, sym)
    error = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).abs()
    stored = 2 ** (bits - 1) * 2.0**-11  # what rounding the scale to float16 moves the last code by, in steps
    assert (error <= scale * (0.5 + stored) * 1.0001).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_the_best_of_its_candidates(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    w, weight = torch.randn(32, 6, generator=generator), torch.rand(32, generator=generator)
    widest, zero = full_range(w, bits, True)
    scale, _ = search(w, bits, True, weight)
    for column in range(6):
        errors = {}
        for shrink in SHRINKS:
            candidate = storable(widest[column] * shrink)
            total = 0.0
            for row in range(32):
                code = min(max(round(float(w[row, column] / candidate)) + 2 ** (bits - 1), 0), 2**bits - 1)
                total += float(weight[row]) * (float(candidate) * (code - 2 ** (bits - 1)) - float(w[row, column])) ** 2
            errors[float(candidate)] = total
        assert errors[float(scale[column])] == pytest.approx(min(errors.values()), rel=1e-4)
    assert torch.equal(zero, torch.full_like(zero, 2 ** (bits - 1)))
