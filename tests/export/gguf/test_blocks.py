"""The layouts of ggml's blocks, against ggml itself and against the Python package of llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.export.gguf import ggml
from lighten.model.gguf.blocks import KINDS, Grid, pack, unpack

each_kind = pytest.mark.parametrize("name", KINDS)


@each_kind
def test_what_ggml_writes_is_read_and_written_back(name: str) -> None:
    random = np.random.default_rng(1)
    weight = (random.standard_normal((24, 512)) * random.random((24, 1)) + 0.1).astype(np.float32)
    packed = ggml.quantize(weight, name, random.random(512).astype(np.float32))
    grid = unpack(torch.from_numpy(packed), KINDS[name])
    assert np.array_equal(pack(grid).numpy(), packed)
    assert np.array_equal(grid.weight().numpy(), ggml.dequantize(packed, name, 512))
    assert np.abs(grid.weight().numpy() - weight).mean() < 0.12


@each_kind
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=15, deadline=None)
def test_any_fields_come_back(name: str, seed: int) -> None:
    kind, random = KINDS[name], torch.Generator().manual_seed(seed)
    low, high = kind.numbers.scales if kind.numbers else (1, 1)
    least, most = kind.numbers.mins if kind.numbers else (-1, -1)
    parts, blocks = (3, 512 // kind.part), (3, 512 // kind.block)
    d, dmin = (torch.randn(blocks, generator=random).half() for _ in range(2))
    grid = Grid(
        kind,
        torch.randint(len(kind.levels), (3, 512), generator=random, dtype=torch.uint8),
        torch.randint(low, high + 1, parts, generator=random, dtype=torch.int16),
        torch.randint(least, most + 1, parts, generator=random, dtype=torch.int16),
        d,
        dmin if kind.has_mins else torch.zeros_like(d),
    )
    packed = pack(grid)
    found = unpack(packed, kind)
    for field in ("codes", "scales", "mins", "d", "dmin"):
        assert torch.equal(getattr(found, field), getattr(grid, field)), field
    type = gguf.GGMLQuantizationType[name]
    assert packed.shape == (3, 512 // gguf.GGML_QUANT_SIZES[type][0] * gguf.GGML_QUANT_SIZES[type][1])
    assert np.array_equal(gguf.quants.dequantize(packed.numpy(), type), found.weight().numpy())
