"""What is tried with a small random model of a family: the sweep, GPTQ and AWQ, and opening what they wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from lighten.compress.calibrate.sweep import Sweep
from lighten.model import blockwise, whole
from lighten.model.auto_classes import class_for
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy
from lighten.model.grams import read_index
from lighten.model.tokens import calibration_ids
from lighten.model.unpacked import open_checkpoint
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
}
SAMPLES, LENGTH = 3, 32


def loaded(path: Path) -> Any:
    """Returns the model that transformers' own class makes of a directory."""
    return class_for(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32)


def trial(folder: Path, methods: dict[str, dict[str, Any]] = METHODS) -> dict[str, Any]:
    """Returns what was seen with the model of a directory. `folder`/model has it; the rest of `folder` is written.

    Raises:
        Exception: whatever a step raised.
    """
    source = Artifact(folder / "model", {"key": "x", "format": "hf"})
    (grams := folder / "grams").mkdir()
    Sweep(samples=SAMPLES, length=LENGTH).run(source, grams, Context())
    checkpoint = Checkpoint(source.path)
    anatomy = blockwise.known_anatomy(checkpoint, grams)
    plain = loaded(source.path).eval()
    ids = torch.from_numpy(calibration_ids(source.path, "builtin", SAMPLES, LENGTH)).long()
    row: dict[str, Any] = {
        "weights": anatomy.weights,
        "promised": round(anatomy.covered / anatomy.weights, 4),
        "fits": round(_fits(anatomy) / anatomy.weights, 4),
        "layers": len(anatomy.layers),
        "kinds": len({layer.kind for layer in anatomy.layers}),
        "experts": len([1 for layer in read_index(grams)["layers"] for _ in layer.get("experts", ())]),
        "left": dict(Counter(why for layer in anatomy.layers for why in layer.kept.values())),
        "sweep": _through_the_sweep(source.path, plain, ids),
        "perplexity": _perplexity(plain, ids),
        "methods": {},
    }
    for name, settings in methods.items():
        (out := folder / name).mkdir()
        facts = open_step("quantize", settings).run(source, out, Context(grams=grams))
        opened = whole.load(out, torch.float32)
        row["methods"][name] = {
            "coverage": facts["coverage"],
            "left": len(facts["kept"]),
            "error": facts["output_error"]["mean"],
            "perplexity": _perplexity(opened, ids),
        }
        if name == "gptq":
            replace(plain, checkpoint, anatomy, out)
            row["methods"][name]["opened"] = _difference(_logits(opened, ids), _logits(plain, ids))
    return row


def _fits(anatomy: Anatomy) -> int:
    """Returns the number of weights in linears that groups of 32 and words of 8 codes divide."""
    shapes = [linear.shape for layer in anatomy.layers for linear in layer.linears]
    return sum(rows * columns for rows, columns in shapes if columns % 32 == 0 and rows % 8 == 0)


def replace(model: Any, checkpoint: Checkpoint, anatomy: Anatomy, quantized: Path) -> None:
    """Gives a plain model the unpacked weights of a quantized directory, module by module."""
    stored = open_checkpoint(quantized)
    for layer in anatomy.layers:
        for linear in layer.linears:
            weight = stored.tensor(f"{layer.prefix}{linear.name}.weight")
            module = model.get_submodule(f"{layer.module}.{linear.module}")
            if linear.inside is not None:
                linear.inside.of(module.get_parameter(linear.inside.tensor).data).copy_(weight)
            else:
                turned = not isinstance(module, nn.Linear) and layer.prefix + linear.name in stored.packed  # type: ignore[attr-defined]
                module.weight.data.copy_(weight.t() if turned else weight)


def _through_the_sweep(path: Path, plain: Any, ids: torch.Tensor) -> float:
    """Returns the largest difference between what the last blocks give in the sweep and in the plain forward."""
    model = blockwise.BlockwiseModel(path)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        plain.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.setdefault(name, []).append(_first(out))
        )
        for name in model.blocks
    ]
    _logits(plain, ids)
    for hook in hooks:
        hook.remove()
    worst = 0.0
    for _, _, turn in model.turns(ids):
        for call in turn.calls:
            turn.answer(call)
        found = torch.cat([_first(call.answer) for call in turn.calls])
        worst = max(worst, _difference(found, seen[turn.name].pop(0)))
    return worst


def _first(value: Any) -> torch.Tensor:
    found: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _perplexity(model: Any, ids: torch.Tensor) -> float:
    logits = _logits(model, ids)[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest difference, as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
