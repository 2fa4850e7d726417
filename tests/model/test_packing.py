import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.model.packing import BITS, pack, pack_gptq, unpack, unpack_gptq


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_round_trip(bits: int, blocks: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (32 * blocks, columns), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (bits * blocks, columns)
    assert torch.equal(unpack(words, bits, len(codes)), codes.int())


@settings(deadline=None)
@given(st.sampled_from(BITS), st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_is_one_little_endian_bit_stream(bits: int, values: list[int]) -> None:
    values = [value % 2**bits for value in values]
    stream = sum(value << (bits * index) for index, value in enumerate(values))
    words = pack(torch.tensor(values)[:, None], bits)[:, 0].tolist()
    assert [word & 0xFFFFFFFF for word in words] == [stream >> (32 * index) & 0xFFFFFFFF for index in range(bits)]


def test_part_of_a_period() -> None:
    codes = torch.arange(8)[:, None]
    assert torch.equal(unpack(pack(codes, 4), 4, 8), codes.int())
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack(codes, 3)


@pytest.mark.parametrize("bits", BITS)
def test_a_linear_comes_back(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator).half().float()
    zeros = torch.randint(1, 2**bits, (2, 32), generator=generator)
    g_idx = torch.arange(64) // 32
    weight = unpack_gptq(pack_gptq(codes, scales, zeros, g_idx, bits), bits)
    expected = ((codes - zeros[g_idx]).float() * scales[g_idx]).t()
    assert torch.equal(weight, expected)
