"""Whether an exported file, opened by the runtime that will serve it, still is the model that it was made from.

Both models get the same token ids. Tokenizer, chat template and special tokens are compared by their results. The
message about a difference has the first place inside the model where the two differ.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np

from lighten.data.hard import hard_strings
from lighten.data.text import builtin_text
from lighten.errors import Failure
from lighten.evaluate.runtimes.choose import find_opener, open_runtime, open_tokenizer, words_of
from lighten.evaluate.runtimes.words import Turns, Words
from lighten.model.tokenizer_files import DEFAULT
from lighten.process.isolate import Outcome, run_isolated
from lighten.step import Report

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.runtime import Ids, Runtime
    from lighten.evaluate.runtimes.trace import States

CHUNK = 256
ROWS = 64
"""Number of positions whose logits are written, or read and compared, at a time."""
PARTED = 0.02
"""Relative difference of a state up to which a file of 16 bits or more is faithful."""

CHATS = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Elbe."},
        {"role": "user", "content": "Another?\n"},
    ],
)


def check(payload: dict[str, Any], report: Report) -> Outcome:
    """Compares an export with its source, in processes of their own that hold one of the two at a time.

    Args:
        payload: `source` and `made` (paths), `limits` (`perplexity`, relative, and `top1` and `tokenizer`, shares; each
            may be None), `tokens`, `device` of the export (cpu), `trust_remote_code`.
        report: called for every chunk.

    Returns:
        The facts, under `parity`, and warnings; all the seconds, and the peak of the largest of the processes.

    Raises:
        Failure: it is outside its limits; says of what, and where the two first differ.
    """
    spent: list[Outcome] = []

    def run(function: str, *, fresh: bool = False, **more: Any) -> Any:
        spent.append(run_isolated(f"{__name__}:{function}", {**payload, **more}, report, fresh=fresh))
        return spent[-1].value

    report(0, 1, "tokenizers")
    made = Path(payload["made"])
    words = run("compare_words")
    facts, wrong = words["facts"], words["wrong"]
    if words["text"] is not None:
        # beside the export, in a directory that is its own or not there yet
        with tempfile.TemporaryDirectory(dir=made if made.is_dir() else made.parent, prefix=".parity-") as folder:
            logits = str(Path(folder) / "logits")
            expected = run("write_logits", text=words["text"], logits=logits)
            # forked from a process that has imported torch, it would count that too
            found = run("compare_logits", logits=logits, **expected, fresh=True)
        facts |= found
        outside = [*_outside(found, payload["limits"])]
        if outside:
            outside.append(run("find_place", chunk=expected["chunks"][0]))
        wrong += outside
    if wrong:
        raise Failure(f"{made.name} is not the model it was made from: " + "; ".join(wrong))
    seconds, peak = sum(each.seconds for each in spent), max(each.peak_rss_bytes for each in spent)
    return Outcome({"parity": facts, "warnings": words["warnings"]}, seconds, peak)


def _computes_logits(source: Path) -> bool:
    """Returns whether it is a causal language model. Other models were compared when they were written."""
    runtime, place = find_opener(source)
    return runtime.predicts_tokens(place)


def _outside(found: dict[str, Any], limits: dict[str, float | None]) -> Iterator[str]:
    change, top1 = found["perplexity_change"], found["top1_agreement"]
    most, least = limits.get("perplexity"), limits.get("top1")
    if most is not None and not abs(change) <= most:
        values = f"{found['perplexity']:.4f} against {found['source_perplexity']:.4f}"
        yield f"its perplexity is {values}, {change:+.3%} where {most:.3%} is allowed"
    if least is not None and not top1 >= least:
        yield f"the most likely token is the same at {top1:.2%} of the positions, at least {least:.2%} was asked for"


def write_logits(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Writes the logits of the source for a text, float32 rows one after the other, into the file `logits`.

    Returns:
        The ids that were computed (`chunks`), and the columns of a row (`vocab`).

    Raises:
        Failure: they are not finite.
    """
    ours = _open_source(Path(payload["source"]), payload.get("trust_remote_code", False))
    chunks = _chunks(payload["text"], payload["tokens"], ours.vocab)
    vocab = 0
    with open(payload["logits"], "wb") as file:
        for number, chunk in enumerate(chunks):
            expected = ours.logits(chunk)
            vocab = expected.shape[1]
            for start in range(0, len(chunk), ROWS):
                piece = np.ascontiguousarray(expected[start : start + ROWS], dtype=np.float32)
                if not np.isfinite(piece).all():
                    raise Failure("the source itself computes nothing finite: mend it, or say parity: {tokens: 0}")
                file.write(piece.data)
            del expected, piece  # before the next ones are computed
            report(number + 1, 2 * len(chunks), "source")
    ours.close()
    return {"chunks": [chunk.tolist() for chunk in chunks], "vocab": vocab}


