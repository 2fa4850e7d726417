"""Translates texts, and writes the translations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_quality
from lighten.evaluate.runtimes.texts import Reader, TextRuntime
from lighten.evaluate.stored_result import TranslationResult
from lighten.evaluate.translation.settings import Translation
from lighten.results import measured
from lighten.step import Report

FILE = "translations.jsonl"
DRAWN = 1000
"""Number of times that the texts are drawn again for the interval."""


def measure(request: Request[Translation], report: Report) -> TranslationResult:
    """Returns BLEU and chrF. Writes every translation."""
    settings = request.settings
    runtime = cast(TextRuntime, for_quality(request))
    reader = Reader(runtime.folder, runtime.context)
    pairs = settings.pairs()
    order = sorted(range(len(pairs)), key=lambda each: len(pairs[each].source))
    found = [""] * len(pairs)
    for start in range(0, len(order), settings.batch):
        chosen = order[start : start + settings.batch]
        ids = runtime.translate(reader.read([pairs[each].source for each in chosen]), settings.most)
        for place, text in zip(chosen, reader.write(ids), strict=True):
            found[place] = text
        report(start + len(chosen), len(order), "")
    with (request.out / FILE).open("w", encoding="utf-8") as file:
        for pair, text in zip(pairs, found, strict=True):
            line = {"source": pair.source, "target": pair.target, "translation": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    scored = score(found, [pair.target for pair in pairs], settings.data)
    return TranslationResult(translation=scored).having(**facts(runtime))


def score(found: Sequence[str], wanted: Sequence[str], data: str | None = None) -> measured.Translation:
    """Returns BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of translations, as sacrebleu counts them."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu: Any = BLEU()
    chrf: Any = CHRF()
    drawn = DRAWN if len(found) > 1 else 1
    by_words = bleu.corpus_score(list(found), [list(wanted)], n_bootstrap=drawn)
    by_letters = chrf.corpus_score(list(found), [list(wanted)])
    half = getattr(by_words, "_ci", -1.0)
    middle = getattr(by_words, "_mean", -1.0)
    return measured.Translation(
        bleu=float(by_words.score),
        chrf=float(by_letters.score),
        n=len(found),
        ci95=(float(middle - half), float(middle + half)) if half >= 0 else None,
        exact=sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True)) / len(found),
        data=data,
        signatures=[f"BLEU|{bleu.get_signature()}", f"chrF|{chrf.get_signature()}"],
    )
