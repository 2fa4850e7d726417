"""An output head of 8 bits: opened by its loader as what was stored, and refused where it is the embedding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.quantize.grid import rtn
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.pipeline.steps import open_step
from lighten.process.isolate import run_isolated
from lighten.step import Context
from lighten.store.artifact import Artifact

IDS = (np.arange(48) * 37) % 900
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 32},
    "rtn-8": {"method": "rtn", "bits": 8, "group_size": -1},
    "budget": {"group_size": 32, "budget": {"bits": 4.25}},
    "w8a8": {"method": "w8a8"},
    "int8-dynamic": {"method": "int8-dynamic"},
}


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model with a head of its own, its Grams and its sensitivities."""
    path = tiny("qwen2", dtype=torch.bfloat16, tie_word_embeddings=False)
    grams, sensitivity = tmp_path_factory.mktemp("grams"), tmp_path_factory.mktemp("sensitivity")
    Sweep(samples=8, length=64).run(Artifact(path, {"key": "x"}), grams, Context())
    Sensitivities(samples=8, length=64, sequences=2).run(Artifact(path, {"key": "x"}), sensitivity, Context())
    return path, grams, sensitivity


def heads(payload, report):
    """Returns what a model's head makes of one input, in transformers and in lighten's runtime, and its logits."""
    from transformers import AutoModelForCausalLM

    from lighten.evaluate.runtimes.torch import TorchRuntime

    out = Path(payload["out"])
    for folder in map(Path, payload["models"]):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            output = model(torch.from_numpy(IDS)[None], output_hidden_states=True)
        np.save(out / f"{folder.name}-hidden", output.hidden_states[-1][0].numpy())
        np.save(out / f"{folder.name}-loader", output.logits[0].numpy())
        np.save(out / f"{folder.name}-runtime", TorchRuntime(folder, "cpu", None).logits(IDS))


@pytest.fixture(scope="module")
def made(source: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root, facts = tmp_path_factory.mktemp("heads"), {}
    for name, settings in METHODS.items():
        (root / name).mkdir()
        step = open_step("quantize", {**settings, "head": "8"})  # as the command line gives it
        context = Context(grams=source[1], sensitivity=source[2])
        facts[name] = step.run(Artifact(source[0], {"key": "x", "format": "hf"}), root / name, context)
    run_isolated(
        "tests.compress.quantize.test_head:heads", {"models": [str(root / name) for name in METHODS], "out": str(root)}
    )
    return root, facts


@pytest.mark.parametrize("name", METHODS)
def test_loaders_use_the_head_that_was_stored(made: tuple[Path, dict[str, Any]], name: str, source: Any) -> None:
    root, facts = made
    group = -1 if name in ("w8a8", "int8-dynamic", "rtn-8") else 32
    weight = Checkpoint(source[0]).tensor("lm_head.weight")
    rounded = rtn(weight, 8, group, True, torch.bfloat16).weight()
    expected = np.load(root / f"{name}-hidden.npy") @ rounded.numpy().T
    loader, runtime = (np.load(root / f"{name}-{kind}.npy") for kind in ("loader", "runtime"))
    # w8a8 rounds the inputs of the head too
    near = 0.02 if facts[name]["method"] in ("w8a8", "int8-dynamic") else 1e-4
    assert np.abs(loader - expected).max() < near * np.abs(expected).max()
    assert np.abs(loader - runtime).max() < 1e-3 * np.abs(expected).max()
    assert not np.allclose(rounded.numpy(), weight.float().numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_facts_count_it(made: tuple[Path, dict[str, Any]], name: str, source: Any) -> None:
    root, facts = made
    assert facts[name]["format"] == "compressed-tensors"
    assert facts[name]["head"] == 8
    assert "lm_head" not in {entry["what"] for entry in facts[name]["kept"]}
    stored = load_file(root / name / "model.safetensors")
    assert "lm_head.weight" not in stored or stored["lm_head.weight"].dtype == torch.int8


def test_a_budget_in_bytes_counts_it(source: tuple[Path, Path, Path], tmp_path: Path) -> None:
    def size(head: object) -> int:
        out = tmp_path / str(head)
        out.mkdir()
        settings = {"group_size": 32, "budget": {"size": 1_400_000}, "head": head}
        context = Context(grams=source[1], sensitivity=source[2])
        facts = open_step("quantize", settings).run(Artifact(source[0], {"key": "x", "format": "hf"}), out, context)
        total = sum(file.stat().st_size for file in out.iterdir())
        assert total <= 1_400_000
        return round(1000 * facts["bits_per_linear_weight"])

    assert size(8) > size("keep")


def test_a_tied_head_is_refused(tiny: Callable[..., Path]) -> None:
    facts = Checkpoint(tiny("qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)).facts
    with pytest.raises(RequestError, match=r"tied to its embedding.*leave out head"):
        open_step("quantize", {"head": 8, "group_size": 32}).check(facts)
    open_step("quantize", {"head": "keep", "group_size": 32}).check(facts)
    with pytest.raises(ValueError, match="awq has no setting head"):
        open_step("quantize", {"method": "awq", "head": 8})
