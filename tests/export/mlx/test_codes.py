"""Codes in MLX's form, against MLX itself."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.errors import Failure, RequestError
from lighten.export.mlx.codes import kept, kept_floats
from lighten.export.mlx.groups import largest
from lighten.model import e2m1
from lighten.model.quantized.packed import Codes

mx: Any = pytest.importorskip("mlx.core")


def array(tensor: torch.Tensor) -> Any:
    """Returns MLX's array of a tensor; its packed words are unsigned."""
    if tensor.dtype == torch.uint32:
        return mx.array(tensor.view(torch.int32).numpy().view(np.uint32))
    return mx.array(tensor.numpy())


def unpacked(found: Any) -> torch.Tensor:
    """Returns the weight by MLX, in float32: the runtime computes so for quality."""
    wide = {name: each.float() if each.is_floating_point() else each for name, each in found.tensors.items()}
    parts = {name: array(each) for name, each in wide.items()}
    values = mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **found.settings)
    return torch.from_numpy(np.array(values.astype(mx.float32)))


def codes(bits: int, groups: list[int], outputs: int, seed: int, zero: int | None = None) -> Codes:
    """Returns random codes; the group of every run of 32 inputs is given."""
    generator = torch.Generator().manual_seed(seed)
    g_idx = torch.tensor(groups).repeat_interleave(32)
    shape = (max(groups) + 1, outputs)
    zeros = torch.randint(0, 1 << bits, shape, generator=generator) if zero is None else torch.full(shape, zero)
    return Codes(
        torch.randint(0, 1 << bits, (len(g_idx), outputs), generator=generator, dtype=torch.int32),
        (torch.rand(shape, generator=generator) + 0.1).half(),
        zeros.int(),
        g_idx,
        bits,
    )


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    runs=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    outputs=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_mlx_unpacks_the_same_weights(bits: int, runs: list[int], outputs: int, seed: int) -> None:
    groups = [number for number, length in enumerate(runs) for _ in range(length)]
    source = codes(bits, groups, outputs, seed)
    found = kept(source, torch.float32, "x")
    assert found.off == 0
    assert torch.equal(unpacked(found), source.weight())


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 9))
def test_words_are_those_that_mlx_packs(bits: int, group: int, seed: int) -> None:
    weight = mx.array(np.random.default_rng(seed).normal(size=(3, 256)).astype(np.float32))
    words, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    values = np.array(mx.dequantize(words, scales, biases, group_size=group, bits=bits))
    steps, least = (np.array(each).repeat(group, 1) for each in (scales, biases))
    whole = torch.from_numpy(np.rint((values - least) / steps).astype(np.int32)).t()
    source = Codes(whole, torch.ones(256 // group, 3), torch.zeros(256 // group, 3), torch.arange(256) // group, bits)
    found = kept(source, torch.float32, "x")
    assert np.array_equal(np.array(words), found.tensors["weight"].view(torch.int32).numpy().view(np.uint32))
    assert found.settings == {"group_size": group, "bits": bits, "mode": "affine"}


def test_a_grid_with_its_zero_in_the_middle_is_exact_in_16_bits_and_another_is_told() -> None:
    middle = codes(4, [0, 0, 1, 1], 8, 0, zero=8)
    assert kept(middle, torch.float16, "x").off == 0
    assert torch.equal(unpacked(kept(middle, torch.float16, "x")), middle.weight())
    odd = codes(4, [0, 0, 1, 1], 8, 0)
    found = kept(odd, torch.float16, "x")
    assert 0 < found.off < 15 * 2**-11
    assert ((unpacked(found) - odd.weight()) / odd.steps()).abs().max() <= found.off * 1.01


def test_the_largest_group_that_fits() -> None:
    assert largest([0] * 256) == 128
    assert largest([0] * 128 + [1] * 64) == 64
    assert largest([0] * 96 + [1] * 96) == 32
    assert largest([0] * 48 + [1] * 48) is None
    assert largest([0] * 40) is None


def test_scattered_groups_and_small_ones_are_refused() -> None:
    scattered = codes(4, [0, 1], 8, 0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RequestError, match=r"groups of x are scattered.*desc_act: static"):
        kept(Codes(scattered.codes, scattered.scales, scattered.zeros, scattered.g_idx[order], 4), torch.float16, "x")
    small = codes(4, [0, 1], 8, 0)
    with pytest.raises(Failure, match="x has groups that cannot be cut into 32"):
        kept(Codes(small.codes, small.scales, small.zeros, torch.arange(64) // 48, 4), torch.float16, "x")


def test_mxfp4_has_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (4, 48), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (4, 3), generator=generator, dtype=torch.uint8)
    found = kept_floats({"weight_packed": packed, "weight_scale": scales})
    assert found is not None and found.settings["mode"] == "mxfp4"
    parts = {name: array(each) for name, each in found.tensors.items()}
    values = np.array(mx.dequantize(parts["weight"], parts["scales"], **found.settings).astype(mx.float32))
    assert torch.equal(torch.from_numpy(values), e2m1.weight(packed, e2m1.powers(scales)))
    assert kept_floats({"weight_packed": packed.int(), "weight_scale": scales}) is None
    assert kept_floats({"qweight": packed}) is None
