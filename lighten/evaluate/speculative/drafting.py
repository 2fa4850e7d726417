"""Speculative decoding: a fast model proposes tokens, and the served model checks them all at once.

Decoding is greedy, so the text is the target's own (Leviathan et al. 2022, at temperature 0). A proposed token stays if
the target finds it likeliest at that place.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from lighten.data.origin import text_name
from lighten.data.text import Render, load_text
from lighten.errors import Failure
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speculative.settings import Speculative
from lighten.evaluate.stored_result import SpeculativeResult
from lighten.results import measured
from lighten.step import Report

COMPARED_LETTERS = 4000
"""Letters of the text that both tokenizers must read in the same way."""


@dataclass(frozen=True)
class Written:
    """The tokens decoded after a prompt, and the seconds from the first token to the last."""

    ids: list[int]
    seconds: float
    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second after the first one."""
        return (len(self.ids) - 1) / self.seconds


def plain(target: Runtime, prompt: list[int], steps: int) -> Written:
    """Decodes `steps` tokens greedily, one by one."""
    text = target.text(len(prompt) + steps)
    made = text.extend(prompt, 1)
    start = time.perf_counter()
    while len(made) < steps:
        made += text.extend(made[-1:], 1)
    return Written(made, time.perf_counter() - start)


def speculate(target: Runtime, draft: Runtime, prompt: list[int], steps: int, tokens: int) -> Written:
    """Decodes `steps` tokens greedily; the draft proposes up to `tokens` of them at a time."""
    text, sketch = (each.text(len(prompt) + steps + tokens) for each in (target, draft))
    whole = prompt + text.extend(prompt, 1)
    sketch.extend(prompt, 1)  # its tokens are of the text, so both have them
    end, proposed, accepted = len(prompt) + steps, 0, 0
    start = time.perf_counter()
    while len(whole) < end:
        proposals: list[int] = []
        for _ in range(min(tokens, end - len(whole) - 1)):  # the target adds one of its own
            unread = [*whole, *proposals][sketch.length :]
            guess = sketch.extend([min(each, draft.vocab - 1) for each in unread], 1)  # of padding it has other rows
            if guess[0] >= target.vocab:
                break
            proposals += guess
        found = text.extend([whole[-1], *proposals], 1 + len(proposals))
        right = next((at for at, pair in enumerate(zip(proposals, found, strict=False)) if pair[0] != pair[1]), None)
        kept = len(proposals) if right is None else right
        whole += [*proposals[:kept], found[kept]]
        proposed, accepted = proposed + len(proposals), accepted + kept
        text.cut(len(whole) - 1)
        sketch.cut(min(sketch.length, len(whole) - 1))
    return Written(whole[len(prompt) :], time.perf_counter() - start, proposed, accepted)


def measure(
    target: Runtime, draft: Runtime, settings: Speculative, report: Report, render: Render | None = None
) -> SpeculativeResult:
    """Returns `speculative`: acceptance, speeds with and without the draft, and whether the same was written.

    Where it was not, `parted` has for each text the position and by how much the target's first choice there was
    above its second: next to nothing where the rounding of arithmetic broke a tie.

    Raises:
        Failure: the two do not read the text alike.
    """
    prompts = _prompts(target, draft, settings, render)
    steps = settings.generate
    speculate(target, draft, prompts[0], min(8, steps), settings.tokens)  # warms up
    plains: list[Written] = []
    drafted: list[Written] = []
    for number, prompt in enumerate(prompts):
        for alone in (True, False) if number % 2 else (False, True):  # neither is always the first
            if alone:
                plains.append(plain(target, prompt, steps))
            else:
                drafted.append(speculate(target, draft, prompt, steps, settings.tokens))
        report(number + 1, len(prompts), f"{drafted[-1].rate / plains[-1].rate:.2f}×")
    parted = []
    for number, (ours, theirs) in enumerate(zip(plains, drafted, strict=True)):
        if ours.ids != theirs.ids:
            at = next(at for at in range(steps) if ours.ids[at] != theirs.ids[at])
            above = gap(target, prompts[number] + ours.ids[:at])
            parted.append(measured.ChangedText(text=number, position=at, gap=above))
    proposed = sum(each.proposed for each in drafted)
    fast, slow = (median(each.rate for each in runs) for runs in (drafted, plains))
    found = measured.Speculative(
        draft=settings.draft,
        tokens=settings.tokens,
        acceptance=sum(each.accepted for each in drafted) / proposed if proposed else 0.0,
        decode_tok_s=fast,
        plain_tok_s=slow,
        speedup=fast / slow,
        identical=not parted,
        proposed=proposed,
        texts=len(prompts),
        generate=steps,
        dtype=target.dtype,
        parted=parted,
    )
    warnings = [_warning(parted, len(prompts), target.dtype)] if parted else []
    return SpeculativeResult(speculative=found, warnings=warnings)


def _warning(parted: list[measured.ChangedText], texts: int, dtype: str) -> str:
    first = parted[0]
    return (
        f"{len(parted)} of {texts} texts are not what the target writes alone, the first from token "
        f"{first.position + 1} on, where its two likeliest logits differ by {first.gap:.2g} ({dtype})"
    )


def gap(runtime: Runtime, ids: list[int]) -> float:
    """Returns the difference of the two largest next logits."""
    second, first = np.sort(runtime.logits(np.array(ids))[-1])[-2:]
    return float(first - second)


def _prompts(target: Runtime, draft: Runtime, settings: Speculative, render: Render | None) -> list[list[int]]:
    """Returns pieces of the text, spread over the whole text."""
    text = load_text(settings.data, "perplexity", render)
    head = text[:COMPARED_LETTERS]
    if target.encode(head) != draft.encode(head):
        raise Failure(
            f"the draft ({draft.vocab:,} tokens) does not read the text as the target does ({target.vocab:,} tokens): "
            "take one with the same tokenizer"
        )
    ids = target.encode(text)
    last = len(ids) - settings.prompt
    if last < 0:
        raise Failure(
            f"the text {text_name(settings.data)} has {len(ids)} tokens, fewer than a prompt of {settings.prompt}"
        )
    starts = np.linspace(0, last, settings.samples).astype(int)
    return [ids[start : start + settings.prompt] for start in starts.tolist()]
