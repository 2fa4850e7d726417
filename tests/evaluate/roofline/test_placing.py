"""Places under the roof, by hand."""

from typing import Any

import pytest

from lighten.evaluate.roofline.peaks import Peaks
from lighten.evaluate.roofline.placing import arithmetic, point
from lighten.model.traffic import Traffic

ROOFS = Peaks("cpu", [(4_000_000, 100.0), (100_000_000, 20.0)], {"float32": 200.0, "int8": None}, 0.05, "2026-01-01")
MODEL = Traffic(weights=200_000_000, products=80_000_000, head=20_000_000, attention=1000, cache_bytes=500)


def row(**changes: Any) -> dict[str, Any]:
    return {"batch": 1, "prompt": 100, "generate": 64, "decode_tok_s": 50.0, "prefill_tok_s": 1000.0, **changes}


def placed(traffic: Traffic = MODEL, **changes: Any) -> dict[str, Any]:
    found = point(traffic, row(**changes), ROOFS, "float32", "torch")
    assert found
    return found


def test_decoding_reads_every_weight_and_the_cache_for_a_token() -> None:
    found = placed()
    flops, read = 2 * 100e6 + 1000 * 132, 200e6 + 500 * 132
    assert found["flops_per_token"] == flops and found["bytes_per_token"] == read
    assert found["intensity"] == pytest.approx(flops / read)
    assert found["gb_s"] == pytest.approx(read * 50 / 1e9)
    assert found["gflop_s"] == pytest.approx(flops * 50 / 1e9)
    assert found["roof_gflop_s"] == pytest.approx(20 * flops / read)
    assert found["share"] == pytest.approx(found["gb_s"] / 20)
    assert found["bound"] == "memory" and found["context"] == 132 and found["note"] is None


def test_a_batch_shares_the_weights_and_not_the_cache() -> None:
    assert placed(batch=4)["bytes_per_token"] == 200e6 / 4 + 500 * 132


def test_prefill_reads_the_weights_once_and_is_bound_by_arithmetic() -> None:
    found = placed()["prefill"]
    assert found["bytes_per_token"] == 200e6 / 100 + 1000
    assert found["flops_per_token"] == 2 * 80e6 + 2 * 20e6 / 100 + 1000 * 50.5
    assert found["bound"] == "compute" and found["roof_gflop_s"] == 200
    every = point(MODEL, row(), ROOFS, "float32", "onnxruntime")
    assert every and every["prefill"]["flops_per_token"] == 2 * 100e6 + 1000 * 50.5
    parts = point(MODEL, row(prompt=1024), ROOFS, "float32", "llama.cpp")
    assert parts and parts["prefill"]["bytes_per_token"] == 200e6 / 512 + 1000


def test_a_model_that_lies_in_a_cache_is_said_to() -> None:
    small = Traffic(4_000_000, 1_800_000, 200_000, 0, 0)
    found = placed(small, decode_tok_s=15_000.0)
    assert found["gb_s"] == pytest.approx(60) and found["bound"] == "cache"
    assert found["share"] == pytest.approx(0.6) and "cache" in found["note"]


def test_a_share_above_one_is_explained() -> None:
    found = placed(decode_tok_s=150.0)
    assert found["share"] > 1 and found["note"].startswith("above the roof: a cache held part")
    fast = placed(prefill_tok_s=5000.0)["prefill"]
    assert fast["share"] > 1 and "faster type of number" in fast["note"]


def test_a_type_that_was_not_measured_takes_the_highest_roof() -> None:
    found = point(MODEL, row(), ROOFS, "int8", "llama.cpp")
    assert found and found["prefill"]["roof_gflop_s"] == 200


def test_no_speed_no_place() -> None:
    assert point(MODEL, row(decode_tok_s=None), ROOFS, "float32", "torch") is None
    assert placed(prefill_tok_s=None)["prefill"] is None


@pytest.mark.parametrize(
    ("runtime", "dtype", "expected"),
    [
        ("torch", "bfloat16", "bfloat16"),
        ("llama.cpp", "all F32", "float32"),
        ("llama.cpp", "F16", "float32"),
        ("llama.cpp", "BF16", "bfloat16"),
        ("llama.cpp", "Q4_K - Medium", "int8"),
        ("onnxruntime", "int4", "int8"),
        ("onnxruntime", "float32", "float32"),
    ],
)
def test_the_type_that_is_multiplied_in(runtime: str, dtype: str, expected: str) -> None:
    assert arithmetic(runtime, dtype) == expected


@pytest.mark.parametrize(
    ("runtime", "dtype", "expected"),
    [
        ("torch", "bfloat16", "bfloat16"),
        ("torch", "float16", "float16"),
        ("llama.cpp", "all F32", "float32"),
        ("llama.cpp", "F16", "float16"),
        ("llama.cpp", "BF16", "bfloat16"),
        ("llama.cpp", "Q4_K - Medium", "int8"),
        ("onnxruntime", "int4", "float16"),
    ],
)
def test_a_gpu_multiplies_in_other_types(runtime: str, dtype: str, expected: str) -> None:
    assert arithmetic(runtime, dtype, "cuda") == arithmetic(runtime, dtype, "cuda:1") == expected
