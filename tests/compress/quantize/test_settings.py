"""What the methods may be told, what they answer when they may not, and the keys that their settings make."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.compress.patterns import ignored
from lighten.compress.quantize.methods import METHODS
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.pipeline.recipe import parse_settings
from lighten.pipeline.steps import open_step, step_class
from lighten.settings import Budget
from lighten.store.files import stage_key
from tests.cli.test_main import refused
from tests.command import lighten

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "awq", "bits": 3}, "awq takes bits 4, not 3; 3 is for gptq, rtn"),
    ({"method": "int8", "bits": 4}, "int8 takes bits 8, not 4; 4 is for gptq, rtn, awq, nf4, fp4, mxfp4, nvfp4"),
    ({"bits": 5}, "bits: must be 2, 3, 4 or 8, not 5"),
    ({"group_size": 100}, "group_size: must be -1, 32, 64 or 128, not 100"),
    ({"method": "rtn", "group_size": 100}, "group_size: must be -1, 32, 64, 128 or 'tensor', not 100"),
    ({"group_size": "tensor"}, "gptq takes group_size -1, 32, 64 or 128, not 'tensor'; tensor is for rtn"),
    ({"method": "awq", "group_size": "16"}, "group_size: must be -1, 32, 64 or 128, not 16"),
    (
        {"method": "nf4", "group_size": 64},
        "nf4 has no setting group_size; it has bits, ignore, block_size, double_quant",
    ),
    ({"method": "rtn", "damp_percent": 0.1}, "rtn has no setting damp_percent"),
    ({"method": "fp8", "alpha": 0.5}, "fp8 has no setting alpha"),
    ({"method": "awq", "budget": "bits=4.2"}, "awq has no setting budget"),
    ({"block_size": 64}, "gptq has no setting block_size"),
    ({"method": "awq", "sym": True}, "the awq format has a zero point per group: sym is for gptq and rtn"),
    ({"bits": 4, "budget": {"bits": 4.25}}, "a budget chooses the bits: give one of the two"),
    ({"budget": {"bits": 4.25}, "sym": False}, "leave out sym: false"),
    ({"budget": {"bits": 4.25}, "smooth": 0.5}, "leave out propagate and budget"),
    ({"propagate": "auto", "smooth": 0.5}, "leave out propagate and budget"),
    ({"smooth": 1.5}, "smooth: must be less than or equal to 1"),
    ({"method": "rtn", "smooth": 0.5}, "rtn has no setting smooth"),
    ({"static_groups": True}, "give desc_act: static"),
    ({"ignore": ["*.0.*"], "desc_act": True}, "leave out desc_act, or set it to static"),
    ({"method": "rtn", "ignore": ["*.0.*"], "sym": False}, "leave out sym: false"),
    ({"budget": {}}, "a budget is one of the two: size, or bits"),
    ({"budget": {"bits": 4, "size": 10**6}}, "a budget is one of the two: size, or bits"),
    ({"budget": "size=90 apples"}, "'90 apples' is not a size"),
    ({"budget": "bits=0"}, "budget.bits"),
    ({"budget": "4.25"}, "4.25"),
    ({"budget": "speed=3"}, "speed: unknown key"),
    ({"damp_percent": 1.5}, "damp_percent"),
    ({"method": "w8a8", "alpha": 1.1}, "alpha"),
    ({"method": "nf4", "block_size": 100}, "block_size"),
    (
        {"method": "gguf"},
        "method: must be 'gptq', 'rtn', 'awq', 'nf4', 'fp4', 'int8', 'int8-dynamic', 'w8a8', 'fp8', 'mxfp4' or "
        "'nvfp4', not 'gguf'",
    ),
    ({"method": "rtn", "bitz": 4}, "bitz: unknown key; did you mean 'bits'?"),
    ({"bitz": 4}, "bitz"),
    ({"method": "nvfp4", "rounding": "best"}, "rounding: must be 'gptq', 'scales' or 'nearest', not 'best'"),
    (
        {"method": "mxfp4", "rounding": "scales", "propagate": "auto"},
        "rounding scales makes no errors good: leave out propagate, or take rounding: gptq",
    ),
    ({"method": "mxfp4", "group_size": 32}, "mxfp4 has no setting group_size"),
    ({"method": "mxfp4", "form": "gpt-oss", "ignore": ["*.0.*"]}, "form gpt-oss holds all experts"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_is_refused_with_a_reason(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_settings(step_class("quantize", settings), settings, "lighten quantize")
    assert words in str(raised.value)
    assert "validation error" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", METHODS.names)
def test_defaults_are_the_methods_own(method: str) -> None:
    step = open_step("quantize", {"method": method})
    assert type(step) is METHODS.load(method)
    defaults = {name: field.default for name, field in type(step).model_fields.items()}
    later = {
        "static_groups": False,
        "propagate": "off",
        "refine": 0,
        "smooth": None,
        "positive_scales": False,
        "form": "compressed-tensors",
    }
    assert step.key_config() == {
        name: value
        for name, value in defaults.items()
        if value not in (None, (), "keep") and (name not in later or value != later[name])
    }
    assert open_step("quantize", step.dump()) == step  # as the manifest keeps them
    assert open_step("quantize", {**defaults, "method": method.upper()}) == step


def test_static_stands_for_order_and_groups_of_neighbours() -> None:
    step = open_step("quantize", {"desc_act": "static"})
    assert step.order == "static"
    assert open_step("quantize", {"desc_act": True, "static_groups": True}) == step
    assert step.config({}, [])["desc_act"] is False  # the file needs no order
    assert step.key_config()["static_groups"] is True


def test_keys_are_those_of_the_stores_that_there_are() -> None:
    """Computed when all methods shared one class of settings: objects that were made then are found."""
    known = json.loads((Path(__file__).parent / "keys.json").read_text())
    assert {each["config"]["method"] for each in known} == set(METHODS.names)
    for each in known:
        step = open_step("quantize", each["settings"])
        assert step.key_config() == each["config"], each["settings"]
        assert stage_key(step.kind, step.version, step.key_config(), ["p"]) == each["key"], each["settings"]


def test_the_predicted_bytes_are_those_of_the_groups() -> None:
    linears = facts().layers * facts().layer_linear_params
    kept = 2 * facts().embedding_params
    for size, bits in ((-1, 4 + 20 / 256), (32, 4 + 20 / 32), (128, 4 + 20 / 128)):
        found = open_step("quantize", {"group_size": size}).predict(facts(), 0).disk_bytes
        assert found == int(linears * bits / 8) + kept


def test_the_command_line_gives_text() -> None:
    assert open_step("quantize", {"group_size": "64"}).group_size == 64
    assert open_step("quantize", {"group_size": "-1"}).group_size == -1
    assert open_step("quantize", {"method": "rtn", "group_size": "tensor"}).group_size == "tensor"
    for text, expected in (
        ("bits=4.25", Budget(bits=4.25)),
        (" bits = 4.25", Budget(bits=4.25)),
        ("size=90MB", Budget(size=90_000_000)),
        ("1.5MiB", Budget(size=3 << 19)),
        ("size=90000000", Budget(size=90_000_000)),
    ):
        step = open_step("quantize", {"budget": text})
        assert step.budget == expected
        assert step.bits is None


@pytest.mark.parametrize(
    ("settings", "stored", "extras", "swept"),
    [
        ({}, "gptq", set(), True),
        ({"method": "rtn"}, "gptq", set(), False),
        ({"method": "rtn", "ignore": ["a"]}, "compressed-tensors", {"compressed"}, False),
        ({"budget": "bits=4"}, "compressed-tensors", {"compressed"}, True),
        ({"method": "awq"}, "awq", set(), True),
        ({"method": "nf4"}, "bitsandbytes", {"bnb"}, False),
        ({"method": "int8"}, "bitsandbytes", {"bnb"}, False),
        ({"method": "w8a8"}, "compressed-tensors", {"compressed"}, True),
        ({"method": "int8-dynamic"}, "compressed-tensors", {"compressed"}, False),
        ({"method": "fp8"}, "compressed-tensors", {"compressed"}, False),
        ({"method": "mxfp4"}, "compressed-tensors", {"compressed"}, True),
        ({"method": "mxfp4", "rounding": "nearest", "activations": True}, "compressed-tensors", {"compressed"}, False),
        ({"method": "nvfp4", "rounding": "nearest"}, "compressed-tensors", {"compressed"}, False),
        ({"method": "nvfp4", "rounding": "nearest", "activations": True}, "compressed-tensors", {"compressed"}, True),
    ],
)
def test_what_it_takes_and_makes(settings: dict[str, Any], stored: str, extras: set[str], swept: bool) -> None:
    step = open_step("quantize", settings)
    assert step.format == stored
    assert {extra for _, extra in step.requires()} == extras
    assert step.needs_sweep() == swept
    assert step.needs_sensitivity() == ("budget" in settings)


def facts(**sizes: int) -> ModelFacts:
    plain = {"hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2, "vocab": 900}
    return ModelFacts("LlamaForCausalLM", **{**plain, **sizes}, tied=False)


def test_a_width_that_does_not_fit_is_refused_by_name() -> None:
    open_step("quantize", {}).check(facts())
    with pytest.raises(RequestError, match=r"group_size 128 does not divide the hidden_size 192 .* use 64, 32 or -1"):
        open_step("quantize", {}).check(facts(hidden=192))
    with pytest.raises(RequestError, match=r"intermediate_size 264 .* use -1"):
        open_step("quantize", {"group_size": 64}).check(facts(intermediate=264))
    open_step("quantize", {"group_size": -1, "bits": 4}).check(facts(intermediate=264))
    with pytest.raises(RequestError, match="3-bit codes of the intermediate_size 264 do not fill"):
        open_step("quantize", {"group_size": -1, "bits": 3}).check(facts(intermediate=264))
    with pytest.raises(RequestError, match="awq format packs 8 outputs to a word; the key/value width 12"):
        open_step("quantize", {"method": "awq", "group_size": -1}).check(facts(kv_heads=1, head_dim=12, heads=8))
    for method in ("nf4", "int8", "w8a8", "int8-dynamic", "fp8"):
        open_step("quantize", {"method": method}).check(facts(intermediate=263))


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("*.0.mlp.*", "model.layers.0.mlp.up_proj", True),
        ("*.0.mlp.*", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("up_proj", "model.layers.1.mlp.up_proj", False),
        (r"re:layers\.[01]\.", "model.layers.1.mlp.up_proj", True),
        (r"re:^layers", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_patterns_of_what_to_leave_alone(pattern: str, name: str, found: bool) -> None:
    assert ignored(name, ("nothing", pattern)) == (pattern if found else None)


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    refused(done, 2, *words)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_command_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny(dtype=torch.bfloat16)
    small = ("--samples", 4, "--length", 32, "--group-size", 64)
    done = lighten("quantize", model, "--method", "awq", *small, "-o", "q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"q: awq, \d\.\d MB", done.stdout)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"

    budget = ("--budget", "bits=4.5", "--ignore", "*.0.mlp.*", "--ignore", r"re:v_proj$")
    done = lighten("quantize", model, *budget, *small, "-o", "b", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["format"] == "compressed-tensors"
    assert len(manifest["facts"]["allocation"]) == 9
    assert manifest["facts"]["bits_per_linear_weight"] <= 4.5

    one_line(
        lighten("quantize", model, "--method", "awq", "--bits", 3, "-o", "r", cwd=tmp_path), "awq takes bits 4, not 3"
    )
    assert not (tmp_path / "r").exists()
