"""The dependence of the loss on each linear: a few sequences forward and back, one layer in memory at a time.

An error in the output of one linear costs more than the same error in the output of another. To second order, and with
the outputs of a linear taken as independent, the rise of the loss is the mean squared derivative of the loss by that
output (the diagonal of the Fisher matrix) times the squared error, tr(ΔW H ΔWᵀ). That puts the errors of all linears in
one currency, which a budget needs. `docs/how-it-works.md` has the other currencies that were tried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lighten.compress.calibrate.sweep import Sweep
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate
from lighten.store.artifact import Artifact

HEAD_ROWS = 128
"""Number of positions whose logits are in memory at a time."""


class Sensitivities(Sweep):
    """The calibration set of a sweep. A few of its sequences are enough here."""

    kind: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 3

    sequences: int = Field(4, ge=1, description="samples to run forward and back")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the products of one pass forward and two passes back."""
        tokens = min(self.sequences * self.length, calibration_tokens)
        base = super().predict(facts, tokens)
        head = 6.0 * facts.vocab * facts.hidden * tokens
        layer = 4 * facts.layer_linear_params
        states = 4 * tokens * facts.hidden * facts.layers
        return Estimate(
            fast_flops=4 * base.fast_flops + head,
            peak_bytes=500_000_000 + 4 * facts.embedding_params + layer + states,
            disk_bytes=4 * facts.hidden**2 + 4 * facts.vocab,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the sensitivities of `source`."""
        import torch

        from lighten.compress.calibrate.expert_outputs import ExpertOutputs
        from lighten.model import anatomy
        from lighten.model.backward import Gradients
        from lighten.model.blockwise import BlockwiseModel
        from lighten.model.sensitivity import Sensitivity
        from lighten.model.tokens import calibration_ids

        ids = torch.from_numpy(calibration_ids(source.path, self.data, self.samples, self.length))
        ids = ids[:: -(-len(ids) // self.sequences)]
        model = BlockwiseModel(source.path, context.device, trust_remote_code=context.trust_remote_code)
        layers, facts = model.anatomy.layers, model.checkpoint.facts
        if any(linear.inside for layer in layers for linear in layer.linears):
            model.model.set_experts_implementation("eager")  # one product for each expert, which can be watched
        gradients = Gradients(model, ids)
        for done in gradients.forward():
            context.report(done + 1, 2 * len(layers), f"forward, layer {done + 1}/{len(layers)}")
        outputs: dict[str, float] = {}
        outputs[anatomy.HEAD], head_gram = gradients.from_head(HEAD_ROWS)
        heads: dict[str, list[float]] = {}
        for done, (index, block, run) in enumerate(gradients.back(), len(layers) + 1):
            hooks = []
            for linear in (each for each in layers[index].linears if each.inside is None):
                if linear.inside is not None:
                    continue  # a matrix of an expert is no module
                module = block.get_submodule(linear.module)
                hook = _collector(layers[index].prefix + linear.name, outputs, ids.numel())
                hooks.append(module.register_forward_hook(hook))
                if linear.name == anatomy.OUTPUT and linear.shape[1] % facts.heads == 0:
                    heads[str(index)] = importance = [0.0] * facts.heads
                    hooks.append(module.register_forward_hook(_of_heads(importance, ids.numel())))
            with ExpertOutputs(layers[index], block) as experts:
                run()
            outputs |= {layers[index].prefix + name: mean for name, mean in experts.means().items()}
            for each in hooks:
                each.remove()
            context.report(done, 2 * len(layers), f"back, layer {index + 1}/{len(layers)}")
        width = model.model.get_input_embeddings().weight.shape[-1]
        outputs[anatomy.EMBEDDING] = gradients.embedding_squares / (ids.numel() * width)
        counts = torch.bincount(ids.flatten(), minlength=facts.vocab).to(torch.int32)
        Sensitivity(outputs, head_gram, counts, ids.numel(), heads).write(out)
        return {"format": "sensitivity", "sequences": len(ids), "tokens": ids.numel()}


def _collector(name: str, squares: dict[str, float], tokens: int) -> Callable[[Any, Any, Any], None]:
    """Returns a forward hook that adds up the mean squares of the derivatives by a linear's output."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        if not output.requires_grad:  # nothing that it reads depends on the text
            return

        def add(gradient: Any) -> None:
            found = float(gradient.float().square().sum()) / (tokens * gradient.shape[-1])
            squares[name] = squares.get(name, 0.0) + found

        output.register_hook(add)

    return hook


def _of_heads(importance: list[float], tokens: int) -> Callable[[Any, Any, Any], None]:
    """Returns a forward hook that adds up |x · ∂loss / ∂x| of every head; x is its part of a linear's inputs.

    To first order this is the change of the loss if the head is removed (Michel et al., "Are Sixteen Heads Really
    Better than One?", 2019). They add it up by sequence; this function adds it up by token.
    """

    def hook(_module: Any, inputs: Any, _output: Any) -> None:
        (states,) = inputs
        if not states.requires_grad:
            return

        values = states.detach()  # a hook that held `states` would hold the graph that holds the hook, for ever

        def add(gradient: Any) -> None:
            each = (values.float() * gradient.float()).unflatten(-1, (len(importance), -1))
            found = each.sum(-1).abs().flatten(0, -2).sum(0) / tokens
            importance[:] = [old + new for old, new in zip(importance, found.tolist(), strict=True)]

        states.register_hook(add)

    return hook