def _open_source(source: Path, trusted: bool) -> Runtime:
    """Opens the source in float32."""
    runtime, place = find_opener(source)
    return runtime.open_exact(place, trusted)


def find_place(payload: dict[str, Any], report: Report) -> str:
    """Returns where the two first differ inside, for the ids `chunk`, in words."""
    from lighten.evaluate.runtimes.trace import trace

    trusted, chunk = payload.get("trust_remote_code", False), np.array(payload["chunk"], dtype=np.int64)
    theirs = open_runtime(Path(payload["made"]), device=payload.get("device", "cpu"), trust_remote_code=trusted)
    states, name = trace(theirs, chunk), theirs.name
    theirs.close()
    ours = _open_source(Path(payload["source"]), trusted)
    return _where(trace(ours, chunk), states, ours.name, name)


def _where(expected: States | None, found: States | None, ours: str, theirs: str) -> str:
    from lighten.evaluate.runtimes.trace import first_difference

    if expected is None or found is None:
        return f"{ours if expected is None else theirs} does not show where it differs"
    place = first_difference(expected, found, PARTED)
    return f"it first differs in {place}" if place else "its layers agree: the final norm or the head differs"


def _read_text(source: Path, tokens: int) -> dict[str, Any]:
    """Returns the ids of the built-in text, and those that the source puts first."""
    tokenizer = open_tokenizer(source)
    ids = tokenizer.encode(builtin_text("perplexity")[: 8 * tokens + 1000])
    return {"first": [] if tokenizer.bos is None else [tokenizer.bos], "ids": ids}


