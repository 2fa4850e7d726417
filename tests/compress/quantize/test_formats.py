"""Every method on tiny models, opened with the loader it is meant for: the model that it says it stored."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.patterns import ignored
from lighten.compress.quantize import formats
from lighten.compress.quantize.float_grid import Mxfp4Scales, Nvfp4Scales, Scales, rounded, usual
from lighten.compress.quantize.grid import rtn
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.quantized_layers import Layers
from lighten.compress.quantize.settings import Quantize
from lighten.pipeline.steps import open_step
from lighten.plugins import found_at
from lighten.process.isolate import run_isolated
from lighten.step import Context
from lighten.store.artifact import Artifact

IGNORE = ("model.layers.0.mlp.*", r"re:\.1\.self_attn\.[ok]_proj$")
SMALL = {"group_size": 32}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", **SMALL},
    "gptq-3-asym": {"method": "gptq", "bits": 3, "sym": False, "desc_act": True, **SMALL},
    "gptq-ignore": {"method": "gptq", "ignore": IGNORE, **SMALL},
    "gptq-ignore-channel": {"method": "gptq", "bits": 3, "ignore": IGNORE, "group_size": -1},
    "gptq-smooth": {"method": "gptq", "smooth": 0.5, "positive_scales": True, **SMALL},
    "gptq-budget": {"method": "gptq", "budget": {"bits": 4.25}, "group_size": 128},
    "gptq-budget-ignore": {"method": "gptq", "budget": {"bits": 5}, "ignore": IGNORE[1:], **SMALL},
    "rtn": {"method": "rtn", **SMALL},
    "rtn-channel": {"method": "rtn", "bits": 8, "sym": False, "group_size": -1},
    "rtn-tensor": {"method": "rtn", "bits": 8, "group_size": "tensor"},
    "rtn-tensor-ignore": {"method": "rtn", "bits": 8, "group_size": "tensor", "ignore": IGNORE},
    "awq": {"method": "awq", **SMALL},
    "awq-channel": {"method": "awq", "group_size": -1},
    "awq-ignore": {"method": "awq", "ignore": IGNORE, "group_size": 64},
    "nf4": {"method": "nf4"},
    "nf4-ignore": {"method": "nf4", "ignore": IGNORE},
    "nf4-plain": {"method": "nf4", "double_quant": False, "block_size": 128},
    "fp4": {"method": "fp4"},
    "fp4-plain": {"method": "fp4", "double_quant": False},
    "int8": {"method": "int8"},
    "int8-ignore": {"method": "int8", "ignore": IGNORE},
    "int8-dynamic": {"method": "int8-dynamic"},
    "w8a8": {"method": "w8a8"},
    "w8a8-ignore": {"method": "w8a8", "ignore": IGNORE, "alpha": 0.7},
    "fp8": {"method": "fp8"},
    "fp8-ignore": {"method": "fp8", "ignore": IGNORE},
    "nvfp4": {"method": "nvfp4"},
    "nvfp4-w4a4": {"method": "nvfp4", "activations": True, "ignore": IGNORE},
    "nvfp4-nearest": {"method": "nvfp4", "rounding": "nearest"},
    "mxfp4": {"method": "mxfp4", "ignore": IGNORE},
    "mxfp4-w4a4": {"method": "mxfp4", "activations": True},
    "mxfp4-scales": {"method": "mxfp4", "rounding": "scales"},
}
QWEN2 = ("gptq", "gptq-smooth", "gptq-budget", "awq", "awq-ignore", "nf4", "int8", "w8a8", "w8a8-ignore", "fp8")
"""What is tried on biases too."""
CASES = [f"llama {name}" for name in METHODS] + [f"qwen2 {name}" for name in QWEN2]
ROUNDS_INPUTS = ("int8", "int8-ignore", "int8-dynamic", "w8a8", "w8a8-ignore", "fp8", "fp8-ignore")
ROUNDS_INPUTS_TO_4_BITS = ("nvfp4-w4a4", "mxfp4-w4a4")
KERNELS = ("gptq", "awq")
"""Formats whose kernels compute in float16."""
IDS = (np.arange(48) * 37) % 900


@dataclass
class Made:
    """A quantized model, and what it should be the same as."""

    name: str
    folder: Path
    facts: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """What `Stored.weight` was of every quantized linear."""
    source: Path
    warnings: list[str]
    logits: Path
    """Where its loader's and our runtime's logits are."""

    def read(self, kind: str) -> np.ndarray:
        logits: np.ndarray = np.load(self.logits / f"{self.folder.name}-{kind}.npy")
        return logits


def loaded(payload: dict[str, Any], report: Callable[..., None]) -> None:
    """Opens models with transformers, as anyone would, and with lighten's runtime; leaves the logits of both."""
    from transformers import AutoModelForCausalLM

    from lighten.evaluate.runtimes.torch import TorchRuntime

    gc.freeze()  # GPTQModel collects garbage at every turn
    for folder in map(Path, payload["models"]):
        out = f"{payload['out']}/{folder.name}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, payload["dtype"]))
        with torch.inference_mode():
            np.save(f"{out}-loader", model(torch.from_numpy(IDS)[None]).logits[0].float().numpy())
        runtime = TorchRuntime(folder, "cpu", None)
        np.save(f"{out}-runtime", runtime.logits(IDS))
        Path(f"{out}-detail").write_text(runtime.detail)
        runtime.close()


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Every method; the logits of its loader and of lighten's runtime beside it."""
    root = tmp_path_factory.mktemp("formats")
    logits = root / "logits"
    logits.mkdir()
    found = {}
    for family, names in {"llama": tuple(METHODS), "qwen2": QWEN2}.items():
        artifact = Artifact(tiny(family, dtype=torch.bfloat16), {"key": "x", "format": "hf"})
        grams, sensitivity = root / f"{family}-grams", root / f"{family}-sensitivity"
        grams.mkdir()
        sensitivity.mkdir()
        Sweep(samples=8, length=64).run(artifact, grams, Context())
        Sensitivities(samples=8, length=64, sequences=2).run(artifact, sensitivity, Context())
        for name in names:
            folder = root / f"{family}-{name}"
            folder.mkdir()
            step = open_step("quantize", METHODS[name])
            context = Context(
                grams=grams if step.needs_sweep() else None,
                sensitivity=sensitivity if step.needs_sensitivity() else None,
            )
            facts, weights = stored(step, artifact, folder, context)
            found[f"{family} {name}"] = Made(name, folder, facts, weights, artifact.path, context.warnings, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQMODEL_CPU_WORKERS", "3")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling its kernels takes longer than everything else
        for dtype in ("float16", "bfloat16", "float32"):
            models = [str(each.folder) for each in found.values() if loaded_in(each) == dtype]
            payload = {"models": models, "out": str(logits), "dtype": dtype}
            run_isolated("tests.compress.quantize.test_formats:loaded", payload)
    yield found
    shutil.rmtree(root)


def loaded_in(made: Made) -> str:
    """Returns the type that a loader opens a model in: compressed-tensors unpacks 4-bit floats to bfloat16."""
    if made.facts["format"] in KERNELS:
        return "float16"
    return "bfloat16" if made.facts["method"] in ("mxfp4", "nvfp4") else "float32"


def stored(step: Quantize, source: Artifact, out: Path, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a step; returns its facts and what `Stored.weight` was of every linear."""
    weights: dict[str, torch.Tensor] = {}
    rounds = found_at(step.rounds)

    def keep(step: Quantize, linears: Linears) -> list[formats.Stored]:
        stored: list[formats.Stored] = rounds(step, linears)
        weights.update({name: each.weight for name, each in zip(linears.names, stored, strict=True)})
        return stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layers, "rounds", staticmethod(keep))
        patch.setattr("lighten.compress.quantize.step.crew", lambda *_: 1)  # in this process, where it is listened to
        facts = step.run(source, out, context)
    return facts, weights


def dense(made: Made, into: Path) -> np.ndarray:
    """Returns the logits, in float32, of a plain model that holds what the quantized one stands for."""
    from transformers import AutoModelForCausalLM

    original = load_file(made.source / "model.safetensors")
    stored = load_file(made.folder / "model.safetensors")
    tensors = {name: stored.get(name, tensor).float() for name, tensor in original.items()}
    tensors |= {f"{name}.weight": weight.float().contiguous() for name, weight in made.weights.items()}
    shutil.copytree(made.source, into)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(into, dtype=torch.float32)
    for name in made.weights if made.name in ROUNDS_INPUTS_TO_4_BITS else ():
        divisor = stored.get(f"{name}.input_global_scale")
        scales = Mxfp4Scales() if divisor is None else Nvfp4Scales(float(divisor))
        model.get_submodule(name).register_forward_pre_hook(partial(with_rounded_inputs, scales=scales))
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return logits


def with_rounded_inputs(module: torch.nn.Module, inputs: Any, scales: Scales) -> torch.Tensor:
    """Returns what kernels make of an input: scales of blocks from the largest numbers, and the nearest codes."""
    columns = inputs[0].flatten(0, -2).t().contiguous()
    return rounded(columns, scales, usual(columns, scales)).weight().view_as(inputs[0])


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Returns the mean KL divergence of the predictions."""
    first, second = (torch.from_numpy(each).double().log_softmax(-1) for each in (reference, logits))
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_loads_as_what_was_stored(made: dict[str, Made], case: str, tmp_path: Path) -> None:
    each = made[case]
    expected = dense(each, tmp_path / "dense")
    loader, runtime = each.read("loader"), each.read("runtime")
    assert each.warnings == []
    scale = np.abs(expected).max()
    if each.name in ROUNDS_INPUTS:
        most = 0.05 if "fp8" in each.name else 0.005
        assert divergence(expected, loader) < most
        assert divergence(loader, runtime) < 1e-4
        return
    detail = (each.logits / f"{each.folder.name}-detail").read_text()
    if each.name in ROUNDS_INPUTS_TO_4_BITS:
        assert divergence(expected, runtime) < 1e-3
        assert divergence(expected, loader) < 0.5  # in bfloat16 many inputs fall to another code
        assert "emulated 4-bit-input Linear" in detail
        return
    assert np.abs(runtime - expected).max() < 1e-4 * scale
    if loaded_in(each) == "float32" and each.facts["format"] == "compressed-tensors":
        assert np.abs(loader - expected).max() < 1e-4 * scale
    else:  # kernels that compute in 16 bits
        assert np.abs(loader - expected).max() < 0.06 * scale
        assert divergence(expected, loader) < 2e-3
    assert "unpacked to float32" in detail


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_worth_something(made: dict[str, Made], case: str, tmp_path: Path) -> None:
    """Against the model it was made from: a folded scale or a permuted code would make it noise."""
    each = made[case]
    plain = dense(replace(each, folder=each.source, weights={}), tmp_path / "plain")
    bits = "fp8" if each.name.startswith("fp8") else each.facts.get("bits") or 4
    bits = "w4a4" if each.name in ROUNDS_INPUTS_TO_4_BITS else bits
    assert divergence(plain, each.read("runtime")) < {8: 0.01, "fp8": 0.1, 4: 0.6, 3: 1.3, "w4a4": 1.3}[bits]
    assert divergence(plain, np.roll(plain, 1, axis=-1)) > 2  # of logits that have nothing to do with each other


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_alone_is_left_byte_for_byte(made: dict[str, Made], case: str) -> None:
    each = made[case]
    before = load_file(each.source / "model.safetensors")
    after = load_file(each.folder / "model.safetensors")
    patterns = tuple(METHODS[each.name].get("ignore", ()))
    linears = {tensor.removesuffix(".weight") for tensor in before if tensor.endswith("_proj.weight")}
    kept = {linear for linear in linears if ignored(linear, patterns)}
    assert len(kept) == {0: 0, 1: 2, 2: 5}[len(patterns)]
    untouched = {linear for linear, entry in each.facts.get("allocation", {}).items() if entry["type"] == "untouched"}
    assert set(each.weights) == linears - kept - untouched
    assert each.facts["quantized_linears"] == len(each.weights)
    listed = {entry["what"] for entry in each.facts["kept"]}
    assert listed - {"embedding", "lm_head", "norms"} == kept | untouched
    folds = each.facts["method"] in ("awq", "w8a8") or "smooth" in METHODS[each.name]
    for tensor, value in before.items():
        linear = tensor.removesuffix(".weight")
        if linear in each.weights:
            continue
        scaled = folds and tensor.endswith(("layernorm.weight", "v_proj.bias"))
        if linear in kept | untouched or not scaled:
            assert torch.equal(after[tensor].view(torch.int16), value.view(torch.int16)), tensor
    config = json.loads((each.folder / "config.json").read_text())
    original = json.loads((each.source / "config.json").read_text())
    config.pop("quantization_config")
    assert config == original
    for file in each.source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (each.folder / file.name).read_bytes() == file.read_bytes()


def test_the_facts_say_what_was_done(made: dict[str, Made]) -> None:
    for each in made.values():
        facts, name = each.facts, each.name
        assert facts["method"] == METHODS[name]["method"]
        expected = {"gptq": "gptq", "rtn": "gptq", "awq": "awq", "nf4": "bitsandbytes", "fp4": "bitsandbytes"}
        expected |= {"int8": "bitsandbytes"}
        coded = "ignore" in name or "budget" in name
        by_code = "compressed-tensors" if coded and facts["method"] in ("gptq", "rtn") else None
        assert facts["format"] == (by_code or expected.get(facts["method"], "compressed-tensors"))
        json.dumps(facts, allow_nan=False)
        assert ("output_error" in facts) == open_step("quantize", METHODS[name]).needs_sweep()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_fp8_takes_rows_of_zeros_and_of_tiny_numbers(kind: torch.dtype) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(kind)
    weight[1], weight[2] = 0, weight[2] * 1e-5
    stored = formats.float_quantized(weight, kind)
    assert torch.isfinite(stored.weight).all()
    assert torch.equal(stored.weight[1], torch.zeros(32))
    step = weight.float().abs().amax(1, keepdim=True) / 16  # of the largest numbers that 8-bit floats hold
    assert ((stored.weight - weight.float()).abs() <= step).all()
    assert torch.equal(stored.weight, stored.tensors["weight"].float() * stored.tensors["weight_scale"].float())


def test_int8_is_what_bitsandbytes_makes_of_a_weight() -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).half()
    weight[3] = 0
    stored = formats.bnb_8bit(weight)
    codes, largest, _ = int8_vectorwise_quant(weight)
    kept = [row for row in range(16) if row != 3]
    assert (stored.tensors["weight"].int() - codes.int()).abs().max() <= 1
    assert (stored.tensors["weight"] != codes).float().mean() < 0.02  # float16 arithmetic of theirs
    assert torch.equal(stored.tensors["SCB"][kept], largest.float()[kept])
    assert torch.equal(stored.weight[3], torch.zeros(64))
    assert ((stored.weight - weight.float()).abs() <= largest.float()[:, None] / 127 * 0.501).all()


def test_int_quantized_stands_for_its_codes() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = formats.int_quantized(rtn(weight, 8, -1, True, torch.bfloat16), torch.bfloat16)
    assert stored.tensors["weight"].dtype == torch.int8
    assert torch.equal(stored.weight, stored.tensors["weight"].float() * stored.tensors["weight_scale"].float())
