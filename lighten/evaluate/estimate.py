"""What a measurement will cost."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.data import choices, text
from lighten.evaluate.accuracy import harness
from lighten.evaluate.settings import Accuracy, Load, Loaders, Perplexity, Settings, Speculative
from lighten.facts import ModelFacts
from lighten.step import Estimate

BYTES_PER_TOKEN = 4.0
"""Rough length of a token of English text, for predictions."""


@dataclass(frozen=True)
class Looked:
    """What is known of a set of tasks before they are measured."""

    digest: str
    letters: int
    documents: int


def look(accuracy: Accuracy) -> Looked:
    """Returns what is known of a set of tasks.

    Raises:
        RequestError: there is no such task, or its data cannot be had.
    """
    if accuracy.harness:
        facts = harness.look(accuracy)
        return Looked(facts.digest, facts.letters, facts.documents)
    tasks = choices.load_choices(accuracy.local or accuracy.task, accuracy.most)
    letters = sum(len(task.context) + sum(map(len, task.endings)) for task in tasks)
    return Looked(choices.digest(tasks), letters, len(tasks))


def _identity(perplexity: Perplexity) -> str:
    """Returns the digest of what perplexity is measured on; a protocol may take documents one by one."""
    found = text.read(perplexity.data, "perplexity")
    plain = [each for each in found if isinstance(each, str)]
    if perplexity.protocol != "lm-eval" or len(plain) < len(found):
        return text.identity(perplexity.data, "perplexity")
    return text.digest("\0".join([each for each in plain if each.strip()][: perplexity.samples]))


def _lengths(perplexity: Perplexity) -> list[int]:
    """Returns the letters of each document that perplexity is measured on, of one text by most protocols."""
    found = [text.letters_of(each) for each in text.read(perplexity.data, "perplexity")]
    return found[: perplexity.samples] if perplexity.protocol == "lm-eval" else [sum(found)]


def predict_measurement(settings: Settings, facts: ModelFacts) -> Estimate:
    """Returns what a measurement should cost: products of every token with every weight."""
    fixed = 550_000_000
    if isinstance(settings, Loaders):  # two loaders, each reading every weight and maybe unpacking it
        return Estimate(
            seconds=6 + 4e-8 * facts.params, peak_bytes=fixed + 100_000_000 + 3 * facts.params, disk_bytes=10_000
        )
    flops = 2.0 * (facts.layers * facts.layer_linear_params + facts.vocab * facts.hidden)
    if isinstance(settings, Perplexity):
        documents = [each / BYTES_PER_TOKEN for each in _lengths(settings)]
        tokens, length = sum(documents), settings.tokens(facts.context)
        if settings.protocol == "lm-eval":
            length = int(min(length, max(documents) + 1))
        elif settings.most:
            tokens = min(tokens, settings.most * length)
        # the last products are the reference's head, for the divergence
        work = tokens * (flops + 2.0 * facts.vocab * facts.hidden)
        peak = fixed + 4 * facts.params + 12 * length * facts.vocab + 4 * facts.vocab * facts.hidden
        return Estimate(
            float32_flops=work, seconds=6, peak_bytes=int(peak), disk_bytes=int(tokens * (16 + 4 * facts.hidden))
        )
    if isinstance(settings, Accuracy):
        looked = look(settings)
        peak = fixed + 4 * facts.params + 300_000_000
        return Estimate(
            float32_flops=looked.letters / BYTES_PER_TOKEN * flops,
            seconds=6,
            peak_bytes=peak,
            disk_bytes=100 * looked.documents,
        )
    if isinstance(settings, Load):
        read = len(settings.rate) * settings.requests * settings.generate * 2.0 * facts.params / 10e9
        waits = sum(settings.requests / rate for rate in settings.rate)
        return Estimate(seconds=10 + max(read, waits), peak_bytes=fixed + 3 * facts.params, disk_bytes=10_000)
    if isinstance(settings, Speculative):
        read = 3 * settings.samples * settings.generate * 2.0 * facts.params / 10e9
        return Estimate(seconds=8 + read, peak_bytes=fixed + 5 * facts.params, disk_bytes=10_000)
    shapes = len(settings.batch) * len(settings.prompt)
    bytes_read = shapes * (settings.repeats + 2) * settings.generate * 2.0 * facts.params
    return Estimate(
        fast_flops=sum(settings.batch) * sum(settings.prompt) * (settings.repeats + 2) * flops,
        seconds=6 + bytes_read / 10e9,
        peak_bytes=fixed + 3 * facts.params,
        disk_bytes=10_000,
    )
