"""The calibration set for steps that run the model themselves, and which of its linears read one input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lighten.compress.calibrate.sweep import Sweep
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate
from lighten.store.artifact import Artifact


class Reads(Sweep):
    """A sweep over the first sample that sums nothing."""

    kind: ClassVar[str] = "reads"
    version: ClassVar[int] = 1

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the forward of one sample."""
        one = super().predict(facts, self.length)
        per_token = 2 * facts.layer_linear_params + 2 * self.length * facts.heads * facts.head_dim
        return Estimate(fast_flops=float(self.length * facts.layers * per_token), peak_bytes=one.peak_bytes)

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the token ids of the whole set, and which linears of a layer read one input.

        Raises:
            RequestError: the text is shorter than one sample, or the model runs a layer twice.
            Failure: weights are not finite.
        """
        from lighten.errors import RequestError
        from lighten.model.blockwise import BlockwiseModel
        from lighten.model.grams import GramWriter
        from lighten.observe.experts import experts_of
        from lighten.observe.gram import Readers

        model = BlockwiseModel(source.path, context.device, trust_remote_code=context.trust_remote_code)
        layers = model.anatomy.layers
        ids, targets = self.ids(source.path, context)
        told = {"samples": len(ids), "length": ids.shape[1], "tokens": ids.numel()}
        writer = GramWriter(out, [layer.prefix for layer in layers], told)
        first = None if targets is None else targets[:1]
        for done, (index, block, turn) in enumerate(model.turns(ids[:1], targets=first), 1):
            if index < len(writer):
                raise RequestError(f"{source.path} runs a layer twice ({turn.name}): it cannot be swept")
            readers = Readers()
            hooks = [
                block.get_submodule(linear.module).register_forward_pre_hook(readers.hook(linear.name))
                for linear in layers[index].linears
                if linear.inside is None
            ]
            for call in turn.calls:
                turn.answer(call)
            for hook in hooks:
                hook.remove()
            for stack in experts_of(layers[index], block, context.device):
                for expert in stack.experts:
                    for part in filter(None, (expert.first, expert.last)):
                        readers.read_by |= dict.fromkeys((each.name for each in part), part[0].name)
            writer.add({}, readers.read_by)
            layers[index].leave_unread(readers.read_by)
            context.report(done, len(layers), f"layer {done}/{len(layers)}")
        writer.index["anatomy"] = model.anatomy.as_json()
        writer.close(ids, [], targets)
        return {"format": "grams", "samples": len(ids), "tokens": ids.numel()}
