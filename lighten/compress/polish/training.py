"""The training of the scales. They are the same whether or not it was interrupted."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lighten.compress.distill.checkpoints import Checkpoints, Tensors, Told, into_optimizer, of_optimizer
from lighten.compress.distill.ends import run_body
from lighten.compress.distill.student import finite
from lighten.compress.distill.teacher import Lessons, batches
from lighten.compress.polish.divergence import divergence
from lighten.compress.polish.student import Source, Student
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf_header import within
from lighten.numerics.rates import share_of_rate
from lighten.process.isolate import keep_freed_memory
from lighten.step import Context

if TYPE_CHECKING:
    from lighten.compress.polish.settings import Polish

POINTS = 200
"""Maximum number of points of the loss curve, about."""
WORTH = 4
"""Passes over a sequence in a step of training: forward twice, and backward. Progress counts them."""


class Trainer:
    """One training of scales, from its first step or from where it was interrupted."""

    def __init__(self, step: Polish, lessons: Lessons, context: Context, folder: Path) -> None:
        """Prepares the training. `folder` keeps the checkpoints, and survives a kill.

        Raises:
            RequestError: the text is too short.
        """
        self.step, self.ids, self.context, self.kept = step, lessons.ids, context, Checkpoints(folder)
        text, held = lessons.facts["of_the_text"], lessons.facts["held_out"]
        self.held = list(range(text - held, text))
        self.training = [*range(text - held), *range(text, len(lessons))]  # what was written comes last
        length = self.ids.shape[1]
        self.batch = max(1, min(step.batch_tokens // length, len(self.training)))
        next(batches(len(self.training), self.batch, step.seed))
        self.steps = step.steps or max(1, round(step.epochs * len(self.training) / self.batch))
        self.every = step.validate_every or max(1, -(-self.steps // 10))
        self.done = 0
        self.best: float | None = None
        self.curve: list[dict[str, float]] = []
        self.looks: list[dict[str, float]] = []
        self._seen: list[float] = []

    def run(self, quantized: Path, source: Path) -> Student:
        """Trains to the end, and returns the model with its best scales."""
        keep_freed_memory()
        count = len(self.ids)
        total = count + WORTH * self.batch * self.steps
        self.source = Source.ask(source, self.ids, self.context, lambda n, _, note: self.context.report(n, total, note))
        self.student = _open(quantized, source, self.context)
        again = self.step.recomputes(Checkpoint(source).facts)
        self.student.prepare(self.context.device, recompute=again)
        self.head = self.student.head()
        if torch.equal(self.head.weight, self.source.head.weight):
            self.source.head.weight = self.head.weight
        scales = self.student.scales()
        self.optimizer = torch.optim.Adam(
            list(scales.values()), lr=self.step.lr, betas=(0.9, self.step.beta2), foreach=False, fused=True
        )
        self._resume()
        if not self.looks:
            self._look()
        start, first = time.monotonic(), self.done
        plan = islice(batches(len(self.training), self.batch, self.step.seed), self.done, self.steps)
        for chosen in plan:
            if self._is_over():
                break
            loss = self._train([self.training[index] for index in chosen])
            speed = (self.done - first) * self.batch * self.ids.shape[1] / (time.monotonic() - start)
            note = f"step {self.done}/{self.steps}, KL {loss:.4f}, {speed:,.0f} tok/s"
            self.context.report(count + WORTH * self.batch * self.done, total, note)
            if self.done % self.every == 0 or self.done == self.steps:
                self._look()
            if self.done % self.step.save_every == 0 and self.done < self.steps:
                self._save()
        self._take_best()
        return self.student

    def _is_over(self) -> bool:
        """Returns whether the last looks found nothing better."""
        best = min(range(len(self.looks)), key=lambda place: self.looks[place]["kl"])
        return len(self.looks) - 1 - best >= self.step.patience

    def _set_rate(self) -> None:
        """Sets the learning rate: it rises linearly, then falls in half a cosine to a twentieth."""
        share = share_of_rate(self.done, self.steps, self.step.warmup, 0.05)
        for group in self.optimizer.param_groups:
            group["lr"] = self.step.lr * share

    def _train(self, sequences: list[int]) -> float:
        """Makes one step; returns the mean divergence before it, at the temperature of the training."""
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        positions = len(sequences) * (self.ids.shape[1] - 1)
        states, taught = self._states(sequences)
        total, derived = divergence(
            (self.head, states), (self.source.head, taught), self.step.temperature, 1 / positions
        )
        finite(total, self.done + 1, self.kept.last())
        torch.autograd.backward([states], [derived])
        self.optimizer.step()
        self.done += 1
        self._seen.append(total / positions)
        if self.done % max(1, self.steps // POINTS) == 0 or self.done == self.steps:
            mean = short(sum(self._seen) / len(self._seen))
            self.curve.append({"step": self.done, "loss": mean, "kl": mean})
            self._seen = []
        return total / positions

    def _states(self, sequences: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the inputs of both heads at the positions of some sequences, `[positions, hidden]`."""
        ids = self.ids[sequences].to(self.context.device)
        states = run_body(self.student.model, ids).last_hidden_state[:, :-1].flatten(0, 1)
        return states, self.source.states[sequences, :-1].flatten(0, 1)

    @torch.no_grad()
    def _look(self) -> None:
        """Measures the divergence on the held-out text with scales as they are stored, and keeps the best."""
        total = positions = 0.0
        for sequence in self.held:
            states, taught = self._states([sequence])
            total += divergence((self.head, states), (self.source.head, taught))[0]
            positions += len(states)
        found = total / positions
        finite(found, self.done, self.kept.last())
        self.looks.append({"step": self.done, "kl": short(found)})
        if self.best is None or found < self.best:
            self.best = found
            self.kept.keep_best(self.student.scales())

    # what survives a kill

    def _save(self) -> None:
        told = {
            "done": self.done,
            "best": self.best,
            "curve": self.curve,
            "looks": self.looks,
            "seen": self._seen,
        }
        scales = {f"scale.{name}": tensor for name, tensor in self.student.scales().items()}
        self.kept.save(self.done, told, {**scales, **of_optimizer(self.optimizer)})

    def _resume(self) -> None:
        def read(told: Told, state: Tensors) -> tuple[Any, ...]:
            scales = {name: state[f"scale.{name}"] for name in self.student.trained}
            curve, looks, seen = list(told["curve"]), list(told["looks"]), [float(each) for each in told["seen"]]
            return int(told["done"]), float(told["best"]), curve, looks, seen, scales, state

        found = self.kept.load(read, self.context.warnings)
        if found is None:
            return
        self.done, self.best, self.curve, self.looks, self._seen, scales, state = found
        self._fill(scales)
        into_optimizer(self.optimizer, state)

    def _take_best(self) -> None:
        from safetensors.torch import load_file

        self._fill(load_file(self.kept.best))

    @torch.no_grad()
    def _fill(self, scales: Tensors) -> None:
        for name, theta in self.student.scales().items():
            theta.copy_(scales[name])


def _open(quantized: Path, source: Path, context: Context) -> Student:
    """Returns the model in a quantized directory, or in the GGUF file that it holds, which was made of `source`."""
    file = within(quantized)
    if file is None:
        return Student.open(quantized, context)
    from lighten.compress.polish.gguf_file import open_file  # needs the package gguf

    return open_file(file, source, context)


def short(value: float) -> float:
    """Returns a number to six digits, which is enough for a curve."""
    return float(f"{value:.6g}")
