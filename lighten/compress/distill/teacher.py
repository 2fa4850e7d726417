"""The teacher's distributions for a text, stored once: the stage that every epoch of a distillation reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lighten.data import text
from lighten.data.origin import Data, Origin
from lighten.errors import Failure, RequestError
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate, Step
from lighten.store.artifact import Artifact

if TYPE_CHECKING:
    import torch

    from lighten.compress.distill.losses import Targets

FILE = "teacher.json"
PER_FILE = 32
"""Number of sequences in one file."""
PROMPT = 16
"""Number of tokens of the text with which a sequence by the teacher begins."""


class Teacher(Step):
    """A text cut into sequences, or sequences that the teacher writes, with its likeliest next tokens."""

    kind: ClassVar[str] = "teacher"
    version: ClassVar[int] = 1

    data: Data = "builtin"
    samples: int | None = Field(None, ge=1, description="sequences; none: as many as the text has")
    length: int = Field(256, ge=8)
    written: int = Field(0, ge=0, description="sequences that the teacher adds, each begun by a few tokens of the text")
    top_k: int = Field(64, ge=0, description="0: only the tokens, for a teacher that runs along")
    temperature: float = Field(1.0, gt=0)
    validation: float = Field(0.0, ge=0, le=0.5, description="share of the text that is held out: no prompt is of it")
    seed: int = 0
    rows: int | None = Field(None, ge=1, description="of its head that are tokens; the other rows pad it; none: all")

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the text itself instead of its name."""
        left_out = {"rows"} if self.rows is None else set()  # it came later
        return {
            **self.model_dump(exclude=left_out),
            "data": text.identity(self.data, "calibration", text.wanted_letters(self.samples, self.length)),
        }

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns one forward pass over the text, and a step for every token that is written."""
        if not self.top_k and not self.written:  # only the text is cut
            return Estimate(peak_bytes=300_000_000)
        tokens = (
            self.samples
            or text.count_letters(self.data, "calibration", text.wanted_letters(self.samples, self.length))
            // 4
            // self.length
        ) * self.length
        tokens += self.written * self.length
        flops = 2.0 * (facts.layers * facts.layer_linear_params + facts.vocab * facts.hidden) * tokens
        steps = self.length * self.written / 64
        return Estimate(
            fast_flops=flops * (2 if self.written else 1),
            seconds=steps * 2.0 * facts.params / 10e9,
            peak_bytes=600_000_000 + 2 * facts.params + 8 * 512 * facts.vocab,
            disk_bytes=tokens * (8 + 6 * self.top_k),
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes token ids and the teacher's distributions.

        Raises:
            RequestError: the text is shorter than one sequence.
        """
        import torch

        from lighten.model import accelerator
        from lighten.model.checkpoint import Checkpoint

        accelerator.deterministic(context.device)
        facts = Checkpoint(source.path).facts
        top_k = self.top_k if facts.task == "causal" else 0  # encoders run along
        if self.written and facts.task != "causal":
            raise RequestError(
                f"{facts.architecture} writes no text: leave out level: sequence and written, and learn from what it "
                "gives for the text"
            )
        ids = _sequences(source.path, self.data, self.samples, self.length, context.warnings)
        with torch.inference_mode():
            model = open_teacher(source.path, context, self.rows) if top_k or self.written else None
            count = len(ids)
            held = max(1, round(self.validation * count)) if self.validation else 0
            if self.written:
                assert model
                ids = torch.cat([ids, _write(model, ids[: max(1, count - held)], self, context)])
            if model and top_k:
                _describe(model, ids, self, out, context)
            else:
                _save(out, 0, {"ids": ids.int()})
        told = {
            "sequences": len(ids),
            "of_the_text": count,
            "held_out": held,
            "length": self.length,
            "top_k": top_k,
        }
        (out / FILE).write_text(json.dumps(told) + "\n")
        return {"format": "teacher", **told, "temperature": self.temperature}


def _sequences(
    model: Path, data: str | Origin | Sequence[Origin], samples: int | None, length: int, warnings: list[str]
) -> torch.Tensor:
    import torch

    from lighten.model.tokens import calibration_ids

    return torch.from_numpy(calibration_ids(model, data, samples, length, warnings))


def open_teacher(path: Path, context: Context, rows: int | None = None) -> Any:
    """Returns a whole model in the fastest type of the machine. Its head keeps `rows` rows."""
    from transformers import AutoModelForCausalLM

    from lighten.compress.distill.ends import head_of
    from lighten.model import attention
    from lighten.model.loading import from_pretrained
    from lighten.model.stream import fast_dtype

    model: Any = (
        from_pretrained(
            AutoModelForCausalLM,
            path,
            dtype=fast_dtype(context.device),
            trust_remote_code=context.trust_remote_code,
        )
        .to(context.device)
        .eval()
    )
    model.set_attn_implementation(attention.suited(model))
    head = head_of(model)
    if rows is not None and rows < head.out_features:
        model.set_output_embeddings(_cut(head, rows))
    return model


