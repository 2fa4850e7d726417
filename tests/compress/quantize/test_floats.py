"""4-bit floats in blocks against brute force, and against compressed-tensors' own arithmetic."""

import itertools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from lighten.compress.quantize import float_grid, formats
from lighten.compress.quantize.float_grid import Mxfp4Scales, Nvfp4Scales, Scales
from lighten.compress.quantize.floats import blocks, compensated, settle
from lighten.compress.quantize.linears import Findings, Linears
from lighten.compress.quantize.quantized_layers import relative_error
from lighten.model import e2m1
from lighten.numerics.damping import inverse_factor
from lighten.pipeline.steps import open_step
from tests.compress.quantize.test_gptq import problem

METHODS = ("mxfp4", "nvfp4")


def scales_of(method: str, weight: torch.Tensor) -> Scales:
    return Nvfp4Scales.of(weight) if method == "nvfp4" else Mxfp4Scales()


def made(weight: torch.Tensor, gram: torch.Tensor | None, largest: float | None = None, **settings: Any) -> Linears:
    """Returns linears with these weights that were rounded, what was stored in `targets`' place."""
    return Linears(["a", "b"], [weight[:8], weight[8:]], 4, torch.bfloat16, Findings(), gram, "a", None, largest)


def test_nearest_is_the_nearest_value_and_breaks_ties_to_even_codes() -> None:
    weights = torch.cat([torch.linspace(-7, 7, 2801), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    found = e2m1.nearest(weights)
    values = torch.tensor([*e2m1.VALUES, *(-value for value in e2m1.VALUES)])
    assert torch.equal((found - weights).abs(), (values - weights[:, None]).abs().amin(1))
    assert found[-7:].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert torch.equal(found, cast_to_fp4(weights.clone()))


def test_powers_of_two() -> None:
    found = e2m1.powers(torch.arange(255, dtype=torch.uint8))
    assert found.tolist() == [2.0 ** (exponent - 127) for exponent in range(255)]


def test_codes_there_and_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 3)
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)
    assert e2m1.pack(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[0x21]]
    values = e2m1.values_of(codes)
    assert torch.equal(e2m1.values_of(e2m1.codes_of(values)), values)
    assert int(e2m1.codes_of(torch.tensor(-0.0))) == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_search_finds_the_best_of_its_scales(method: str) -> None:
    weight, gram = problem(out=6)
    scales, w = scales_of(method, weight), weight.t().contiguous()
    found = float_grid.searched(w, scales, gram)
    usual = float_grid.usual(w, scales)
    size = scales.size
    for block, out in itertools.product(range(64 // size), range(6)):
        rows = slice(block * size, (block + 1) * size)
        h, part = gram[rows, rows].double(), w[rows, out].double()
        lost = {}
        for number in range(1, 127 if method == "nvfp4" else 253):
            step = float(scales.value(torch.tensor(number, dtype=torch.int32)))
            error = e2m1.nearest((part / step).float()).double() * step - part
            lost[number] = float(error @ h @ error)
        near = {int(scales.moved(usual[block, out], step)) for step in scales.steps}
        assert lost[int(found[block, out])] == pytest.approx(min(lost[number] for number in near), rel=1e-4)
        assert lost[int(found[block, out])] <= 1.05 * min(lost.values())  # of all that can be stored


def test_settling_a_block_counts_what_later_columns_cannot_make_good() -> None:
    weight, gram = problem(out=5, width=48)
    scales = Nvfp4Scales.of(weight)
    factor, _ = inverse_factor(gram, 0.05)
    found = settle(weight.t()[:16].contiguous(), factor[:16, :16], scales)
    inverse = (factor.t() @ factor).double()[:16, :16]
    remains = torch.linalg.inv(inverse)  # the Schur complement of the later columns
    for out in range(5):
        first = scales.usual(weight[out, :16].abs().max())
        lost = {}
        for number in {int(scales.moved(first, step)) for step in scales.steps}:
            step, w = float(scales.value(torch.tensor(number, dtype=torch.int32))), weight[out, :16].double().clone()
            rounded = torch.empty(16, dtype=torch.double)
            for j in range(16):
                rounded[j] = float(e2m1.nearest((w[j] / step).float())) * step
                error = (w[j] - rounded[j]) / factor[j, j]
                w[j + 1 :] -= error * factor[j, j + 1 : 16]
            change = rounded - weight[out, :16].double()
            lost[number] = float(change @ remains @ change)
        assert lost[int(found[out])] == pytest.approx(min(lost.values()), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_columns_go_in_order_of_activation(method: str) -> None:
    """Optimal brain quantization in float64, in order of falling diag(H), with the scales that were found."""
    weight, gram = problem(out=12)
    spread = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    gram = gram * spread * spread[:, None]
    found = compensated(weight, gram, scales_of(method, weight), 0.05)
    by_block = found.scales.value(found.numbers).double()
    left = weight.t().double().clone()
    inverse = torch.linalg.inv(gram.double() + 0.05 * gram.diagonal().mean() * torch.eye(64))
    expected = torch.empty_like(left)
    for j in gram.diagonal().argsort(descending=True).tolist():
        step = by_block[j // found.scales.size]
        expected[j] = e2m1.nearest((left[j] / step).float()).double() * step
        error = (left[j] - expected[j]) / inverse[j, j]
        left -= inverse[:, j, None] * error
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]
    assert (found.weight().t().double() - expected).abs().gt(1e-6).double().mean() < 0.01  # ties apart


@pytest.mark.parametrize("method", METHODS)
def test_each_step_loses_less(method: str) -> None:
    weight, gram = problem(out=64, width=192, tokens=600)
    scales, w = scales_of(method, weight), weight.t().contiguous()
    by_largest = float_grid.rounded(w, scales, float_grid.usual(w, scales)).weight()
    by_moments = float_grid.rounded(w, scales, float_grid.searched(w, scales, gram)).weight()
    fed_back = compensated(weight, gram, scales, 0.05).weight()
    errors = [relative_error(weight, each, gram) for each in (by_largest, by_moments, fed_back)]
    assert errors[0] > errors[1] > 1.2 * errors[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounding", ["gptq", "scales", "nearest"])
def test_is_stored_as_compressed_tensors_reads_it(method: str, rounding: str) -> None:
    """Bit for bit: NVFP4's divisor is a power of two, so that no weight is rounded again in bfloat16."""
    weight, gram = problem(out=24)
    linears = made(weight * 0.03, gram)
    step = open_step("quantize", {"method": method, "rounding": rounding})
    stored = blocks(step, linears)
    config = step.config({}, [])["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(config)
    compressor = BaseCompressor.get_value_from_registry(step.layout)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    for each in stored:
        expected = {"weight_packed": torch.uint8, "weight_scale": torch.uint8}
        if method == "nvfp4":
            expected |= {"weight_scale": torch.float8_e4m3fn, "weight_global_scale": torch.float32}
        assert {name: tensor.dtype for name, tensor in each.tensors.items()} == expected
        opened = compressor.decompress(dict(each.tensors), scheme)["weight"]
        assert torch.equal(opened.float(), each.weight)
    assert len({float(each.tensors.get("weight_global_scale", torch.ones(1))) for each in stored}) == 1


def test_the_usual_scale_is_that_of_compressed_tensors() -> None:
    weight = torch.randn(16, 320, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 1, 320)
    for method in METHODS:
        scales = scales_of(method, weight)
        step = open_step("quantize", {"method": method})
        args = QuantizationScheme.model_validate(step.config({}, [])["config_groups"]["group_0"]).weights
        assert args
        by_block = weight.view(16, -1, scales.size)
        divisor = None if scales.divisor is None else torch.tensor([scales.divisor])
        expected, _ = calculate_qparams(by_block.amin(-1), by_block.amax(-1), args, divisor)
        found = scales.value(float_grid.usual(weight.t().contiguous(), scales)).t() * (scales.divisor or 1)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_stay_and_dead_inputs_go(method: str) -> None:
    weight, gram = problem(out=24)
    gram[5], gram[:, 5] = 0, 0
    weight[:, 1::2] = 0
    step = open_step("quantize", {"method": method})
    linears = made(weight, gram)
    rounded = torch.cat([each.weight for each in blocks(step, linears)])
    assert torch.equal(rounded[:, 1::2], torch.zeros(24, 32))
    assert linears.findings.warnings == []
    assert (rounded[:, 6] != 0).any()


def test_inputs_get_the_scale_of_the_largest() -> None:
    weight, gram = problem(out=24)
    step = open_step("quantize", {"method": "nvfp4", "activations": True})
    assert step.reads_largest
    for largest, expected in ((10.5, 448 * 6 / 10.5), (0.0, 448 * 6)):  # an expert that no token reached
        for each in blocks(step, made(weight, gram, largest)):
            assert float(each.tensors["input_global_scale"]) == pytest.approx(expected)
    assert not open_step("quantize", {"method": "mxfp4", "activations": True}).reads_largest


def test_a_gram_that_cannot_be_inverted_is_said() -> None:
    weight, gram = problem(out=24)
    linears = made(weight, gram * torch.nan)
    step = open_step("quantize", {"method": "nvfp4"})
    found = torch.cat([each.weight for each in blocks(step, linears)])
    nearest = torch.cat(
        [
            each.weight
            for each in blocks(open_step("quantize", {"method": "nvfp4", "rounding": "nearest"}), made(weight, None))
        ]
    )
    assert torch.equal(found, nearest)
    assert linears.findings.fallbacks == ["a"]
    assert "rounded to nearest" in linears.findings.warnings[0]


def test_tiny_and_large_weights_have_scales() -> None:
    for factor in (1e-30, 1e-8, 1e8, 1e30):
        weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)) * factor
        for method in METHODS:
            scales = scales_of(method, weight)
            w = weight.t().contiguous()
            found = float_grid.rounded(w, scales, float_grid.usual(w, scales))
            assert relative_error(weight / factor, found.weight() / factor, torch.eye(32)) < 0.03
            stored = formats.float_blocks(found)
            again = e2m1.weight(
                stored.tensors["weight_packed"],
                e2m1.scales(stored.tensors["weight_scale"], stored.tensors.get("weight_global_scale")),
            )
            assert torch.equal(again, stored.weight)
    assert Nvfp4Scales.of(torch.zeros(2, 32)).divisor == 1
