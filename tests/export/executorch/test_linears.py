import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import Failure
from lighten.model.quantized.packed import Codes

pytest.importorskip("executorch.exir")

from lighten.export.executorch.linears import CodedLinear, Stored, keep, levelled, rounded
from lighten.export.executorch.loudness import listen, steps


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
    for each in (stored, turned, shifted):
        wanted = inputs @ each.weight().t() + 1
        found = CodedLinear(each, torch.ones(16))(inputs)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # inputs have 8 bits
    table = rounded(weight, 8, None)
    assert torch.allclose(CodedEmbedding(table)(torch.tensor([[3, 1]])), table.weight()[[3, 1]][None])


@given(st.integers(0, 1000), st.booleans())
def test_levels_change_no_code_and_no_weight(seed: int, mixed: bool) -> None:
    found = random_codes(seed=seed)
    if mixed:
        order = torch.randperm(len(found.g_idx), generator=torch.Generator().manual_seed(seed))
        found = Codes(found.codes, found.scales, found.zeros, found.g_idx[order], found.bits)
    stored = keep(found, "a")
    loud = torch.rand(stored.scales.shape[1], generator=torch.Generator().manual_seed(seed)) * 100
    level = levelled(stored, steps(loud))
    assert torch.equal(level.codes, stored.codes) and torch.equal(level.weight(), stored.weight())
    assert torch.equal(level.scales, level.scales.bfloat16().float())


def loud_inputs() -> torch.Tensor:
    """Returns inputs of which a group is always loud, and some others far out."""
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 96, generator=numbers)
    inputs[:, 32:64] *= 64
    inputs[torch.arange(40), torch.randint(0, 32, (40,), generator=numbers)] = 200.0
    return inputs


def test_levels_and_parts_leave_less_of_an_error() -> None:
    from lighten.model.executorch_library import load

    load("a test")
    inputs, stored = loud_inputs(), keep(random_codes(seed=3), "a")
    weight = stored.weight()
    weight[:, 32:64] /= 64  # as in a model, whose weights are quiet where its inputs are loud
    stored = rounded(weight, 4, 32)
    exact = inputs @ stored.weight().T
    groups = inputs.abs().reshape(40, 3, 32).amax(2).mean(0)
    level = levelled(stored, steps(groups))
    aside = levelled(stored, steps(groups), torch.arange(40, 64))
    assert torch.equal(aside.weight(), level.weight())
    assert torch.allclose(inputs @ level.weight().T, exact, rtol=1e-4, atol=1e-3)
    errors = [
        float((CodedLinear(each, None, apart=apart)(inputs) - exact).square().mean())
        for each, apart in ((stored, False), (level, False), (level, True), (aside, False), (aside, True))
    ]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1] and errors[4] < 0.5 * errors[3] < errors[1]


def test_what_linears_hear_is_what_they_are_given() -> None:
    linear = torch.nn.Linear(96, 4)

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            found: torch.Tensor = linear(inputs[input_ids])
            return found

    inputs, order = loud_inputs(), torch.arange(95, -1, -1)
    heard = listen(Model(), torch.arange(40).reshape(2, 20), {linear: (order, 32)})[linear]
    means = inputs[:, order].abs().mean(0)
    assert heard.aside is not None and len(heard.aside) == 32 and torch.allclose(heard.inputs, means, rtol=1e-5)
    others = torch.ones(96, dtype=torch.bool).index_fill(0, heard.aside, False)
    assert means[heard.aside].min() >= means[others].max()
    sized = (inputs[:, order].abs() * others).reshape(40, 3, 32)
    assert torch.allclose(heard.groups, sized.amax(2).mean(0), rtol=1e-5)
    level = sized / steps(heard.groups)[:, None]
    assert heard.crest == pytest.approx(float((level.amax((1, 2)) / level.mean((1, 2))).mean()), rel=1e-5)
