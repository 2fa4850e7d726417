"""A measured variant in a given situation."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.export.bundle.bundle import need_of
from lighten.recommend.question import Question
from lighten.recommend.sizes import Sizes
from lighten.report import claims
from lighten.report.numbers import byte_count, change, significant
from lighten.results.results import Results, Variant


@dataclass(frozen=True)
class Candidate:
    """A variant, and what it takes and costs in this situation. None is not measured."""

    name: str
    row: Variant
    need: int | None
    """Bytes of memory while it runs."""
    measured: bool
    """Whether `need` starts from a measured peak. Otherwise it is arithmetic."""
    rise: float | None
    rise_ci95: tuple[float, float] | None
    drop: float | None
    """Loss of accuracy on the set of tasks where it is largest: a fraction, positive for a loss."""
    drop_high: float | None
    """Far end of the 95 % interval of `drop`."""
    speed: float | None
    """Tokens per second: measured, or on a target the most that its memory allows."""
    speed_ends: tuple[float, float] | None
    """Interval of `speed`; None for a ceiling."""
    noisy: bool
    """Whether `speed` cannot be compared because its repeats differ too much."""
    too_good: bool
    """Whether the variant is better than its source by more than the interval."""
    ceiling: bool

    @property
    def rise_ends(self) -> tuple[float, float] | None:
        """Interval of the rise in perplexity; a point for the baseline, and if no interval was measured."""
        return self.rise_ci95 or (None if self.rise is None else (self.rise, self.rise))

    def line(self) -> str:
        """Returns the costs on one line."""
        parts = [byte_count(self.row.size_bytes)] if self.row.size_bytes else []
        if self.rise is not None:
            text, interval = change(self.rise, self.rise_ci95)
            parts.append(f"perplexity {text} % {interval}".strip())
        if self.drop is not None:
            parts.append(f"accuracy {change(-self.drop, None, least=1)[0]} pp")
        most = "at most " if self.ceiling else ""
        most = "≈" if self.noisy else most
        parts += [f"{most}{significant(self.speed, 3)} tok/s"] if self.speed else []
        parts += [f"{byte_count(self.need)} of memory{'' if self.measured else ' (computed)'}"] if self.need else []
        return ", ".join(parts)


def candidate(row: Variant, results: Results, question: Question, sizes: Sizes | None) -> Candidate:
    """Returns a variant's answer to a question. A target or a context needs the `sizes` of the model."""
    delta = results.perplexity_change(row)
    drops: list[tuple[float, float | None]] = []
    for each in row.delta.accuracy if row.delta else ():
        value, interval = (each.acc, each.acc_ci95) if each.acc_norm is None else (each.acc_norm, each.acc_norm_ci95)
        drops += [(-value, -interval[0] if interval else None)] if value is not None else []
    is_baseline = row is results.baseline
    drop, drop_high = max(drops, key=lambda found: found[0], default=(0.0 if is_baseline else None, None))
    need, measured = _need(row, question, sizes)
    first = row.speed[0] if row.speed else None
    speed = first.decode_tok_s if first else None
    target = question.target if question.purpose == "edge" else None
    if target:
        speed = target.bandwidth / row.size_bytes if row.size_bytes else None
    return Candidate(
        row.name,
        row,
        need,
        measured,
        0.0 if is_baseline and row.perplexity else delta.relative if delta else None,
        delta.ci95 if delta else None,
        drop,
        drop_high,
        speed,
        claims.ends(first) if first and not target else None,
        not target and claims.noisy(first),
        claims.too_good(results, row),
        target is not None,
    )


def _need(row: Variant, question: Question, sizes: Sizes | None) -> tuple[int | None, bool]:
    """Returns the memory: the measured peak with longer keys and values, or arithmetic for a target."""
    peak = None
    if row.memory:
        peak = row.memory.peak_vram_bytes if row.memory.peak_vram_bytes else row.memory.peak_rss_bytes
    if peak and not (question.purpose == "edge" and question.target):
        seen = row.speed[0].prompt + row.speed[0].generate if row.speed else 0
        more = max(0, (question.context or seen) - seen)
        return (peak + sizes.facts.cache_bytes(more) if more and sizes else peak), True
    if sizes and row.size_bytes:
        return need_of(sizes.facts, row.size_bytes, question.context or 2048).total, False
    return None, False
