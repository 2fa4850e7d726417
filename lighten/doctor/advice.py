"""The findings about a calibration text in words: numbers, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import Any

from lighten.data.overlap import THRESHOLD
from lighten.report.numbers import share, significant

TOKENS_PER_RANK = 4
"""Tokens per direction of the inputs that a Gram needs. With fewer tokens its small eigenvalues are noise."""

FEW_TOKENS = 0.02
"""Share of the vocabulary below which a text is called monotonous."""

MANY_NEARLY_DEAD = 0.01
"""Share of nearly dead channels that is reported. A few outliers in other channels make some."""

GAIN = 0.02
"""Relative fall of the loss, from half the samples to all, below which more samples are not worth their time."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One finding. `advice` is empty if it is fine."""

    name: str
    title: str
    lines: tuple[str, ...]
    advice: str = ""

    @property
    def verdict(self) -> str:
        """Advice, or "fine"."""
        return self.advice or "fine"


def about_overlap(calibration: Found) -> Finding:
    """Returns what each evaluation set shares with the calibration text."""
    lines, over = [], []
    for each in calibration["overlap"]:
        lines.append(f"{each['with']}: {_percent(each['share'])} of {each['runs']:,} {each['ngram']}-grams")
        lines += [f"  “{example}”" for example in each["examples"]]
        if each["share"] > THRESHOLD:
            over.append(each["with"])
    if not lines:
        lines = ["the recipe measures no text and no tasks: there is nothing to compare with"]
    advice = (
        f"more than {THRESHOLD:.0%} of {' and '.join(over)} is calibration text: calibrate on other text, or what is "
        "measured there is flattered"
    ).replace("%", " %")
    return Finding("overlap", "Overlap with what is measured", tuple(lines), advice if over else "")


def about_text(calibration: Found) -> Finding:
    """Returns how much text there is, and how varied it is."""
    asked, samples, length = calibration["asked"], calibration["samples"], calibration["length"]
    seen = calibration["distinct"] / calibration["vocabulary"]
    lines = (
        f"{asked:,} samples of {length:,} tokens asked for, {samples:,} found: {calibration['tokens']:,} tokens",
        f"{calibration['distinct']:,} distinct tokens, {share(seen)} % of the vocabulary of "
        f"{calibration['vocabulary']:,}",
    )
    advice = []
    if samples < asked:
        advice.append(f"the text is too short: give a longer one, or ask for {samples:,} samples")
    if seen < FEW_TOKENS:
        advice.append("few tokens of the vocabulary were seen: add text of other kinds")
    return Finding("text", "Text", lines, "; ".join(advice))


def about_dead_channels(inputs: list[Found]) -> Finding:
    """Returns which inputs the text never, or hardly ever, uses."""
    lines, many = [], False
    dead = sum(each["dead"] for each in inputs)
    for input_name, layers in _by_input(inputs).items():
        never, hardly = (sum(each[name] for each in layers) for name in ("dead", "nearly_dead"))
        count = sum(each["width"] for each in layers)
        many |= hardly > MANY_NEARLY_DEAD * count
        if never or hardly:
            worst = sorted(layers, key=lambda each: -(each["dead"] + each["nearly_dead"]))[:3]
            most = ", ".join(
                f"{each['layer']} ({each['dead'] + each['nearly_dead']:,})"
                for each in worst
                if each["dead"] + each["nearly_dead"]
            )
            lines.append(f"{input_name}: {never:,} dead, {hardly:,} nearly dead of {count:,}; most in layer {most}")
    if not lines:
        lines = [f"none of {sum(each['width'] for each in inputs):,} channels"]
    advice = ""
    if dead:
        advice = f"the text never uses {dead:,} channels, so their weights are lost: add text of other kinds"
    elif many:
        advice = "channels that are nearly dead are rounded as if they did not matter: add text of other kinds"
    return Finding("dead channels", "Dead channels", tuple(lines), advice)


