"""Distillation of a sequence-to-sequence model: it learns from its teacher's tokens, translations or states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lighten.compress.distill.pair_teacher import open_model, read_pairs
from lighten.compress.distill.settings import Distill, Shape
from lighten.compress.distill.whole_training import WholeTrainer, distance, perplexity, shorter
from lighten.errors import RequestError
from lighten.model import accelerator
from lighten.model.checkpoint import Checkpoint
from lighten.model.pair_training import IGNORED, Batch, PairSet, batches
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Distill, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Trains a student on pairs, and writes its weights from when it did best on the held-out pairs.

    Raises:
        RequestError: there are fewer pairs than a batch holds.
        Failure: the loss is no number.
    """
    from transformers import AutoTokenizer

    assert context.teacher and context.lessons
    accelerator.deterministic(context.device)
    torch.manual_seed(step.seed)
    student = open_model(source.path, context)
    student = shorter(student, step.student.layers if isinstance(step.student, Shape) else None)
    tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    pairs = read_pairs(context.lessons)
    held = max(1, round(step.validation * len(pairs))) if step.validation else 0
    if len(pairs) - held < step.batch:
        raise RequestError(
            f"{len(pairs) - held} pairs are left to train on, fewer than a batch of {step.batch}: give more pairs or a "
            "smaller batch"
        )
    most = min(step.length, Checkpoint(source.path).facts.context or step.length)
    sets = [PairSet.read(tokenizer, part, student.config, most) for part in (pairs[held:], pairs[:held]) if part]
    teacher = open_model(context.teacher, context).eval()
    trainer = _Trainer(step, student, teacher, context, sets[0], sets[1] if held else None)
    return trainer.made(len(sets[0]) // step.batch, source.path, out)


class _Trainer(WholeTrainer[Batch]):
    """Learns tokens, the teacher's distributions and its states."""

    def __init__(
        self, step: Distill, student: Any, teacher: Any, context: Context, pairs: PairSet, held: PairSet | None
    ) -> None:
        super().__init__(step, student, teacher, context)
        self.pairs, self.held = pairs, held

    @property
    def _taught(self) -> bool:
        return self.step.alpha > 0 and self.step.level == "token"

    def plan(self) -> Iterator[Batch]:
        return (batch.on(self.context.device) for batch in batches(self.pairs, self.step.batch, self.step.seed))

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns α · T² · KL(teacher ‖ student) + (1 − α) · CE + β · distance of states, by position; and CE."""
        step = self.step
        ours = self.student(**batch.inputs, use_cache=False, output_hidden_states=bool(step.beta))
        wanted = batch.labels != IGNORED
        ce = functional.cross_entropy(ours.logits[wanted], batch.labels[wanted])
        alpha = step.alpha if self._taught else 0.0
        loss = (1 - alpha) * ce
        if alpha or step.beta:
            with torch.no_grad():
                theirs = self.teacher(**batch.inputs, use_cache=False, output_hidden_states=bool(step.beta))
            if alpha:
                rows = min(ours.logits.shape[-1], theirs.logits.shape[-1])  # the rest pads one of the two
                student, teacher = (
                    functional.log_softmax(each.logits[wanted][:, :rows] / step.temperature, -1)
                    for each in (ours, theirs)
                )
                kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
                loss = loss + alpha * step.temperature**2 * kl
            if step.beta:
                loss = loss + step.beta * _distance(ours, theirs, batch.inputs["attention_mask"].bool(), wanted)
        return loss, ce

    def look(self) -> dict[str, float] | None:
        """Returns the perplexity of the held-out targets."""
        if self.held is None:
            return None
        total, count = 0.0, 0
        for start in range(0, len(self.held), self.step.batch):
            chosen = list(range(start, min(start + self.step.batch, len(self.held))))
            batch = self.held.batch(chosen).on(self.context.device)
            logits = self.student(**batch.inputs, use_cache=False).logits
            total += float(
                functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
            )
            count += int((batch.labels != IGNORED).sum())
        return {"perplexity": perplexity(total, count)}


def _distance(ours: Any, theirs: Any, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean distance of the states of both stacks."""
    parts = []
    for name, mask in (("encoder_hidden_states", source), ("decoder_hidden_states", target)):
        parts += distance(getattr(ours, name), getattr(theirs, name), mask)
    return torch.stack(parts).mean()
