"""One pass of the calibration data through the model, layer by layer, that computes every Gram."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lighten.data.origin import Data
from lighten.data.text import identity, wanted_letters
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate, Step
from lighten.store.artifact import Artifact

if TYPE_CHECKING:
    import torch


ANGLES = 1024
"""Number of tokens that the angles between layers are measured on."""


class Sweep(Step):
    """The calibration set, and the sweep over it."""

    kind: ClassVar[str] = "sweep"
    version: ClassVar[int] = 3

    data: Data = Field(
        "builtin", description="builtin, a file (.txt, .md, .jsonl, .json, .csv, .parquet) or a hub data set"
    )
    samples: int = Field(64, ge=1, description="sequences to run through the model")
    length: int = Field(512, ge=8, description="tokens of a sequence")

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the text itself instead of its name."""
        return {
            **self.model_dump(),
            "data": identity(self.data, "calibration", wanted_letters(self.samples, self.length)),
        }

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the forward products and the symmetric Gram updates of every layer."""
        attention = 2 * self.length * facts.heads * facts.head_dim
        per_token = 2 * facts.layer_linear_params + attention + 2 * facts.gram_elements
        hidden = calibration_tokens * facts.hidden * 2
        layer = 2 * facts.layer_linear_params * 2 + facts.gram_elements * 4
        return Estimate(
            fast_flops=float(calibration_tokens * facts.layers * per_token),
            peak_bytes=450_000_000 + facts.embedding_params * 2 + hidden + layer,
            disk_bytes=facts.layers * facts.gram_elements * 4,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the Grams of every layer of `source`.

        Raises:
            RequestError: the text is shorter than one sample.
            Failure: weights are not finite.
        """
        import torch

        from lighten.compress.calibrate.gram import LayerInputs
        from lighten.compress.prune.structured import angular_distances
        from lighten.model.anatomy import LAYERS
        from lighten.model.grams import GramWriter
        from lighten.model.stream import StreamedModel, batch_of
        from lighten.model.tokens import calibration_ids

        ids = torch.from_numpy(calibration_ids(source.path, self.data, self.samples, self.length, context.warnings))
        if len(ids) < self.samples:
            context.warnings.append(
                f"the text holds {len(ids)} samples of {self.length} tokens, not {self.samples}; all were used"
            )
        model = StreamedModel(source.path, context.device, trust_remote_code=context.trust_remote_code)
        hidden, arguments = model.embed(ids)
        writer = GramWriter(out, LAYERS, {"samples": len(ids), "length": self.length, "tokens": ids.numel()})
        states = [_some(hidden)]
        start = time.monotonic()
        for index, layer in model.stream():
            inputs = LayerInputs(context.device)
            hooks = [
                module.register_forward_pre_hook(inputs.hook(name))
                for name, module in layer.named_modules()
                if isinstance(module, torch.nn.Linear)
            ]
            batch = batch_of(context.device, self.length)
            with torch.inference_mode():
                for first in range(0, len(ids), batch):
                    part = hidden[first : first + batch].to(context.device)
                    hidden[first : first + batch] = layer(part, **arguments[index])
                    inputs.end_batch()
                    done = index + min(1.0, (first + batch) / len(ids))
                    rate = done * ids.numel() / (time.monotonic() - start) / len(model.layers)
                    note = f"layer {index + 1}/{len(model.layers)}, {rate:,.0f} tok/s"
                    context.report(int(done * 1000), len(model.layers) * 1000, note)
            for hook in hooks:
                hook.remove()
            writer.add(inputs.grams, inputs.read_by)
            states.append(_some(hidden))
        writer.close(ids, angular_distances(states))
        return {
            "format": "grams",
            "samples": len(ids),
            "tokens": ids.numel(),
            "arithmetic": str(model.dtype).removeprefix("torch."),
        }


def _some(hidden: torch.Tensor) -> torch.Tensor:
    """Returns a copy of the states of some tokens, evenly spread, which are enough for the angles between layers."""
    states = hidden.flatten(0, 1)
    return states[:: -(-len(states) // ANGLES)].clone()
