"""The calibration text as the sweep uses it: its amount, and what it shares with the evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.compress.calibrate.sweep import Sweep
from lighten.data import choices, text
from lighten.data.origin import SUFFIXES, text_name
from lighten.data.overlap import overlap
from lighten.evaluate.settings import Evaluate
from lighten.model.template import renderer
from lighten.model.tokenizer_files import chat_templates
from lighten.model.tokens import calibration_ids, load_tokenizer
from lighten.step import Report


@dataclass(frozen=True)
class Used:
    """The part of a text that a sweep runs through the model; `tokenizer` is a `tokenizers.Tokenizer`."""

    sweep: Sweep
    tokenizer: Any
    ids: np.ndarray[Any, np.dtype[np.int64]]
    """`[samples, length]`"""
    render: text.Render | None = None
    """Function that writes turns by the model's chat template."""

    @property
    def text(self) -> str:
        """Part of the text that is used, with its special tokens written out."""
        return self._decode(self.ids.ravel().tolist())

    def first_tokens(self, whole: str, count: int) -> str:
        """Returns the beginning of another text."""
        return self._decode(self.tokenizer.encode(whole, add_special_tokens=False).ids[:count])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def block(self, evaluate: Evaluate) -> dict[str, Any]:
        """Returns the `calibration` section of results.json."""
        known = self.text
        found = []
        for name, texts in self._evaluation_sets(evaluate):
            shared = overlap(known, texts)
            found.append(
                {
                    "with": name,
                    "ngram": shared.ngram,
                    "share": shared.share,
                    "runs": shared.runs,
                    "examples": list(shared.examples),
                }
            )
        return {
            "data": text_name(self.sweep.data),
            "asked": self.sweep.samples,
            "samples": len(self.ids),
            "length": self.sweep.length,
            "tokens": int(self.ids.size),
            "distinct": len(np.unique(self.ids)),
            "vocabulary": int(self.tokenizer.get_vocab_size()),
            "overlap": found,
        }

    def _evaluation_sets(self, evaluate: Evaluate) -> Iterator[tuple[str, list[str]]]:
        """Yields name and texts of each evaluation set: a text, or every task with every ending."""
        for perplexity in evaluate.perplexity:
            whole = text.load_text(perplexity.data, "perplexity", self.render)
            if perplexity.samples and perplexity.length:
                whole = self.first_tokens(whole, perplexity.samples * perplexity.length)
            protocol = "" if len(evaluate.perplexity) == 1 else f", {perplexity.protocol}"
            yield f"perplexity {_short(text_name(perplexity.data))}{protocol}", [whole]
        for accuracy in evaluate.accuracy:
            if accuracy.harness:
                from lighten.evaluate.accuracy.harness.tasks import texts

                yield f"accuracy {accuracy.task}", texts(accuracy)
                continue
            tasks = choices.load_choices(accuracy.local or accuracy.task, accuracy.most)
            yield f"accuracy {accuracy.task}", [f"{task.context} {end}" for task in tasks for end in task.endings]

    def chat(self, model: Path) -> dict[str, Any]:
        """Returns whether a model has a chat template, its special tokens, and those that the text uses."""
        template = "\n".join(chat_templates(model).values())
        added = {index: token.content for index, token in self.tokenizer.get_added_tokens_decoder().items()}
        marks = {index: content for index, content in added.items() if content in template}
        seen = set(np.unique(self.ids).tolist())
        return {
            "template": bool(template),
            "tokens": list(marks.values()),
            "used": [content for index, content in marks.items() if index in seen],
        }


def use(model: Path, sweep: Sweep) -> Used:
    """Returns what a sweep over a model directory uses of its text.

    Raises:
        RequestError: the text cannot be read, or is shorter than one sample.
    """
    ids = calibration_ids(model, sweep.data, sweep.samples, sweep.length)
    return Used(sweep, load_tokenizer(model), ids, renderer(model))


def describe(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns `Used.block`; the target of `run_isolated`, because a large text takes memory to tokenize.

    Args:
        payload: model (its directory), calibration and evaluate (as in a recipe).
        report: not used.
    """
    used = use(Path(payload["model"]), Sweep(**payload["calibration"]))
    return used.block(Evaluate(**payload["evaluate"]))


def examine(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns `Used.block` and `Used.chat`, and the number of tokens of another text; a target of `run_isolated`.

    Args:
        payload: as for `describe`, and `heldout`, the path of the other text.
        report: not used.
    """
    model = Path(payload["model"])
    used = use(model, Sweep(**payload["calibration"]))
    other = text.load_text(payload["heldout"], "perplexity")
    return {
        "calibration": used.block(Evaluate(**payload["evaluate"])),
        "chat": used.chat(model),
        "heldout_tokens": len(used.tokenizer.encode(other, add_special_tokens=False).ids),
    }


def _short(data: str) -> str:
    """Returns the name of a file without its directory. Other names stay."""
    return Path(data).name if Path(data).suffix in SUFFIXES else data
