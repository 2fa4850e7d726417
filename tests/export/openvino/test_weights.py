import pytest
import torch

from lighten.errors import Failure
from lighten.export.openvino.weights import Stored, fitting_size, keep, rounded
from lighten.model.quantized.packed import Codes


def codes(bits: int, g_idx: torch.Tensor, *, zero: int | None = None, outputs: int = 5) -> Codes:
    dice, groups = torch.Generator().manual_seed(bits), int(g_idx.max()) + 1
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=dice)
    return Codes(
        torch.randint(0, 2**bits, (len(g_idx), outputs), generator=dice),
        (0.05 + torch.rand(groups, outputs, generator=dice)).half(),
        zeros if zero is None else torch.full_like(zeros, zero),
        g_idx,
        bits,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_stand_for_the_weights_of_the_checkpoint(bits: int) -> None:
    found = codes(bits, torch.arange(96) // 32)
    stored = keep(found, "x")
    assert stored.bits == (8 if bits == 8 else 4)
    assert stored.codes.shape == (5, 3, 32) and stored.scales.dtype == torch.float16
    assert torch.equal(stored.weight(), found.weight())


@pytest.mark.parametrize(("bits", "zero"), [(4, 8), (8, 128), (3, 4), (3, 7), (2, 2)])
def test_codes_with_one_zero_point_need_none(bits: int, zero: int) -> None:
    found = codes(bits, torch.arange(96) // 48, zero=zero)
    stored = keep(found, "x")
    assert stored.zeros is None and stored.codes.dtype == torch.int8
    assert torch.equal(stored.weight(), found.weight())


def test_a_zero_point_that_leaves_no_room_stays() -> None:
    found = codes(4, torch.arange(64) // 32, zero=3)
    stored = keep(found, "x")
    assert stored.zeros is not None
    assert torch.equal(stored.weight(), found.weight())


def test_inputs_whose_groups_are_scattered_are_put_in_order() -> None:
    g_idx = (torch.arange(128) // 32)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    found = codes(4, g_idx)
    stored = keep(found, "x")
    assert stored.order is not None and stored.codes.shape == (5, 4, 32)
    assert torch.equal(stored.weight(), found.weight())


def test_a_short_last_group_is_cut_where_all_fit() -> None:
    found = codes(4, torch.arange(576) // 128)
    stored = keep(found, "x")
    assert stored.codes.shape == (5, 9, 64)
    assert torch.equal(stored.weight(), found.weight())


def test_refuses_what_no_constant_holds() -> None:
    with pytest.raises(Failure, match="x has groups that only divide into runs of 2 inputs"):
        keep(codes(4, torch.arange(32) // 2), "x")
    wide = codes(4, torch.arange(32) // 16)
    with pytest.raises(Failure, match="x has codes of 12 bits: OpenVINO has room for 8"):
        keep(Codes(wide.codes, wide.scales, wide.zeros, wide.g_idx, 12), "x")


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 64), (8, None)])
def test_rounding_is_to_the_nearest_code(bits: int, size: int | None, zero_point: bool) -> None:
    """No code of the group is nearer to a weight than its own, but for the clipped ends of a range without zero."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(bits)) + 0.3
    stored = rounded(weight, bits, size, zero_point=zero_point)
    zeros = torch.zeros_like(stored.scales) if stored.zeros is None else stored.zeros.float()
    low = 0 if zero_point else -(2 ** (bits - 1))
    every = torch.arange(low, low + 2**bits).float().view(1, 1, 1, -1)
    values = (every - zeros[..., None]) * stored.scales.float()[..., None]
    nearest = (values - weight.view(*stored.codes.shape, 1)).abs().amin(-1)
    assert torch.allclose((stored.weight() - weight).abs(), nearest.flatten(1), atol=1e-6)


def test_a_row_of_nothing_stays_nothing() -> None:
    for zero_point in (True, False):
        assert not rounded(torch.zeros(2, 32), 4, 16, zero_point=zero_point).weight().any()


def test_scales_that_half_precision_would_round_away_stay_wide() -> None:
    stored = rounded(1e-6 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), 8, None, zero_point=False)
    assert stored.scales.dtype == torch.float32
    assert stored.weight().abs().max() > 1e-7


def test_sizes_of_groups() -> None:
    assert [fitting_size(inputs, 128) for inputs in (256, 576, 1536, 100, 33)] == [128, 64, 128, 4, 33]
    assert isinstance(rounded(torch.randn(2, 33), 4, 16, zero_point=True), Stored)