def about_rank(inputs: list[Found], length: int) -> Finding:
    """Returns how many tokens each direction of the Grams has."""
    lines, needed = [], 0
    for input_name, layers in _by_input(inputs).items():
        ranked = [each for each in layers if each["rank"] is not None]
        low, high = (choose(each["rank"] for each in ranked) for choose in (min, max))
        worst = min(ranked, key=lambda each: each["tokens"] / max(1, each["rank"]))
        ratio = worst["tokens"] / max(1, worst["rank"])
        ranks = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        some = "" if len(ranked) == len(layers) else f" (layers {_list(each['layer'] for each in ranked)} only)"
        lines.append(
            f"{input_name}: width {worst['width']:,}, rank {ranks}{some}; "
            f"{significant(ratio, 3, decimals=1)} tokens per rank"
        )
        if ratio < TOKENS_PER_RANK:
            needed = max(needed, ceil(TOKENS_PER_RANK * worst["width"] / length))
    advice = f"fewer than {TOKENS_PER_RANK} tokens per rank: the Grams are noisy; use at least {needed:,} samples"
    return Finding("rank", "Tokens per rank of the Grams", tuple(lines), advice if needed else "")


def about_loss(losses: list[Found], calibration: Found, heldout: str) -> Finding:
    """Returns how much 4-bit GPTQ loses on held-out text, with parts of the samples and with all of them."""
    title = f"Loss of 4-bit GPTQ on held-out text ({heldout})"
    parts = sorted({each["samples"] for each in losses})
    if any(each["loss"] is None for each in losses):
        few = max(each["samples"] for each in losses if each["loss"] is None)
        line = f"the Grams of {few:,} samples cannot be factorised"
        return Finding("loss", title, (line,), "use more samples, or a larger damp_percent")
    if len(parts) < 2:
        return Finding("loss", title, ("there are too few samples, or too little held-out text, to compare",))
    layers = sorted({each["layer"] for each in losses})
    lines, means = [], []
    for samples in parts:
        here = [each for each in losses if each["samples"] == samples]
        of_layer = [fmean(each["loss"] for each in here if each["layer"] == layer) for layer in layers]
        means.append(fmean(of_layer))
        by_layer = ", ".join(f"layer {layer} {_percent(loss)}" for layer, loss in zip(layers, of_layer, strict=True))
        lines.append(f"{samples:,} samples: {_percent(means[-1])} ({by_layer})")
    gain = 1 - means[-1] / means[-2] if means[-2] else 0.0
    lines.append(f"from {parts[-2]:,} to {parts[-1]:,} samples: {_change(-gain)}")
    more = f"try samples: {2 * calibration['samples']:,}"
    if calibration["samples"] < calibration["asked"]:
        more += ", for which the text must be twice as long"
    advice = f"the loss still falls with more samples: {more}"
    return Finding("loss", title, tuple(lines), advice if gain >= GAIN else "")


def about_chat(chat: Found) -> Finding:
    """Returns whether an instruct model's calibration text looks like the text that it will get."""
    title = "Chat template"
    if not chat["template"]:
        return Finding("chat", title, ("the model has none",))
    if not chat["tokens"]:
        return Finding("chat", title, ("the model's has no special tokens: the text cannot be told from chats",))
    tokens = " ".join(chat["tokens"])
    if chat["used"]:
        return Finding("chat", title, (f"the model has one ({tokens}), and the text uses {' '.join(chat['used'])}",))
    advice = "if you serve chats, add some to the text as the template writes them (apply_chat_template)"
    return Finding("chat", title, (f"the model has one ({tokens}), and the text uses none of its tokens",), advice)


def _by_input(inputs: list[Found]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    for each in inputs:
        found.setdefault(each["input"], []).append(each)
    return found


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _percent(value: float) -> str:
    return f"{significant(100 * value, 3, decimals=3)} %"


def _change(value: float) -> str:
    return f"{100 * value:+.1f} %".replace("-", "−")
