from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import Failure
from lighten.model.quantized.packed import Codes

pytest.importorskip("executorch.exir")

from lighten.export.executorch.inputs import EVENING, Asked, Way
from lighten.export.executorch.linears import CodedLinear, Stored, compensated, keep, rounded, shared


def random_codes(bits: int = 4, group: int = 32, *, outputs: int = 6, groups: int = 3, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    inputs = group * groups
    return Codes(
        torch.randint(0, 1 << bits, (inputs, outputs), generator=generator),
        torch.rand(groups, outputs, generator=generator).half() + 0.1,
        torch.full((groups, outputs), 1 << (bits - 1)),
        torch.arange(inputs) // group,
        bits,
    )


@given(st.integers(2, 4), st.sampled_from([32, 64, 128]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_codes_are_kept_and_only_scales_lose_digits(bits: int, group: int, mixed: bool, odd: bool, seed: int) -> None:
    found = random_codes(bits, group, seed=seed)
    if odd:  # zero points, and scales below zero
        numbers = torch.Generator().manual_seed(seed)
        zeros = torch.randint(0, 1 << bits, found.zeros.shape, generator=numbers)
        scales = found.scales * (torch.randint(0, 2, found.scales.shape, generator=numbers) * 2 - 1)
        found = Codes(found.codes, scales, zeros, found.g_idx, bits)
    assert (keep(found, "a").offsets is not None) == odd
    if mixed:
        order = torch.randperm(len(found.g_idx), generator=torch.Generator().manual_seed(seed))
        found = Codes(found.codes, found.scales, found.zeros, found.g_idx[order], bits)
    stored, wanted = keep(found, "a"), found.weight()
    assert stored.codes.dtype == torch.int8 and stored.size == group and stored.bits == 4
    assert torch.equal(stored.scales, stored.scales.bfloat16().float())
    # bfloat16 has 8 bits: half a unit of the last is a 256th of the value at most
    assert ((stored.weight() - wanted).abs() <= wanted.abs() / 256 + 1e-6).all()
    assert (stored.scales > 0).all() and int(stored.codes.min()) >= -8 and int(stored.codes.max()) <= 7


def test_what_has_no_form_is_refused() -> None:
    for wrong, said in ((random_codes(8), "8 bits"), (random_codes(group=16), "groups of 16")):
        with pytest.raises(Failure, match=said):
            keep(wrong, "layer")


@given(st.sampled_from([(4, 32), (4, 64), (8, None)]), st.integers(0, 1000))
def test_rounding_is_to_the_nearest_code(kind: tuple[int, int | None], seed: int) -> None:
    bits, size = kind
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    stored = rounded(weight, bits, size)
    assert (stored.scales > 0).all()
    step = stored.scales.repeat_interleave(stored.size, 1)
    # a scale that bfloat16 made smaller clips the farthest weight by 8 times a 256th of a step
    assert ((stored.weight() - weight).abs() <= step * 0.54).all()
    half = 1 << (bits - 1)
    assert int(stored.codes.min()) >= -half and int(stored.codes.max()) < half


def test_a_row_of_zeros_stays_zero() -> None:
    good = random_codes()
    none = keep(Codes(good.codes, torch.zeros_like(good.scales), good.zeros, good.g_idx, 4), "a")
    for stored in (rounded(torch.zeros(2, 64), 4, 32), rounded(torch.zeros(2, 64), 8, None), none):
        assert not stored.weight().any() and (stored.scales > 0).all()


def test_the_modules_compute_what_is_stored() -> None:
    from lighten.export.executorch.linears import CodedEmbedding, CodedLinear
    from lighten.model.executorch_library import load

    load("a test")
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 64, generator=generator), torch.randn(1, 3, 64, generator=generator)
    stored = rounded(weight, 4, 32)
    order = torch.randperm(64, generator=generator)
    turned = Stored(stored.codes[:, order], stored.scales, order, 4)
    shifted = Stored(stored.codes, stored.scales, None, 4, torch.randn(16, 2, generator=generator))
    divided = torch.rand(64, generator=generator) + 0.1
    evened = Stored(stored.codes[:, order], stored.scales, order, 4, shifted.offsets, divided)
    for each in (stored, turned, shifted, evened):
        wanted = inputs @ each.weight().t() + 1
        found = CodedLinear(each, torch.ones(16))(inputs)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # inputs have 8 bits
    table = rounded(weight, 8, None)
    assert torch.allclose(CodedEmbedding(table)(torch.tensor([[3, 1]])), table.weight()[[3, 1]][None])


WAYS = {
    "together": Way(),
    "center": Way(torch.linspace(-1, 1, 96)),
    "levels": Way(levels=torch.tensor([1.0, 64.0, 1.0]).repeat_interleave(32)),
    "edge": Way(torch.linspace(-1, 1, 96), torch.tensor([1.0, 64.0, 2.0]).repeat_interleave(32), edge=2.5),
    "aside": Way(torch.linspace(-1, 1, 96), aside=torch.tensor([40, 3, 41])),
}


def loud_inputs() -> torch.Tensor:
    """Returns inputs of which a group is always loud, and some others far out."""
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 96, generator=numbers)
    inputs[:, 32:64] *= 64
    inputs[torch.arange(40), torch.randint(0, 32, (40,), generator=numbers)] = 200.0
    return inputs


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("evened", [False, True])
def test_a_linear_sees_what_its_way_shows(name: str, bits: int, mixed: bool, evened: bool) -> None:
    from lighten.model.executorch_library import load

    load("a test")
    found = random_codes(seed=3)
    if mixed:
        order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
        found = Codes(found.codes, found.scales, found.zeros + 1, found.g_idx[order], 4)
    stored = keep(found, "a") if bits == 4 else rounded(found.weight(), 8, None)
    if evened:
        stored = replace(stored, even=torch.rand(96, generator=torch.Generator().manual_seed(4)) + 0.5)
    way, inputs, bias = WAYS[name], loud_inputs(), torch.randn(6, generator=torch.Generator().manual_seed(2))
    if way.aside is not None if bits == 4 else way.levels is not None:
        with pytest.raises(ValueError, match=r"one scale|share a scale"):
            CodedLinear(stored, bias, way)
        return
    linear = CodedLinear(stored, bias, way)
    placed = Asked(bits, stored.size, stored.order, stored.even).placed(inputs)
    seen = way.shown(placed)
    wanted = seen @ stored.coded().T + bias
    if stored.offsets is not None:
        wanted += placed.reshape(40, 3, 32).sum(2) @ stored.offsets.T
    assert torch.allclose(linear(inputs), wanted, rtol=1e-4, atol=3e-3 * float(wanted.abs().max()))  # ties
    with shared():  # twice, so that the second takes what the first computed
        first = linear(inputs)
        assert torch.equal(linear(inputs), first) and torch.equal(CodedLinear(stored, bias, way)(inputs), first)


def test_linears_with_the_same_inputs_round_them_once() -> None:
    from lighten.model.executorch_library import load

    load("a test")
    weight, inputs = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)), loud_inputs()
    ways = [Way(torch.ones(96), edge=3.0), Way(torch.ones(96), edge=3.0), Way(torch.zeros(96), edge=3.0), Way()]
    linears = [CodedLinear(rounded(weight, 4, 32), None, way) for way in ways]
    divided = [torch.full((96,), number) for number in (2.0, 2.0, 3.0)]
    evened = [CodedLinear(rounded(weight, 8, None, each), None, Way(torch.ones(96))) for each in divided]

    def operators(model: torch.nn.Module, name: str = "choose_qparams") -> int:
        traced = torch.export.export(model, (inputs,))
        return sum(name in str(node.target) for node in traced.graph.nodes)

    class Both(torch.nn.Module):
        def __init__(self, count: int, given: Sequence[CodedLinear] = linears) -> None:
            super().__init__()
            self.linears = torch.nn.ModuleList(given[:count])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            with shared():
                return torch.stack([linear(inputs) for linear in self.linears])

    assert [operators(Both(count)) for count in (1, 2, 3, 4)] == [2, 2, 4, 5]
    assert [operators(Both(count, evened)) for count in (1, 2, 3)] == [1, 1, 2]
    assert [operators(Both(count, evened), "mul") for count in (1, 2, 3)] == [1, 1, 2]


