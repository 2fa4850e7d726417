"""The course of a training: loss and divergence by step, and perplexity or divergence on the held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lighten.report.drawing import FRONT, INK, MUTED, legend, sheet
from lighten.report.numbers import significant
from lighten.results.measured import Training
from lighten.results.results import Results

WIDTH, HEIGHT = 360.0, 272.0


@dataclass(frozen=True)
class Lessons:
    """A training that one or more variants share."""

    stem: str
    variants: tuple[str, ...]
    training: Training

    @property
    def title(self) -> str:
        """Title of the picture."""
        return f"Training of {', '.join(self.variants)}"

    @property
    def held_out(self) -> tuple[str, list[float]]:
        """What was measured on the held-out text, and its values."""
        found = self.training.validation
        cosines = [each.cosine for each in found if each.cosine is not None]
        divergences = [each.kl for each in found if each.kl is not None]
        if divergences:
            return ("KL", divergences)
        return ("cosine", cosines) if cosines else ("perplexity", [each.perplexity or 0.0 for each in found])

    @property
    def sentence(self) -> str:
        """Result of the training in words."""
        curve, validations = self.training.curve, self.training.validation
        parts = []
        if curve:
            parts.append(
                f"{curve[-1].step:,} steps, loss {significant(curve[0].loss, 3)} → {significant(curve[-1].loss, 3)}"
            )
        if validations:
            name, values = self.held_out
            best = (max if name == "cosine" else min)(values)
            step = validations[values.index(best)].step
            parts.append(f"held-out {name} {significant(values[0], 4)} → {significant(best, 4)} (kept: step {step:,})")
        return "; ".join(parts)


def lessons(results: Results) -> list[Lessons]:
    """Returns every training once, with the variants that come from it."""
    found: list[tuple[Training, list[str]]] = []
    for variant in results.variants:
        if variant.training is None or not variant.training.curve:
            continue
        same = next((names for training, names in found if training == variant.training), None)
        if same is None:
            found.append((variant.training, [variant.name]))
        else:
            same.append(variant.name)
    return [Lessons(f"training-{n}", tuple(names), training) for n, (training, names) in enumerate(found, 1)]


def draw_lessons(each: Lessons) -> tuple[bytes, bytes]:
    """Returns the curves as SVG and PNG.

    Raises:
        RequestError: matplotlib is not installed.
    """
    shown = each.title if len(each.title) < 52 else f"{each.title[:51]}…"
    with sheet(each.stem, shown, (WIDTH, HEIGHT)) as drawn:
        axes = drawn.figure.add_axes((0.125, 0.145, 0.75, 0.69), facecolor="none")
        curve, validations = each.training.curve, each.training.validation
        steps = [point.step for point in curve]
        axes.plot(steps, [point.loss for point in curve], color=INK, lw=1.2, label="loss")
        if any(point.kl is not None for point in curve):
            axes.plot(steps, [point.kl for point in curve], color=MUTED, lw=1, ls=(0, (4, 2)), label="KL")
        axes.set_ylim(bottom=0)
        _plain(axes, "Nats per token")
        if validations:
            other = axes.twinx()
            name, values = each.held_out
            other.plot(
                [point.step for point in validations],
                values,
                color=FRONT,
                lw=1.2,
                marker="o",
                ms=3.5,
                label=f"held-out {name} (right)",
            )
            other.spines["right"].set_visible(True)
            _plain(other, name if name.isupper() else name.capitalize())
        lines = [line for part in drawn.figure.axes for line in part.get_lines()]
        legend(axes, lines)
        axes.set_xlabel("Step")
    return drawn.svg, drawn.png


def _plain(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.tick_params(length=0, which="both")
    if label not in ("Perplexity", "Cosine", "KL"):
        axes.grid(True)
        axes.set_axisbelow(True)
