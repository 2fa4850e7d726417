"""Experts that go: the model that is left is the whole one whose router never chooses them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.prune.settings import Prune
from lighten.errors import RequestError
from lighten.model import stream
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

EXPERTS = 4
NEVER = -1e9
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)


def swept(family: str, tmp_path: Path) -> tuple[Artifact, Path]:
    for name in ("model", "grams", "out"):
        (tmp_path / name).mkdir()
    source = Artifact(make(family, tmp_path / "model"), {"key": "x", "format": "hf"})
    Sweep(samples=3, length=32).run(source, tmp_path / "grams", Context())
    return source, tmp_path / "grams"


class Silence(TorchFunctionMode):
    """Lets routers never choose some experts."""

    def __init__(self, routers: dict[int, list[int]]) -> None:
        super().__init__()
        self.routers, self.calls = routers, 0

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and args[1].data_ptr() in self.routers:
            found, self.calls = found.clone(), self.calls + 1
            found[..., self.routers[args[1].data_ptr()]] = NEVER
        return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_what_is_left_is_the_model_whose_router_never_chooses_them(family: str, tmp_path: Path) -> None:
    """Stored one by one; in stacks with biases; with a bias of the choice; beside dense layers."""
    source, grams = swept(family, tmp_path)
    step = Prune.model_validate({"what": "experts", "count": 1})
    facts = step.run(source, tmp_path / "out", Context(grams=grams))
    json.dumps(facts, allow_nan=False)
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **OPTIONS)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    plain = AutoModelForCausalLM.from_pretrained(source.path, **OPTIONS).eval()
    gone = facts["removed"]["experts"]
    routers = {}
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        layer = next((layer for layer in gone if f".layers.{layer}." in name), None)
        if layer and "correction_bias" in name:
            tensor.data[gone[layer]] = NEVER
        elif layer and tensor.dim() == 2 and len(tensor) == EXPERTS and "experts" not in name:
            routers[tensor.data_ptr()] = gone[layer]
    ids = torch.arange(5, 45)[None]
    with torch.no_grad(), Silence(routers) as silence:
        wanted = plain(ids, use_cache=False).logits
    assert silence.calls == len(gone) > 1
    with torch.no_grad():
        found = small.eval()(ids, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_those_go_that_give_least(tmp_path: Path) -> None:
    source, grams = swept("qwen3_moe", tmp_path)
    quiet = {0: 3, 1: 0, 2: 2, 3: 1}
    (file,) = source.path.glob("*.safetensors")
    tensors = load_file(file)
    for layer, expert in quiet.items():
        tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"] *= 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    facts = Prune.model_validate({"what": "experts", "ratio": 0.25}).run(source, tmp_path / "out", Context(grams=grams))
    assert facts["removed"]["experts"] == {str(layer): [expert] for layer, expert in quiet.items()}


@pytest.mark.parametrize(
    ("family", "amount", "why"),
    [
        ("qwen3", {"count": 1}, "has no experts that lighten takes apart"),
        ("qwen3_moe", {"count": 4}, "4 of 4 experts cannot go"),
        ("qwen3_moe", {"count": 3}, r"1 experts would be left, and a token gets 2 of them \(num_experts_per_tok\)"),
    ],
)
def test_what_cannot_go_is_refused(family: str, amount: dict[str, int], why: str, tmp_path: Path) -> None:
    source, grams = swept(family, tmp_path)
    with pytest.raises(RequestError, match=why):
        Prune.model_validate({"what": "experts", **amount}).run(source, tmp_path / "out", Context(grams=grams))
