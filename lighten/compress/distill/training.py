"""The training loop of a distillation. The weights are the same whether or not it was interrupted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lighten.compress.distill import losses
from lighten.compress.distill.checkpoints import Checkpoints, Tensors, Told, into_optimizer, of_optimizer
from lighten.compress.distill.ends import Behind, behind_of, head_of, run_body
from lighten.compress.distill.losses import Said, Sums, Targets
from lighten.compress.distill.student import Student, finite
from lighten.compress.distill.teacher import Lessons, batches, last_states
from lighten.model import accelerator
from lighten.model.stream import fast_dtype
from lighten.numerics.rates import share_of_rate
from lighten.process.isolate import keep_freed_memory
from lighten.step import Context

if TYPE_CHECKING:
    from lighten.compress.distill.settings import Distill

POINTS = 200
"""Maximum number of points of the loss curve, about."""
PARTS = 4
"""Number of layers whose hidden states are compared: evenly spread, the last layer among them."""
NEVER = -1e4
"""Log-probability of rows that only pad a head: nearly zero probability, and finite."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """One distillation, from its first step or from where it was interrupted."""

    def __init__(
        self, step: Distill, student: Student, lessons: Lessons, teacher: Any | None, context: Context, folder: Path
    ) -> None:
        """Prepares the training. `folder` keeps the checkpoints, and survives a kill.

        Raises:
            RequestError: the text is too short.
        """
        keep_freed_memory()
        self.step, self.student, self.lessons, self.teacher = step, student, lessons, teacher
        self.context, self.kept = context, Checkpoints(folder)
        text, held = lessons.facts["of_the_text"], lessons.facts["held_out"]
        self.validation = list(range(text - held, text))
        written = list(range(text, len(lessons)))
        self.training = written if step.level == "sequence" else [*range(text - held), *written]
        next(batches(len(self.training), step.batch, step.seed))
        self.steps = step.steps or max(1, round(step.epochs * (len(self.training) // step.batch)))
        self.every = step.validate_every or max(1, self.steps // 10)
        self.dtype = PRECISIONS.get(step.precision) or fast_dtype(context.device)
        self._behind = behind_of(student.core)
        self._teachers_behind = behind_of(teacher) if teacher is not None else None
        self.projections = self._projections()
        weights = [*student.trained.values(), *self.projections.parameters()]
        self.optimizer = torch.optim.AdamW(
            weights, lr=step.lr, betas=(0.9, step.beta2), weight_decay=step.weight_decay, foreach=False, fused=True
        )
        self.scaler = torch.amp.GradScaler(accelerator.device_type(context.device), enabled=self.dtype == torch.float16)
        self.done = 0
        self.best: float | None = None
        self.curve: list[dict[str, float]] = []
        self.checks: list[dict[str, float]] = []
        self._window = Sums()
        self._ready = not step.movement
        """Whether the weights are as sparse as was asked for."""

    def _projections(self) -> nn.ModuleList:
        """Returns the maps from the student's hidden states to the teacher's, at first the identity where possible."""
        if not self.step.beta:
            return nn.ModuleList()
        assert self.teacher
        ours, theirs = (each.config.get_text_config().hidden_size for each in (self.student.core, self.teacher))
        found = nn.ModuleList(nn.Linear(ours, theirs, bias=False) for _ in range(PARTS))
        if ours == theirs:
            for module in found:
                assert isinstance(module, nn.Linear)
                nn.init.eye_(module.weight)
        return found.to(self.context.device)

    # the loop

    def run(self) -> None:
        """Trains to the end. Then `best.safetensors` has the best weights."""
        self._resume()
        plan = islice(batches(len(self.training), self.step.batch, self.step.seed), self.done, self.steps)
        start, first = time.monotonic(), self.done
        if not self.done and self.validation:
            self._validate()
        for chosen in plan:
            self._set_rate()
            sums = self._step([self.training[index] for index in chosen])
            self.done += 1
            self._window.add(sums)
            if self.done % max(1, self.steps // POINTS) == 0 or self.done == self.steps:
                self._note()
            speed = (self.done - first) * self.step.batch * self.lessons.ids.shape[1] / (time.monotonic() - start)
            note = f"step {self.done}/{self.steps}, {self._summary(sums)}, {speed:,.0f} tok/s"
            self.context.report(self.done, self.steps, note)
            if self.validation and (self.done % self.every == 0 or self.done == self.steps):
                self._validate()
            if self.done % self.step.save_every == 0 and self.done < self.steps:
                self._save()
        if not self.validation:
            self._keep_best()

    def _summary(self, sums: Sums) -> str:
        loss = f"loss {self._loss(sums):.3f}"
        return f"{loss}, KL {sums.kl / sums.positions:.3f}" if sums.kl else loss

    def _loss(self, sums: Sums) -> float:
        alpha = self.step.alpha if self._taught else 0.0
        return (alpha * self.step.temperature**2 * sums.kl + (1 - alpha) * sums.ce) / sums.positions

    @property
    def _taught(self) -> bool:
        """Whether the loss has a divergence from the teacher."""
        asked = self.step.alpha > 0 and self.step.level == "token"
        return asked and (self.teacher is not None or self.lessons.facts["top_k"] > 0)

    def _note(self) -> None:
        sums, self._window = self._window, Sums()
        point = {"loss": self._loss(sums), "ce": sums.ce / sums.positions}
        if self._taught:
            point["kl"] = sums.kl / sums.positions
        self.curve.append({"step": self.done, **{name: _short(value) for name, value in point.items()}})

    def _set_rate(self) -> None:
        """Sets the learning rate: it rises linearly, then falls in half a cosine to a tenth."""
        share = share_of_rate(self.done, self.steps, self.step.warmup, 0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.step.lr * share

    def _step(self, sequences: list[int]) -> Sums:
        size = len(sequences) // self.step.accumulate
        sums = Sums()
        self.optimizer.zero_grad(set_to_none=True)
        with self.student.shown():
            for start in range(0, len(sequences), size):
                sums.add(self._derive(sequences[start : start + size], len(sequences)))
        finite(self._loss(sums), self.done + 1, self.kept.last())
        self.scaler.unscale_(self.optimizer)
        if self.step.movement:
            now = self._sparsity()
            self._ready = now >= (self.step.movement.sparsity or 1.0)
            self.student.move(now)
        nn.utils.clip_grad_norm_([*self.student.trained.values(), *self.projections.parameters()], self.step.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.student.mask()
        return sums

    def _sparsity(self) -> float:
        """Returns the share that movement pruning removes now: a cubic rise over the first two thirds of the steps."""
        movement = self.step.movement
        assert movement
        share = min(1.0, 1.5 * (self.done + 1) / self.steps)
        if movement.pattern:
            return float(share == 1.0)
        return (movement.sparsity or 0.0) * (1 - (1 - share) ** 3)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(accelerator.device_type(self.context.device), self.dtype)

    def _derive(self, sequences: list[int], of: int) -> Sums:
        """Adds the derivatives of the loss of some sequences to every weight's `grad`; `of` sequences make a step."""
        step, core = self.step, self.student.core
        ids = self.lessons.ids[sequences].to(self.context.device)
        scale = float(self.scaler.scale(torch.ones((), device=ids.device)))
        with self._autocast():
            output = run_body(core, ids, states=bool(step.beta))
            states = output.last_hidden_state[:, :-1].flatten(0, 1)
            teacher, extra = self._teacher(sequences, ids, output)
        gradient, sums = losses.head_loss(
            states,
            head_of(core),
            ids[:, 1:].flatten(),
            teacher,
            alpha=step.alpha,
            temperature=step.temperature,
            scale=scale / (of * (ids.shape[1] - 1)),
            dtype=self.dtype,
            behind=self._behind,
        )
        roots, gradients = [states], [gradient]
        if extra is not None:
            roots.append(extra * (step.beta * scale * len(sequences) / of))
            gradients.append(torch.ones_like(roots[-1]))
        torch.autograd.backward(roots, gradients)
        return sums

    def _teacher(self, sequences: list[int], ids: torch.Tensor, output: Any) -> tuple[Said | None, torch.Tensor | None]:
        """Returns the teacher's distributions for the positions of a batch, and the distance of hidden states."""
        if self.teacher is None:
            known = [self.lessons.targets(sequence) for sequence in sequences] if self._taught else []
            found = [each for each in known if each is not None]
            return (_join(found, self.context.device) if found else None), None
        with torch.no_grad():
            said = run_body(self.teacher, ids, states=bool(self.step.beta))
        extra = None
        if self.step.beta:
            pairs = zip(_spread(output.hidden_states), _spread(said.hidden_states), self.projections, strict=True)
            parts = [losses.hidden_distance(ours, theirs, module) for ours, theirs, module in pairs]
            extra = torch.stack(parts).mean()
        states = said.last_hidden_state[:, :-1].flatten(0, 1)
        if not self._taught:
            return None, extra
        rows = head_of(self.student.core).out_features
        return _Live(self.teacher, self._teachers_behind, states, self.step.temperature, rows), extra

    @torch.no_grad()
    def _validate(self) -> None:
        """Measures perplexity on the held-out text, and keeps the weights if they are the best so far."""
        total = positions = 0.0
        self.student.model.eval()
        with self.student.shown(), self._autocast():
            for sequence in self.validation:
                ids = self.lessons.ids[sequence][None].to(self.context.device)
                states = last_states(self.student.core, ids)[0, :-1]
                for start in range(0, len(states), losses.ROWS):
                    rows = slice(start, start + losses.ROWS)
                    logits = head_of(self.student.core)(states[rows]).float()
                    logits = self._behind(logits) if self._behind else logits
                    total += float(nn.functional.cross_entropy(logits, ids[0, 1:][rows], reduction="sum"))
                positions += ids.shape[1] - 1
        self.student.model.train()
        found = math.exp(min(total / positions, 700.0))
        self.checks.append({"step": self.done, "perplexity": _short(found)})
        if self._ready and (self.best is None or found < self.best):
            self.best = found
            self._keep_best()

    # what survives a kill

    def _keep_best(self) -> None:
        self.kept.keep_best(self.student.finished())

    def _state(self) -> Tensors:
        state = self.student.state()
        state |= {f"projection.{name}": tensor for name, tensor in self.projections.state_dict().items()}
        return {**state, **of_optimizer(self.optimizer)}

    def _save(self) -> None:
        told = {
            "done": self.done,
            "best": self.best,
            "curve": self.curve,
            "checks": self.checks,
            "window": vars(self._window),
            "scaler": self.scaler.state_dict(),
        }
        self.kept.save(self.done, told, self._state())

    def _resume(self) -> None:
        def read(told: Told, state: Tensors) -> tuple[Any, ...]:
            window, scaler = Sums(**told["window"]), dict(told["scaler"])
            return int(told["done"]), told["best"], list(told["curve"]), list(told["checks"]), window, scaler, state

        found = self.kept.load(read, self.context.warnings)
        if found is None:
            return
        self.done, self.best, self.curve, self.checks, self._window, scaler, state = found
        self.scaler.load_state_dict(scaler)
        self.student.load(state)
        begin = "projection."
        self.projections.load_state_dict(
            {name.removeprefix(begin): tensor for name, tensor in state.items() if name.startswith(begin)}
        )
        into_optimizer(self.optimizer, state)


class _Live:
    """A teacher's distributions, computed for the given positions, over the rows of the student's head."""

    def __init__(
        self, teacher: Any, behind: Behind | None, states: torch.Tensor, temperature: float, rows: int
    ) -> None:
        self.head, self.behind = head_of(teacher), behind
        self.states, self.temperature, self.rows = states, temperature, rows

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> torch.Tensor:
        logits = self.head(self.states[rows]).float()
        logits = self.behind(logits) if self.behind else logits
        found = nn.functional.log_softmax(logits / self.temperature, -1)
        return nn.functional.pad(found, (0, self.rows - found.shape[-1]), value=NEVER)


def _join(targets: list[Targets], device: str) -> Targets:
    return Targets(
        torch.cat([each.tokens for each in targets]).to(device),
        torch.cat([each.log_probs for each in targets]).to(device),
        torch.cat([each.rest for each in targets]).to(device),
    )


def _spread(states: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """Yields the hidden states after PARTS layers, evenly spread; the last layer is among them."""
    layers = len(states) - 1
    for part in range(1, PARTS + 1):
        yield states[-(-part * layers // PARTS)]


def _short(value: float) -> float:
    """Returns a number to six digits, which is enough for a curve."""
    return float(f"{value:.6g}")
