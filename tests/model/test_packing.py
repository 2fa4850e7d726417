from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lighten.model.packing import (
    BITS,
    gptq_zeros,
    pack,
    pack_awq,
    pack_compressed,
    pack_gptq,
    unpack,
)
from lighten.model.quantized.awq import Awq
from lighten.model.quantized.gptq import Gptq
from lighten.process.isolate import run_isolated


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
    weight = Gptq({"bits": bits}).weight(pack_gptq(codes, scales, zeros, g_idx, bits))
    expected = ((codes - zeros[g_idx]).float() * scales[g_idx]).t()
    assert torch.equal(weight, expected)


def linear(bits: int, groups: int, size: int, outputs: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Returns random codes `[in, out]`, scales and zero points `[groups, out]` of one linear."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (groups * size, outputs), generator=generator)
    scales = (torch.rand(groups, outputs, generator=generator) + 0.01).half().float()
    return codes, scales, torch.randint(0, 2**bits, (groups, outputs), generator=generator)


def meant(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Returns the weight `[out, in]` that codes stand for, one element at a time."""
    size = len(codes) // len(scales)
    weight = torch.empty(codes.shape[1], codes.shape[0])
    for i in range(codes.shape[0]):
        for o in range(codes.shape[1]):
            weight[o, i] = (int(codes[i, o]) - int(zeros[i // size, o])) * float(scales[i // size, o])
    return weight


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_an_awq_linear_comes_back(groups: int, size: int, words: int, seed: int) -> None:
    codes, scales, zeros = linear(4, groups, size, 8 * words, seed)
    packed = pack_awq(codes, scales, zeros)
    assert packed["qweight"].shape == (groups * size, words)
    assert packed["qzeros"].shape == (groups, words)
    assert {each.dtype for each in packed.values()} == {torch.int32, torch.float16}
    assert torch.equal(Awq({}).weight(packed), meant(codes, scales, zeros))


AWQ_SIZES = [(1, 8, 8), (2, 16, 64), (4, 32, 24)]


def as_gptqmodel_packs(payload: dict[str, Any], report: Callable[..., None]) -> None:
    """Packs the same codes with GPTQModel, and reads ours back with it."""
    from gptqmodel.quantization.awq.utils import packing_utils

    for number, (groups, size, outputs) in enumerate(payload["sizes"]):
        codes, scales, zeros = linear(4, groups, size, outputs, number)
        words, zero_words = packing_utils.pack_awq(codes, zeros, 4)
        ours = pack_awq(codes, scales, zeros)
        read = packing_utils.dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"].float(), 4, size)
        found = {"qweight": words, "qzeros": zero_words, "read": read}
        save_file({name: each.contiguous() for name, each in found.items()}, f"{payload['folder']}/{number}")


def test_awq_is_packed_as_gptqmodel_packs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "3")
    run_isolated("tests.model.test_packing:as_gptqmodel_packs", {"folder": str(tmp_path), "sizes": AWQ_SIZES})
    for number, (groups, size, outputs) in enumerate(AWQ_SIZES):
        codes, scales, zeros = linear(4, groups, size, outputs, number)
        ours, theirs = pack_awq(codes, scales, zeros), load_file(tmp_path / str(number))
        assert torch.equal(ours["qweight"], theirs["qweight"])
        assert torch.equal(ours["qzeros"], theirs["qzeros"])
        assert torch.equal(theirs["read"].t(), meant(codes, scales, zeros))


@pytest.mark.parametrize("outputs", [1, 7, 33, 64])
@pytest.mark.parametrize("bits", BITS)
def test_pack_quantized_is_packed_as_compressed_tensors_packs_it(bits: int, outputs: int) -> None:
    codes, scales, zeros = linear(bits, 3, 20, outputs, bits)
    packed = pack_compressed(codes, scales.bfloat16(), zeros, bits, sym=False)
    middle = 2 ** (bits - 1)
    signed, points = ((each - middle).to(torch.int8).t().contiguous() for each in (codes, zeros))
    assert torch.equal(packed["weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(packed["weight_zero_point"], pack_to_int32(points, bits, packed_dim=0))
    assert torch.equal(packed["weight_scale"], scales.t().bfloat16())
    shape = torch.Size(packed["weight_shape"].tolist())
    assert shape == (outputs, 60)
    assert torch.equal(unpack_from_int32(packed["weight_packed"], bits, shape), signed)
    if bits != 4 or outputs > 8:  # its reader of 4-bit codes takes no single word along the first dimension
        assert torch.equal(unpack_from_int32(packed["weight_zero_point"], bits, points.shape, 0), points)
    symmetric = pack_compressed(codes, scales, zeros, bits, sym=True)
    assert set(symmetric) == {"weight_packed", "weight_scale", "weight_shape"}
    assert torch.equal(symmetric["weight_packed"], packed["weight_packed"])
    assert all(each.is_contiguous() for each in packed.values())


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_point_of_zero_comes_back(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (2, 32), generator=torch.Generator().manual_seed(bits))
    zeros[0, :3] = torch.tensor([0, 2**bits - 1, 0])
    one = pack(torch.ones(32 // bits, 1, dtype=torch.int32), bits) if bits != 3 else 0
    less = zeros if bits != 3 else (zeros - 1) & 7
    stored = (pack(less.t().contiguous(), bits) - one).t().contiguous()  # as GPTQModel writes the first version
    assert torch.equal(gptq_zeros(stored, bits, 32), zeros)
    assert torch.equal(gptq_zeros(pack(zeros.t().contiguous(), bits).t(), bits, 32, less_one=False), zeros)