def _chunks(text: dict[str, list[int]], tokens: int, vocab: int) -> list[Ids]:
    """Returns sequences of ids of a text, each with the source's first token."""
    first = text["first"]
    length = min(CHUNK, tokens)
    size = max(2, length - len(first))
    ids = [each for each in text["ids"] if each < vocab]
    count = max(1, min(tokens // length, len(ids) // size))
    return [np.array(first + ids[at * size : (at + 1) * size], dtype=np.int64) for at in range(count)]


def compare_logits(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns the comparison of the written rows `[positions, vocab]` with those of the export."""
    from lighten.evaluate.runtimes import rows

    made, vocab = Path(payload["made"]), payload["vocab"]
    chunks = [np.array(chunk, dtype=np.int64) for chunk in payload["chunks"]]
    trusted = payload.get("trust_remote_code", False)
    theirs = open_runtime(made, device=payload.get("device", "cpu"), trust_remote_code=trusted)
    if any(chunk.max() >= theirs.vocab for chunk in chunks):
        raise Failure(f"{made.name} has {theirs.vocab:,} tokens, the text of its source has others")
    parts: list[list[Any]] = [[], [], [], []]
    with open(payload["logits"], "rb") as logits:
        for number, chunk in enumerate(chunks):
            found = theirs.logits(chunk)
            for start in range(0, len(chunk), ROWS):
                piece = found[start : start + ROWS]
                if not np.isfinite(piece).all():
                    raise Failure(f"{theirs.name} computes numbers that are not finite, where the source's are")
                expected = np.frombuffer(logits.read(4 * vocab * len(piece)), dtype=np.float32).reshape(-1, vocab)
                kl, same = rows.divergence(expected, piece)
                targets = chunk[start + 1 : start + 1 + ROWS]
                nll = [-rows.token_logprobs(each[: len(targets)], targets)[0] for each in (expected, piece)]
                for part, values in zip(parts, (kl, same, *nll), strict=True):
                    part.append(values)
            del found, piece  # before the next ones are computed
            report(len(chunks) + number + 1, 2 * len(chunks), "")
    theirs.close()
    kl, same, before, after = (np.concatenate(part) for part in parts)
    change = math.exp(float(after.mean() - before.mean())) - 1
    return {
        "tokens": len(kl),
        "source_perplexity": math.exp(float(before.mean())),
        "perplexity": math.exp(float(after.mean())),
        "perplexity_change": change,
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float(same.mean()),
    }


def compare_words(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns the facts about the two tokenizers, what is wrong, warnings, and a text for their models.

    There is no text if the models are not to be compared.
    """
    source, least, tokens = Path(payload["source"]), payload["limits"].get("tokenizer"), payload["tokens"]
    facts, wrong, warnings = _compare_words(source, Path(payload["made"]), least)
    text = _read_text(source, tokens) if tokens and _computes_logits(source) else None
    return {"facts": facts, "wrong": wrong, "warnings": warnings, "text": text}


def _compare_words(source: Path, made: Path, least: float | None) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns the facts about the two tokenizers, what is wrong, and warnings."""
    ours, theirs = words_of(source), words_of(made)
    strings = hard_strings(special=ours.special)
    odd = [text for text in strings if ours.encode(text) != theirs.encode(text)]
    # what a runtime without NFC, or one that writes a space as ▁ itself, reads otherwise
    spelled = {text: normalize("NFC", text).replace("▁", " ") for text in odd}
    composed = [text for text, other in spelled.items() if ours.encode(other) == theirs.encode(other)]
    wrong, warnings = [], []
    broken = [text for text in odd if text not in composed]
    if least is not None and 1 - len(broken) / len(strings) < least:
        first = broken[0]
        wrong.append(
            f"{len(broken)} of {len(strings)} strings get other ids, the first of them {first!r}: "
            f"{theirs.encode(first)} instead of {ours.encode(first)}"
        )
    if composed:
        warnings.append(
            f"{len(composed)} of {len(strings)} hard strings get other ids, because the runtime does not compose "
            "accents (NFC) or takes ▁ for a space: give it composed text"
        )
    for name, mine, its in (("first token (BOS)", ours.bos, theirs.bos), ("end of text (EOS)", ours.eos, theirs.eos)):
        if mine != its:
            wrong.append(f"its {name} is {its}, the source's {mine}")
    if lost := [each for each in ours.ends if each not in theirs.ends]:
        note = f"it does not end a text at {', '.join(map(str, lost))}, the source does"
        (wrong if theirs.room else warnings).append(note)
    found = [_compare_chats(name, ours, theirs) for name in dict.fromkeys([*ours.render, *theirs.render])]
    wrong += [line for verdict, line in found if verdict == "differs"]
    warnings += [line for verdict, line in found if verdict == "refuses"]
    verdicts = [verdict for verdict, _ in found]
    chat = next((each for each in ("differs", "refuses", "same") if each in verdicts), "none")
    facts = {"strings": len(strings), "strings_differ": len(odd), "chat_template": chat, "ends": len(ours.ends)}
    return {**facts, **({"chat_templates": sorted(ours.render)} if len(found) > 1 else {})}, wrong, warnings


def _compare_chats(name: str, ours: Words, theirs: Words) -> tuple[str, str]:
    """Returns whether two templates of one name write the same text, and remarks."""
    rendered = [(_rendered(ours, name, chat), _rendered(theirs, name, chat)) for chat in CHATS]
    which = "chat template" if name == DEFAULT else f"chat template {name}"
    if (name in ours.render) != (name in theirs.render):
        return "differs", f"it has {'a' if name in theirs.render else 'no'} {which}, unlike the source"
    for expected, found in rendered:
        if expected != found:
            return "differs", f"its {which} writes {found!r} instead of {expected!r}"
    if any(mine is not None for mine, _ in rendered):
        return "same", ""
    return "refuses", f"the {which} refuses every chat that was tried: it could not be compared"


def _rendered(words: Words, name: str, chat: Turns) -> str | None:
    """Returns a chat as a template writes it; None if there is no template, or it refuses such a chat."""
    try:
        return words.render[name](chat) if name in words.render else None
    except Exception:  # templates raise errors of their own, of many kinds
        return None