def test_errors_of_a_head_are_made_good_by_other_columns() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 64, generator=numbers) @ torch.randn(64, 64, generator=numbers)
    weight, gram = torch.randn(300, 64, generator=numbers), inputs.T @ inputs
    found, plain = compensated(weight, gram), rounded(weight, 8, None)
    assert found.codes.shape == (300, 64) and found.codes.dtype == torch.int8 and found.scales.shape == (300, 1)
    assert (found.scales > 0).all()
    errors = [float((inputs @ (each.weight() - weight).T).square().mean()) for each in (found, plain)]
    assert errors[0] < 0.7 * errors[1]
    inputs[:, 3] = 0  # as in a short text: another may have it
    with pytest.raises(ArithmeticError, match="always zero"):
        compensated(weight, inputs.T @ inputs)


@given(st.sampled_from([(4, 32), (8, None)]), st.floats(0.01, 3), st.integers(0, 1000))
def test_a_weight_of_divided_inputs_comes_back_within_half_a_step(
    kind: tuple[int, int | None], spread: float, seed: int
) -> None:
    bits, size = kind
    numbers = torch.Generator().manual_seed(seed)
    weight, even = torch.randn(5, 64, generator=numbers), (torch.randn(64, generator=numbers) * spread).exp()
    stored = rounded(weight, bits, size, even)
    step = stored.scales.repeat_interleave(stored.size, 1) / even
    most = 0.5001 if size is None else 0.54  # see above
    assert ((stored.weight() - weight).abs() <= step * most + 1e-6 * weight.abs()).all()
    order = torch.randperm(64, generator=numbers)
    turned = replace(stored, codes=stored.codes[:, order], order=order, even=even[order])
    assert size is not None or torch.equal(turned.weight(), stored.weight())
    plain = rounded(weight * even, bits, size)
    assert torch.equal(stored.codes, plain.codes) and torch.equal(stored.coded(), plain.coded())


