"""Training of a student of transformers' own class, as a whole. It ends in the same weights if it was interrupted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from lighten.compress.distill.checkpoints import Checkpoints, Tensors, Told, into_optimizer, of_optimizer
from lighten.errors import RequestError
from lighten.model.pair_training import losses_by_step
from lighten.step import Context

if TYPE_CHECKING:
    from lighten.compress.distill.settings import Distill

POINTS = 50
"""Number of points of the loss curve."""
B = TypeVar("B")


class WholeTrainer(ABC, Generic[B]):
    """The student and its teacher, and what was seen on the way. `B` is what a step reads."""

    def __init__(self, step: Distill, student: Any, teacher: Any, context: Context) -> None:
        """Prepares the training. The scratch directory of the context keeps the checkpoints, and survives a kill."""
        assert context.scratch
        self.step, self.student, self.teacher, self.context = step, student, teacher, context
        self.steps = self.done = 0
        self.curve: list[dict[str, float]] = []
        self.checks: list[dict[str, float]] = []
        self.kept = Checkpoints(context.scratch)
        self._seen: list[tuple[float, float]] = []
        self._best: float | None = None
        self._weights = dict(student.named_parameters())
        self._optimizer = torch.optim.AdamW(
            list(self._weights.values()),
            lr=step.lr,
            betas=(0.9, step.beta2),
            weight_decay=step.weight_decay,
            fused=True,
        )

    @abstractmethod
    def plan(self) -> Iterator[B]:
        """Yields what each step reads, without end."""

    @abstractmethod
    def loss(self, batch: B) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of a step, and its part that needs no teacher."""

    @abstractmethod
    def look(self) -> dict[str, float] | None:
        """Returns a figure of the held-out text by its name, the lower the better; None if none is held out."""

    def made(self, batches: int, source: Path, out: Path) -> dict[str, Any]:
        """Trains to the end, writes the student, and returns the facts of its manifest.

        Args:
            batches: of an epoch.
            source: model directory that the student came from.
            out: directory to write to.
        """
        self.run(batches)
        write(self.student, source, out)
        return {
            "format": "hf",
            "dtype": "float32",
            "params": self.student.num_parameters(),
            "steps": self.steps,
            "training": {"curve": self.curve, "validation": self.checks},
        }

    def run(self, batches: int) -> None:
        """Trains to the end; an epoch has that many batches. Then the student has its best weights."""
        step = self.step
        self.steps = step.steps or max(1, round(step.epochs * batches))
        self._resume()
        every, look = max(1, self.steps // POINTS), step.validate_every or max(1, self.steps // 10)
        losses = losses_by_step(
            islice(self.plan(), self.done, self.steps),
            self._loss,
            self._optimizer,
            list(self._weights.values()),
            rate=step.lr,
            steps=self.steps,
            clip=step.clip,
            warmup=step.warmup,
            first=self.done,
        )
        self.student.train()
        for value in losses:
            self.done += 1
            self.context.report(self.done, self.steps, f"step {self.done}/{self.steps}, loss {value:.3f}")
            if self.done % every == 0 or self.done == self.steps:
                self._note()
            if self.done % look == 0 or self.done == self.steps:
                self._look()
            if self.done % step.save_every == 0 and self.done < self.steps:
                self._save()
        if self._best is not None:
            self._fill(self._read_best())

    def _loss(self, batch: B) -> torch.Tensor:
        loss, plain = self.loss(batch)
        self._seen.append((float(loss.detach()), float(plain.detach())))
        return loss

    def _note(self) -> None:
        count = len(self._seen)
        loss, plain = (sum(each[place] for each in self._seen) / count for place in (0, 1))
        self._seen.clear()
        self.curve.append({"step": self.done, "loss": short(loss), "ce": short(plain)})

    @torch.no_grad()
    def _look(self) -> None:
        self.student.eval()
        found = self.look()
        self.student.train()
        if not found:
            return
        ((name, value),) = found.items()
        self.checks.append({"step": self.done, name: short(value)})
        worse = -value if name == "cosine" else value
        if self._best is None or worse < self._best:
            self._best = worse
            self.kept.keep_best(self._weights)

    # what survives a kill

    def _save(self) -> None:
        told = {"done": self.done, "best": self._best, "curve": self.curve, "checks": self.checks, "seen": self._seen}
        tensors = {f"weight.{name}": tensor for name, tensor in self._weights.items()}
        self.kept.save(self.done, told, {**tensors, **of_optimizer(self._optimizer), **self._chance()})

    def _chance(self) -> Tensors:
        """Returns the states of the generators that dropout reads."""
        found = {"chance.cpu": torch.get_rng_state()}
        if not self.context.device.startswith("cpu"):
            found["chance.device"] = torch.get_device_module(self.context.device).get_rng_state(self.context.device)
        return found

    def _resume(self) -> None:
        def read(told: Told, tensors: Tensors) -> tuple[Any, ...]:
            seen = [(float(loss), float(plain)) for loss, plain in told["seen"]]
            weights = {name: tensors[f"weight.{name}"] for name in self._weights}
            return int(told["done"]), told["best"], list(told["curve"]), list(told["checks"]), seen, weights, tensors

        found = self.kept.load(read, self.context.warnings)
        if found is None:
            return
        self.done, self._best, self.curve, self.checks, self._seen, weights, tensors = found
        self._fill(weights)
        into_optimizer(self._optimizer, tensors)
        torch.set_rng_state(tensors["chance.cpu"])
        if "chance.device" in tensors:
            module = torch.get_device_module(self.context.device)
            module.set_rng_state(tensors["chance.device"], self.context.device)

    def _read_best(self) -> Tensors:
        from safetensors.torch import load_file

        found: Tensors = load_file(self.kept.best)
        return found

    @torch.no_grad()
    def _fill(self, weights: Tensors) -> None:
        for name, weight in self._weights.items():
            weight.copy_(weights[name])


def distance(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], mask: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the mean squared distance of the states of each layer, relative to the teacher's mean square.

    A student's layer is compared with the teacher's layer that is as far along its stack.

    Args:
        student: states before the first layer and after each layer, `[samples, length, hidden]`.
        teacher: the same of the teacher.
        mask: which positions count, `[samples, length]`.

    Raises:
        RequestError: the two are not equally wide.
    """
    ours, theirs = student[0].shape[-1], teacher[0].shape[-1]
    if ours != theirs:
        raise RequestError(
            f"the student's states are {ours} wide and the teacher's {theirs}: leave out beta, or take a teacher of "
            "the same width"
        )
    parts = []
    for layer in range(1, len(student)):
        other = teacher[round(layer * (len(teacher) - 1) / (len(student) - 1))][mask]
        parts.append((student[layer][mask] - other).square().mean() / other.square().mean())
    return parts


def shorter(student: Any, layers: int | None) -> Any:
    """Returns a student with so many layers in each stack; the same one if None."""
    from lighten.model.depth import with_layers

    return with_layers(student, layers) if layers else student


def write(student: Any, source: Path, out: Path) -> None:
    """Writes a student, and the other files of the directory that it was made from."""
    from lighten.model.checkpoint import Checkpoint
    from lighten.model.empty import quiet
    from lighten.model.files import read_json

    with quiet():
        student.eval().save_pretrained(out)
    Checkpoint(source).write_others(out, read_json(out / "config.json"))


def perplexity(total: float, count: int) -> float:
    """Returns exp of a mean loss, finite in any case."""
    return math.exp(min(total / count, 700.0))


def short(value: float) -> float:
    """Returns a number to six digits, which is enough for a curve."""
    return float(f"{value:.6g}")
