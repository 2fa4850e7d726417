"""Bits where they matter: what is predicted is what happens, and a budget is kept to the byte."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.patterns import ignored
from lighten.compress.quantize.bits import WIDTHS, losses
from lighten.compress.quantize.gptq import gptq
from lighten.errors import RequestError
from lighten.model.sensitivity import Sensitivity
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.compress.quantize.test_gptq import problem

IGNORE = ("model.layers.0.mlp.*",)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("damp", [0.01, 0.05])
def test_losses_are_close_to_what_gptq_loses(group_size: int, damp: float) -> None:
    weight, gram = problem(64, 128, 400)
    step = open_step("quantize", {"group_size": group_size, "damp_percent": damp, "budget": {"bits": 4}})
    predicted = losses(weight, gram, step, torch.float16)
    assert tuple(predicted) == WIDTHS
    damped = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(128)
    for bits in WIDTHS:
        found = gptq(
            weight, gram, bits=bits, group_size=group_size, sym=True, desc_act=False, damp_percent=damp
        ).weight()
        change = (found - weight).double()
        actual = ((change @ damped) * change).sum(1)
        assert predicted[bits].shape == (64,)
        assert float(predicted[bits].sum()) == pytest.approx(float(actual.sum()), rel=0.3), bits
        # output by output too, if more roughly
        assert float((predicted[bits].double() / actual).log().abs().mean()) < 0.5
    for fewer, more in itertools.pairwise(WIDTHS):
        assert (predicted[fewer] > predicted[more]).all()


def test_losses_take_inputs_that_are_always_zero_and_change_nothing() -> None:
    weight, gram = problem(16, 64)
    gram[5], gram[:, 5] = 0, 0
    before = weight.clone(), gram.clone()
    step = open_step("quantize", {"group_size": 32, "budget": {"bits": 4}})
    assert all(torch.isfinite(each).all() for each in losses(weight, gram, step, torch.bfloat16).values())
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def model(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Path, Path]:
    """A model, its Grams and its sensitivities."""
    source = Artifact(tiny("qwen2", dtype=request.param), {"key": "x", "format": "hf"})
    grams, sensitivity = tmp_path_factory.mktemp("grams"), tmp_path_factory.mktemp("sensitivity")
    Sweep(samples=8, length=64).run(source, grams, Context())
    Sensitivities(samples=8, length=64, sequences=2).run(source, sensitivity, Context())
    return source, grams, sensitivity


Model = tuple[Artifact, Path, Path]


def spend(model: Model, out: Path, budget: Any, **settings: Any) -> dict[str, Any]:
    out.mkdir()
    step = open_step("quantize", {"budget": budget, "group_size": 32, **settings})
    assert step.needs_sweep()
    assert step.needs_sensitivity()
    return step.run(model[0], out, Context(grams=model[1], sensitivity=model[2]))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def linear_bytes(folder: Path, names: set[str]) -> int:
    """Returns the bytes of the tensors of some linears, without their shapes and biases."""
    tensors = load_file(folder / "model.safetensors")
    parts = [f"{name}.{part}" for name in names for part in ("weight", "weight_packed", "weight_scale")]
    return sum(tensors[part].nbytes for part in parts if part in tensors)


@pytest.mark.parametrize("ignore", [(), IGNORE])
@pytest.mark.parametrize("bits", [3.5, 4.7, 6])
def test_a_budget_in_bits_is_kept(model: Model, tmp_path: Path, bits: float, ignore: tuple[str, ...]) -> None:
    facts = spend(model, tmp_path / "out", {"bits": bits}, ignore=ignore)
    original = load_file(model[0].path / "model.safetensors")
    linears = {name.removesuffix(".weight") for name in original if name.endswith("_proj.weight")}
    counted = {name for name in linears if not ignored(name, ignore)}
    assert set(facts["allocation"]) == counted
    assert len(counted) == (14 if not ignore else 11)
    weights = {name: original[f"{name}.weight"].numel() for name in counted}
    actual = 8 * linear_bytes(tmp_path / "out", counted) / sum(weights.values())
    assert facts["bits_per_linear_weight"] == pytest.approx(actual)
    assert bits - 0.5 < actual <= bits
    for name, entry in facts["allocation"].items():
        assert entry["bits"] == pytest.approx(8 * linear_bytes(tmp_path / "out", {name}) / weights[name])
    assert {entry["what"] for entry in facts["kept"] if entry["why"] == "left alone (ignore)"} == linears - counted
    assert len({entry["type"] for entry in facts["allocation"].values()}) > 1
    assert facts["exact_allocation"]


@pytest.mark.parametrize("ignore", [(), IGNORE])
def test_a_budget_in_bytes_is_kept_by_the_whole_directory(
    model: Model, tmp_path: Path, ignore: tuple[str, ...]
) -> None:
    whole = size(model[0].path)
    for number, share in enumerate((0.7, 0.85)):
        budget = int(share * whole)
        facts = spend(model, tmp_path / str(number), {"size": budget}, ignore=ignore)
        assert facts["budget"] == {"size": budget}
        assert 0.97 * budget - 40_000 < size(tmp_path / str(number)) <= budget


def test_the_smallest_size_is_named_and_can_be_reached(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the smallest size that can be reached is") as raised:
        spend(model, tmp_path / "small", "size=100kB")
    smallest = int(re.search(r"reached is ([\d,]+) bytes", str(raised.value))[1].replace(",", ""))
    facts = spend(model, tmp_path / "smallest", {"size": smallest})
    assert {entry["type"] for entry in facts["allocation"].values()} == {"2 bits"}
    assert size(tmp_path / "smallest") <= smallest
    with pytest.raises(RequestError, match="too small"):
        spend(model, tmp_path / "below", {"size": smallest - 1})
    with pytest.raises(RequestError, match="too small"):
        spend(model, tmp_path / "bits", "bits=1.5")


def test_room_enough_leaves_everything_alone(model: Model, tmp_path: Path) -> None:
    facts = spend(model, tmp_path / "out", {"size": 10**9})
    assert {entry["type"] for entry in facts["allocation"].values()} == {"untouched"}
    before = load_file(model[0].path / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bits_go_where_the_loss_depends_on_them(model: Model, tmp_path: Path) -> None:
    """A linear that is said to matter a thousandfold gets more bits, one that does not matter the fewest."""
    favoured, despised = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    found = Sensitivity.read(model[2])
    outputs = {**found.outputs, favoured: 1000 * found.outputs[favoured], despised: 0.0}
    changed = tmp_path / "changed"
    changed.mkdir()
    Sensitivity(outputs, found.head_gram, found.counts, found.tokens).write(changed)
    facts = spend((*model[:2], changed), tmp_path / "out", {"bits": 4.5})
    assert facts["allocation"][favoured]["bits"] > 8
    assert facts["allocation"][despised]["type"] == "2 bits"