def _cut(head: Any, rows: int) -> Any:
    """Returns the first rows of a head. The rows after them are padding."""
    import torch

    bias = None if head.bias is None else head.bias.detach()[:rows]
    made = torch.nn.Linear(head.in_features, rows, bias=bias is not None, device="meta")
    made.weight = torch.nn.Parameter(head.weight.detach()[:rows], requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made


def last_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the inputs of the head, `[samples, length, hidden]`."""
    from lighten.compress.distill.ends import run_body

    states: torch.Tensor = run_body(model, ids).last_hidden_state
    return states


def _describe(model: Any, ids: torch.Tensor, step: Teacher, out: Path, context: Context) -> None:
    import torch

    from lighten.compress.distill.ends import behind_of, head_of
    from lighten.compress.distill.losses import ROWS, top

    head, behind = head_of(model), behind_of(model)
    for first in range(0, len(ids), PER_FILE):
        part = ids[first : first + PER_FILE]
        tokens = torch.empty(*part.shape, step.top_k, dtype=torch.int32)
        log_probs = torch.empty(*part.shape, step.top_k, dtype=torch.float16)
        rest = torch.empty(part.shape, dtype=torch.float16)
        for row, sequence in enumerate(part):
            states = last_states(model, sequence[None].to(context.device))[0]
            for start in range(0, len(states), ROWS):
                rows = slice(start, start + ROWS)
                logits = head(states[rows])
                found = top(behind(logits.float()) if behind else logits, step.top_k, step.temperature)
                tokens[row, rows] = found.tokens.int().cpu()
                log_probs[row, rows] = found.log_probs.half().cpu()
                rest[row, rows] = found.rest.half().cpu()
            done = first + row + 1
            context.report(done, len(ids), f"asking the teacher, sequence {done}/{len(ids)}")
        _save(out, first // PER_FILE, {"ids": part.int(), "tokens": tokens, "log_probs": log_probs, "rest": rest})


def _write(model: Any, ids: torch.Tensor, step: Teacher, context: Context) -> torch.Tensor:
    """Returns sequences that the teacher writes. Each begins with some tokens of the text."""
    import torch

    from lighten.model.writing import write

    generator = torch.Generator().manual_seed(step.seed)
    flat = ids.flatten()
    begin = min(PROMPT, step.length // 2)
    places = torch.randint(0, max(1, len(flat) - begin), (step.written,), generator=generator)
    prompts = torch.stack([flat[place : place + begin] for place in places.tolist()])
    total = step.written * step.length

    def report(done: int) -> None:
        context.report(done, total, f"the teacher writes, {done:,} of {total:,} tokens")

    return write(model, prompts, step.length, generator, report)


def _save(out: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, out / f"part-{number:05d}.safetensors")


class Lessons:
    """The output of a `Teacher` stage: token ids, and the teacher's distributions by sequence."""

    def __init__(self, folder: Path) -> None:
        """Opens the output of the stage.

        Raises:
            Failure: the directory holds no such stage.
        """
        import torch
        from safetensors.torch import load_file

        try:
            self.facts: dict[str, Any] = json.loads((folder / FILE).read_text())
            parts = [load_file(file) for file in sorted(folder.glob("part-*.safetensors"))]
        except (OSError, ValueError) as error:
            raise Failure(f"{folder} does not hold a teacher's lessons: {error}") from error
        self.ids = torch.cat([part["ids"] for part in parts]).long()
        """`[sequences, length]`."""
        self._parts = [part for part in parts if "tokens" in part]

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self, sequence: int) -> Targets | None:
        """Returns the teacher's distributions of a sequence, `[length - 1]` of them; None if none were stored."""
        from lighten.compress.distill.losses import Targets

        if not self._parts:
            return None
        part, row = self._parts[sequence // PER_FILE], sequence % PER_FILE
        return Targets(
            part["tokens"][row, :-1].long(), part["log_probs"][row, :-1].float(), part["rest"][row, :-1].float()
        )


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yields, without end, the sequences of the next batch. Every epoch has an order of its own.

    Raises:
        RequestError: there are fewer sequences than a batch holds.
    """
    import torch

    if count < size:
        raise RequestError(
            f"the text gives {count} sequences to train on, fewer than a batch of {size}: give a longer text, "
            "a smaller length or a smaller batch"
        )
    epoch = 0
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
        epoch += 1
