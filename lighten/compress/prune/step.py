"""The `prune` step: removes weights, and writes the model that is left."""

from __future__ import annotations

from typing import Any

import torch

from lighten.compress.prune.choice import Choices
from lighten.compress.prune.settings import Prune
from lighten.compress.prune.thin import Cut, Thinned
from lighten.compress.prune.zeros import write
from lighten.errors import RequestError
from lighten.model import anatomy
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
        else:
            cut = choices.cut(**{str(step.what): step.amount(facts)})
        grams = context.grams if step.repair else None
        thin = Thinned(checkpoint, cut, grams, step.damp_percent or 0.0, context.device)
        names = list(thin.weight_map)
        params = done = 0
        with ShardWriter(out, len(names)) as writer:
            for name in names:
                if anatomy.placed(name) is None:
                    tensor = thin.tensor(name)
                    params += tensor.numel()
                    writer.add(name, tensor)
            for layer in range(thin.facts.layers):
                for rest, tensor in thin.tensors(anatomy.layer(layer)).items():
                    params += tensor.numel()
                    writer.add(anatomy.layer(layer) + rest, tensor)
                context.report(done := done + 1, thin.facts.layers, f"layer {done}/{thin.facts.layers}")
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
        **told,
    }


def removed(cut: Cut) -> dict[str, Any]:
    """Returns what went, for the facts."""
    found: dict[str, Any] = {}
    if cut.channels:
        found["mlp_channels"] = len(next(iter(cut.channels.values())))
    if cut.groups:
        found["kv_heads"] = {str(layer): sorted(gone) for layer, gone in cut.groups.items()}
    if cut.layers:
        found["layers"] = list(cut.layers)
    return found
