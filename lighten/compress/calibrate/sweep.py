"""One pass of the calibration data through the model, layer by layer, that computes every Gram."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lighten.data import pairs
from lighten.data.origin import Data
from lighten.data.text import identity, wanted_letters
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate, Step
from lighten.store.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from lighten.model.discovery import Layer
    from lighten.model.grams import GramWriter
    from lighten.model.suspension import Call, Turn


ANGLES = 1024
"""Number of tokens that the angles between layers are measured on."""
STATES = "states"
"""Name of a file that is there during the sweep."""


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
        from lighten.compress.prune.structured import angular_distances
        from lighten.model.blockwise import BlockwiseModel
        from lighten.model.grams import GramWriter, expert_tokens

        ids, targets = self.ids(source.path, context)
        model = BlockwiseModel(source.path, context.device, trust_remote_code=context.trust_remote_code)
        layers = model.anatomy.layers
        told = {"samples": len(ids), "length": ids.shape[1], "tokens": ids.numel()}
        writer = GramWriter(out, [layer.prefix for layer in layers], told)
        stream = _Stream(out / STATES, [len(batch) for batch in model.batches(ids)])
        start = time.monotonic()

        def report(number: int, part: float) -> None:
            rate = part * ids.numel() / (time.monotonic() - start) / len(layers)
            note = f"layer {number + 1}/{len(layers)}, {rate:,.0f} tok/s"
            context.report(int(part * 1000), len(layers) * 1000, note)

        for number, (index, block, turn) in enumerate(model.turns(ids, targets=targets)):
            if index < len(writer):
                raise RequestError(f"{source.path} runs a layer twice ({turn.name}): it cannot be swept")
            for done in _add_layer(writer, layers[index], block, _passing(turn, stream), context.device):
                report(number, number + done / len(turn.calls))
            layers[index].leave_unread(writer.index["layers"][index]["inputs"])
        writer.index["anatomy"] = model.anatomy.as_json()
        writer.close(ids, angular_distances(stream.places(), context.device), targets)
        stream.remove()
        return {
            "format": "grams",
            "samples": len(ids),
            "tokens": ids.numel(),
            "arithmetic": str(model.dtype).removeprefix("torch."),
            **({"experts": seen.as_json()} if (seen := expert_tokens(out)) else {}),
        }

    def ids(self, model: Path, context: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the ids that a model reads, `[samples, length]`, and those that its decoder reads, if it has pairs.

        Models that are not causal take no more tokens than they have positions.
        """
        import torch

        from lighten.model.checkpoint import Checkpoint
        from lighten.model.tokens import calibration_ids, paired_ids

        facts = Checkpoint(model).facts
        length = self.length if facts.task == "causal" else min(self.length, facts.context or self.length)
        targets = None
        if pairs.is_pairs(self.data) and facts.task == "seq2seq":
            sources, read = paired_ids(model, str(self.data), self.samples, length)
            ids, targets = torch.from_numpy(sources), torch.from_numpy(read)
        else:
            ids = torch.from_numpy(calibration_ids(model, self.data, self.samples, length, context.warnings))
        if len(ids) < self.samples:
            context.warnings.append(
                f"the text holds {len(ids)} samples of {ids.shape[1]} tokens, not {self.samples}; all were used"
            )
        return ids, targets


def _passing(turn: Turn, stream: _Stream) -> Iterator[int]:
    """Runs a block for one batch after the other; yields the number of those that are done."""
    stream.enter(turn.calls)
    for done, call in enumerate(turn.calls, 1):
        turn.answer(call)
        stream.leave(call)
        turn.go_on(call)
        yield done
    stream.close()


def _add_layer(
    writer: GramWriter, layer: Layer, block: nn.Module, passing: Iterator[int], device: str
) -> Iterator[int]:
    """Writes the Grams of a layer while batches pass its block; yields the number of those that are done."""
    from lighten.observe.experts import experts_of
    from lighten.observe.gram import LayerInputs

    inputs = LayerInputs(device)
    hooks = [
        block.get_submodule(linear.module).register_forward_pre_hook(inputs.hook(linear.name))
        for linear in layer.linears
        if linear.inside is None
    ]
    stacks = experts_of(layer, block, device)
    hooks += [stack.module.register_forward_pre_hook(stack.hook(), with_kwargs=True) for stack in stacks]
    for done in passing:
        inputs.end_batch()
        yield done
    for hook in hooks:
        hook.remove()
    writer.add(inputs.grams, inputs.read_by)
    for stack in stacks:
        for expert, tokens, grams in stack.grams():
            readers = {each.name: expert.first[0].name for each in expert.first}
            readers |= {each.name: expert.last[0].name for each in expert.last}
            writer.add_expert(expert.number, tokens, grams, readers)


def _states(values: tuple[Any, ...]) -> torch.Tensor:
    """Returns the hidden states among the arguments or answers of a block: the first tensor."""
    import torch

    for value in values:
        found = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            return found
    raise TypeError("a block without states")


class _Stream:
    """The residual stream before every layer and after the last, at some tokens that are evenly spread.

    They are enough for the angles between layers. They lie in a file, for there are many layers.
    """

    def __init__(self, file: Path, rows: list[int]) -> None:
        """`rows` are the numbers of samples in each batch."""
        self._file, self._rows = file, rows
        self._shapes: list[torch.Size] = []
        self._parts: list[torch.Tensor] = []
        self._seen = 0

    def enter(self, calls: Sequence[Call]) -> None:
        """Begins the turn of a layer. Before the first, copies from what every batch gives to it."""
        if not self._shapes:
            for call in calls:
                self._take(call.batch, call.args or tuple(call.kwargs.values()))
            self.close()

    def leave(self, call: Call) -> None:
        """Copies from what the layer gave to one batch."""
        self._take(call.batch, (call.answer,))

    def close(self) -> None:
        """Ends the turn of a layer."""
        import torch

        found = torch.cat(self._parts).cpu()
        self._shapes.append(found.shape)
        self._dtype = found.dtype
        with self._file.open("ab") as file:
            found.view(torch.uint8).numpy().tofile(file)
        self._parts.clear()
        self._seen = 0

    def places(self) -> list[torch.Tensor]:
        """Returns them, `[tokens, hidden]` each, mapped."""
        import torch

        sizes = [shape.numel() for shape in self._shapes]
        whole = torch.from_file(str(self._file), shared=False, size=sum(sizes), dtype=self._dtype)
        return [part.view(shape) for part, shape in zip(torch.split(whole, sizes), self._shapes, strict=True)]

    def remove(self) -> None:
        """Removes the file."""
        self._file.unlink()

    def _take(self, batch: int, values: tuple[Any, ...]) -> None:
        hidden = _states(values)
        states = hidden.reshape(-1, hidden.shape[-1])
        tokens = len(states) * sum(self._rows) // self._rows[batch]
        step = -(-tokens // ANGLES)
        self._parts.append(states[-self._seen % step :: step].clone())
        self._seen += len(states)
