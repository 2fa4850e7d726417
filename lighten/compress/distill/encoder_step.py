"""Distillation of an encoder: it learns from its teacher's embeddings or filled gaps, and from its hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lighten.compress.distill.settings import Distill, Shape
from lighten.compress.distill.teacher import Lessons, batches
from lighten.compress.distill.whole_training import WholeTrainer, distance, perplexity, shorter
from lighten.errors import RequestError
from lighten.facts import TITLES, Task
from lighten.model import accelerator
from lighten.model.auto_classes import AUTO
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import quiet
from lighten.model.loading import from_pretrained
from lighten.model.pooling import takes_first
from lighten.step import Context
from lighten.store.artifact import Artifact

HIDDEN = 0.15
"""Share of the tokens that are hidden (Devlin et al., "BERT", 2018)."""
PER_SEED = 1_000_003


def run(step: Distill, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Trains a student on sequences of a text, and writes its weights from when it did best on those held out.

    Raises:
        RequestError: the teacher is for something else, or there are fewer sequences than a batch holds.
        Failure: the loss is no number.
    """
    assert context.teacher and context.lessons
    facts, theirs = Checkpoint(source.path).facts, Checkpoint(context.teacher).facts
    if facts.task != theirs.task:
        raise RequestError(
            f"the student is {TITLES[facts.task]} and its teacher {TITLES[theirs.task]}: take two of one kind"
        )
    accelerator.deterministic(context.device)
    torch.manual_seed(step.seed)
    student = _open(source.path, facts.task, context)
    student = shorter(student, step.student.layers if isinstance(step.student, Shape) else None)
    teacher = _open(context.teacher, facts.task, context).eval()
    texts = Texts.read(source.path, Lessons(context.lessons), facts.context, context.device)
    kind = _Filler if facts.task == "masked" else _Embedder
    trainer = kind(step, student, teacher, context, texts)
    trainer.first = takes_first(source.path)
    count = len(texts.ids) - texts.held
    next(batches(count, step.batch, step.seed))
    return trainer.made(count // step.batch, source.path, out)


def _open(path: Path, task: Task, context: Context) -> Any:
    import transformers

    with quiet():
        model: Any = from_pretrained(
            getattr(transformers, AUTO[task]),
            path,
            dtype=torch.float32,
            trust_remote_code=context.trust_remote_code,
        )
    return model.to(context.device)


@dataclass(frozen=True)
class Texts:
    """Sequences as an encoder reads them, between its special tokens."""

    ids: torch.Tensor
    """`[sequences, length]`. The last `held` are held out."""
    held: int
    gap: int | None
    """Token of a gap."""

    @staticmethod
    def read(model: Path, lessons: Lessons, context: int | None, device: str) -> Texts:
        """Returns the sequences of a `Teacher` stage between the special tokens of a tokenizer."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        around = [each for each in (first, last) if each is not None]
        ids = lessons.ids[:, : context - len(around)] if context else lessons.ids
        parts = [ids]
        for place, token in ((0, first), (1, last)):
            if token is not None:
                parts.insert(0 if place == 0 else len(parts), torch.full_like(ids[:, :1], token))
        return Texts(torch.cat(parts, 1).to(device), lessons.facts["held_out"], tokenizer.mask_token_id)


class _Encoders(WholeTrainer[list[int]]):
    """The part that both kinds share."""

    first = False
    """Whether an embedding is the state of the first token."""

    def __init__(self, step: Distill, student: Any, teacher: Any, context: Context, texts: Texts) -> None:
        super().__init__(step, student, teacher, context)
        self.texts = texts
        self.held = list(range(len(texts.ids) - texts.held, len(texts.ids)))

    def plan(self) -> Iterator[list[int]]:
        return batches(len(self.texts.ids) - self.texts.held, self.step.batch, self.step.seed)

    def _both(self, ids: torch.Tensor) -> tuple[Any, Any]:
        how = {"input_ids": ids, "output_hidden_states": bool(self.step.beta)}
        with torch.no_grad():
            theirs = self.teacher(**how)
        return self.student(**how), theirs

    def _states(self, ours: Any, theirs: Any, ids: torch.Tensor) -> torch.Tensor:
        """Returns β · the distance of hidden states."""
        if not self.step.beta:
            return torch.zeros((), device=ids.device)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        parts = distance(ours.hidden_states, theirs.hidden_states, everywhere)
        return self.step.beta * torch.stack(parts).mean()

    def _held_out(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.held), self.step.batch):
            yield self.texts.ids[self.held[start : start + self.step.batch]]


class _Embedder(_Encoders):
    """Learns the direction of embeddings: α · (1 − cosine) + β · distance of states."""

    def _cosines(self, ours: Any, theirs: Any) -> torch.Tensor:
        mine, other = (
            each.last_hidden_state[:, 0] if self.first else each.last_hidden_state.mean(1) for each in (ours, theirs)
        )
        if mine.shape != other.shape:
            raise RequestError(
                f"embeddings of {mine.shape[-1]} numbers cannot learn from those of {other.shape[-1]}: take a teacher "
                "of the same width"
            )
        return functional.cosine_similarity(mine, other, dim=-1)

    def loss(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.texts.ids[batch]
        ours, theirs = self._both(ids)
        off = 1 - self._cosines(ours, theirs).mean()
        return self.step.alpha * off + self._states(ours, theirs, ids), off

    def look(self) -> dict[str, float] | None:
        found = [self._cosines(self.student(input_ids=ids), self.teacher(input_ids=ids)) for ids in self._held_out()]
        return {"cosine": float(torch.cat(found).mean())} if found else None


class _Filler(_Encoders):
    """Learns to fill gaps: α · T² · KL(teacher ‖ student) + (1 − α) · CE at hidden tokens + β · distance of states."""

    def _hide(self, ids: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids with gaps, and where they are: at the share `HIDDEN` of all tokens but the first and last."""
        if self.texts.gap is None:
            raise RequestError("the tokenizer has no token for a gap: name one as mask_token")
        chance = torch.Generator().manual_seed(self.step.seed * PER_SEED + number)
        order = torch.rand(ids.shape, generator=chance)
        order[:, [0, -1]] = 2.0
        count = max(1, round(HIDDEN * (ids.shape[1] - 2)))
        places = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, order.argsort(1)[:, :count], True)
        places = places.to(ids.device)
        return ids.masked_fill(places, self.texts.gap), places

    def loss(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        step, ids = self.step, self.texts.ids[batch]
        read, places = self._hide(ids, self.done)
        ours, theirs = self._both(read)
        ce = functional.cross_entropy(ours.logits[places], ids[places])
        rows = min(ours.logits.shape[-1], theirs.logits.shape[-1])  # the rest pads one of the two
        student, teacher = (
            functional.log_softmax(each.logits[places][:, :rows] / step.temperature, -1) for each in (ours, theirs)
        )
        kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = step.alpha * step.temperature**2 * kl + (1 - step.alpha) * ce + self._states(ours, theirs, ids)
        return loss, ce

    def look(self) -> dict[str, float] | None:
        total, count = 0.0, 0
        for number, ids in enumerate(self._held_out()):
            read, places = self._hide(ids, -1 - number)
            logits = self.student(input_ids=read).logits[places]
            total += float(functional.cross_entropy(logits, ids[places], reduction="sum"))
            count += int(places.sum())
        return {"perplexity": perplexity(total, count)} if count else None
