"""The `prune` step: removes weights, and writes the model that is left."""

from __future__ import annotations

from typing import Any

import torch

from lighten.compress.prune.choice import Choices
from lighten.compress.prune.parts import Cut
from lighten.compress.prune.settings import Prune
from lighten.compress.prune.thin import Thinned
from lighten.compress.prune.zeros import write
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Prune, source: Artifact, out: Any, context: Context) -> dict[str, Any]:
    """Writes the pruned model.

    Raises:
        RequestError: the source is quantized, or a target cannot be reached.
    """
    checkpoint = Checkpoint(source.path)
    if checkpoint.quantization:
        raise RequestError(f"this model is {source.format}: prune the one that it was made from")
    if step.method:
        return write(step, checkpoint, out, context)
    return _shrink(step, checkpoint, out, context)


def _shrink(step: Prune, checkpoint: Checkpoint, out: Any, context: Context) -> dict[str, Any]:
    """Chooses what goes, and writes what is left."""
    facts = checkpoint.facts
    with torch.inference_mode():
        choices = Choices(step, checkpoint, context)
        told: dict[str, Any] = {}
        if step.target:
            cut, told = choices.reach(step.target)
        elif step.what == "experts":
            cut = choices.fewer_experts()
        else:
            cut = choices.cut(**{str(step.what): step.amount(facts)})
        grams = context.grams if step.repair else None
        thin = Thinned(checkpoint, cut, grams, step.damp_percent or 0.0, context.device, choices.parts)
        names = list(thin.weight_map)
        params = done = 0
        with ShardWriter(out, len(names)) as writer:
            for name in names:
                if choices.parts.placed(name) is None:
                    tensor = thin.tensor(name)
                    params += tensor.numel()
                    writer.add(name, tensor)
            for prefix in choices.parts.prefixes[: len(thin.left)]:
                for rest, tensor in thin.tensors(prefix).items():
                    params += tensor.numel()
                    writer.add(prefix + rest, tensor)
                context.report(done := done + 1, len(thin.left), f"layer {done}/{len(thin.left)}")
    checkpoint.write_others(out, thin.config)
    context.warnings += choices.warnings
    if thin.facts.architecture != facts.architecture:
        context.warnings.append(
            f"written as {thin.facts.architecture}, which computes the same as {facts.architecture} and allows "
            f"{thin.facts.heads} heads for {facts.hidden} channels"
        )
    if thin.unrepaired:
        context.warnings.append(
            f"{len(thin.unrepaired)} linears were not repaired, for their Gram could not be factorised "
            f"({thin.unrepaired[0]}): give it more text"
        )
    if choices.kept:
        name, why = next(iter(choices.kept.items()))
        context.warnings.append(f"{len(choices.kept)} layers keep their MLP as it is ({name}: {why})")
    left = thin.facts
    return {
        "format": "hf",
        "dtype": "bfloat16",
        "params": params,
        "removed": removed(cut),
        "left": {
            "layers": left.layers,
            "intermediate": left.intermediate,
            "heads": left.heads,
            "kv_heads": left.kv_heads,
        },
        **({"kept": [{"what": name, "why": why} for name, why in choices.kept.items()]} if choices.kept else {}),
        **told,
    }


def removed(cut: Cut) -> dict[str, Any]:
    """Returns what went, for the facts."""
    found: dict[str, Any] = {}
    if cut.channels:
        counts = {layer: len(gone) for layer, gone in cut.channels.items()}
        one = next(iter(counts.values()))
        found["mlp_channels"] = one if {*counts.values()} == {one} else {str(layer): n for layer, n in counts.items()}
    if cut.groups:
        found["kv_heads"] = {str(layer): sorted(gone) for layer, gone in cut.groups.items()}
    if cut.experts:
        found["experts"] = {str(layer): list(gone) for layer, gone in cut.experts.items()}
    if cut.layers:
        found["layers"] = list(cut.layers)
    return found