@pytest.mark.parametrize("by_gptq", [False, True])
def test_evened_inputs_make_a_product_with_a_loud_one_more_accurate(by_gptq: bool) -> None:
    from lighten.model.executorch_library import load

    load("a test")
    numbers = torch.Generator().manual_seed(0)
    loudness = torch.ones(64)
    loudness[5] = 100.0
    inputs, weight = torch.randn(400, 64, generator=numbers) * loudness, torch.randn(300, 64, generator=numbers)
    deviation = loudness**EVENING
    even = deviation / deviation.log().mean().exp()
    wanted, gram, bias = inputs @ weight.T + 1, inputs.T @ inputs, torch.ones(300)

    def error(even: torch.Tensor | None) -> float:
        stored = compensated(weight, gram, even) if by_gptq else rounded(weight, 8, None, even)
        return float((CodedLinear(stored, bias)(inputs) - wanted).square().mean().sqrt())

    plain, evened = error(None), error(even)
    assert evened < plain / 2.5
    assert evened < 0.02 * float(wanted.std())


def test_codes_of_a_head_make_good_errors_on_divided_inputs() -> None:
    """GPTQ against the Gram of divided inputs is GPTQ of that weight and those inputs."""
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 64, generator=numbers) @ torch.randn(64, 64, generator=numbers)
    weight, even = torch.randn(300, 64, generator=numbers), torch.rand(64, generator=numbers) + 0.3
    found = compensated(weight, inputs.T @ inputs, even)
    other = compensated(weight * even, (inputs / even).T @ (inputs / even))
    assert (found.codes != other.codes).float().mean() < 1e-3 and torch.equal(found.scales, other.scales)
    errors = [
        float((inputs @ (each.weight() - weight).T).square().mean()) for each in (found, rounded(weight, 8, None, even))
    ]
    assert errors[0] < 0.7 * errors[1]
