"""Distillation of a sequence-to-sequence model: it learns from its teacher's tokens, translations or states."""

from __future__ import annotations

import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lighten.compress.distill.pair_teacher import open_model, read_pairs
from lighten.compress.distill.settings import Distill, Shape
from lighten.errors import RequestError
from lighten.model import accelerator
from lighten.model.checkpoint import Checkpoint
from lighten.model.depth import with_layers
from lighten.model.empty import quiet
from lighten.model.pair_training import IGNORED, Batch, PairSet, batches, losses_by_step
from lighten.step import Context
from lighten.store.artifact import Artifact

POINTS = 50
"""Number of points of the loss curve."""


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
    if isinstance(step.student, Shape) and step.student.layers:
        student = with_layers(student, step.student.layers)
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
    trainer = _Trainer(step, student, open_model(context.teacher, context).eval(), context)
    trainer.run(sets[0], sets[1] if held else None)
    with quiet():
        student.eval().save_pretrained(out)
    for file in sorted(source.path.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "artifact.json" and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    return {
        "format": "hf",
        "dtype": "float32",
        "params": student.num_parameters(),
        "steps": trainer.steps,
        "training": {"curve": trainer.curve, "validation": trainer.checks},
    }


class _Trainer:
    """The student and its teacher, and what was seen on the way."""

    def __init__(self, step: Distill, student: Any, teacher: Any, context: Context) -> None:
        self.step, self.student, self.teacher, self.context = step, student, teacher, context
        self.steps = 0
        self.curve: list[dict[str, float]] = []
        self.checks: list[dict[str, float]] = []
        self._seen: list[tuple[float, float]] = []
        self._best: tuple[float, dict[str, torch.Tensor]] | None = None

    @property
    def _taught(self) -> bool:
        return self.step.alpha > 0 and self.step.level == "token"

    def run(self, pairs: PairSet, held: PairSet | None) -> None:
        """Trains to the end. Then the student has its best weights."""
        step = self.step
        self.steps = step.steps or max(1, round(step.epochs * (len(pairs) // step.batch)))
        weights = list(self.student.parameters())
        optimizer = torch.optim.AdamW(
            weights, lr=step.lr, betas=(0.9, step.beta2), weight_decay=step.weight_decay, fused=True
        )
        plan = (batch.on(self.context.device) for batch in islice(batches(pairs, step.batch, step.seed), self.steps))
        every, look = max(1, self.steps // POINTS), step.validate_every or max(1, self.steps // 10)
        losses = losses_by_step(
            plan, self._loss, optimizer, weights, rate=step.lr, steps=self.steps, clip=step.clip, warmup=step.warmup
        )
        self.student.train()
        for done, value in enumerate(losses, 1):
            self.context.report(done, self.steps, f"step {done}/{self.steps}, loss {value:.3f}")
            if done % every == 0 or done == self.steps:
                self._note(done)
            if held and (done % look == 0 or done == self.steps):
                self._look(done, held)
        if self._best:
            self.student.load_state_dict(self._best[1])

    def _note(self, done: int) -> None:
        count = len(self._seen)
        loss, ce = (sum(each[place] for each in self._seen) / count for place in (0, 1))
        self._seen.clear()
        self.curve.append({"step": done, "loss": float(f"{loss:.6g}"), "ce": float(f"{ce:.6g}")})

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Returns α · T² · KL(teacher ‖ student) + (1 − α) · CE + β · distance of states, by position."""
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
        self._seen.append((float(loss.detach()), float(ce.detach())))
        return loss

    @torch.no_grad()
    def _look(self, done: int, held: PairSet) -> None:
        """Measures the perplexity of the held-out targets, and keeps the weights if they are the best so far."""
        self.student.eval()
        total, count = 0.0, 0
        for start in range(0, len(held), self.step.batch):
            chosen = list(range(start, min(start + self.step.batch, len(held))))
            batch = held.batch(chosen).on(self.context.device)
            logits = self.student(**batch.inputs, use_cache=False).logits
            total += float(
                functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
            )
            count += int((batch.labels != IGNORED).sum())
        self.student.train()
        found = math.exp(min(total / count, 700.0))
        self.checks.append({"step": done, "perplexity": float(f"{found:.6g}")})
        if self._best is None or found < self._best[0]:
            self._best = found, {name: tensor.clone() for name, tensor in self.student.state_dict().items()}


def _distance(ours: Any, theirs: Any, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared distance of states, relative to the teacher's mean square.

    A student's layer is compared with the teacher's layer that is as far along its stack.
    """
    parts = []
    for name, mask in (("encoder_hidden_states", source), ("decoder_hidden_states", target)):
        student, teacher = getattr(ours, name), getattr(theirs, name)
        for layer in range(1, len(student)):
            other = teacher[round(layer * (len(teacher) - 1) / (len(student) - 1))][mask]
            parts.append((student[layer][mask] - other).square().mean() / other.square().mean())
    return torch.stack(parts).mean()
