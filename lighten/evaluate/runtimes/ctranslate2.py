"""Models of CTranslate2: causal language models here, translators in `ctranslate2_texts`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.batches import Layout, by_length, read_scores
from lighten.evaluate.runtimes.ctranslate2_library import open_library
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Floats, Ids, Question, Runtime, Score, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.facts import ModelFacts
from lighten.model.ctranslate2_source import facts_of, find_ctranslate2, read_header, read_vocabulary
from lighten.step import Report
from lighten.store.artifact import read_artifact
from lighten.store.files import MANIFEST

BATCH_TOKENS = 384
_VOCABULARIES = ("vocabulary.json", "vocabulary.txt")


class CTranslate2Opener(Opener[Path]):
    """Directories with a `model.bin` of CTranslate2, of any maker."""

    name: ClassVar[str] = "ctranslate2"
    packages: ClassVar[tuple[str, ...]] = ("ctranslate2",)
    modules: ClassVar[tuple[str, ...]] = ("ctranslate2",)
    extra: ClassVar[str | None] = "ctranslate2"
    weights: ClassVar[tuple[str, ...]] = ("model.bin",)

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`."""
        return None if isinstance(target, str) else find_ctranslate2(target)

    def facts(self, place: Path) -> ModelFacts:
        """See `Opener`: the sizes that the shapes of the tensors give."""
        return facts_of(read_header(place), _context(place))

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`."""
        header = read_header(place)
        if header.task == "causal":
            return CTranslate2Runtime(place, conditions.device)
        if header.task == "seq2seq":
            from lighten.evaluate.runtimes.ctranslate2_texts import CTranslate2Texts

            return CTranslate2Texts(place, conditions.device)
        raise RequestError(f"{place} is a {header.specification}: only language models and translators are measured")

    def predicts_tokens(self, place: Path) -> bool:
        """See `Opener`."""
        return read_header(place).task == "causal"


class CTranslate2Runtime(Defaults):
    """A causal language model. See `Runtime` for the methods."""

    name = "ctranslate2"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes"})

    def __init__(self, folder: Path, device: str) -> None:
        """Loads a directory. Errors are those of `open_library`, and Failure for a damaged vocabulary."""
        self.folder, self.device = folder, device
        self._generator = open_library("Generator", folder, device)
        self.dtype = str(self._generator.compute_type)
        self.detail = f"CTranslate2 {version('ctranslate2')}"
        self.vocab = facts_of(read_header(folder)).vocab
        self.context: int | None = _context(folder)
        self._tokenizer: HfTokenizer | None = None

    @cached_property
    def _tokens(self) -> list[str]:
        """Tokens by id. CTranslate2 takes the beginning of a text that it continues in tokens."""
        file = next((self.folder / name for name in _VOCABULARIES if (self.folder / name).is_file()), None)
        if file is None:
            raise Failure(f"{self.folder} has no vocabulary.json: convert the model again")
        tokens = read_vocabulary(file)
        if len(set(tokens)) < len(tokens):
            raise Failure(f"two ids of {file} spell the same token, so no text can be continued")
        return tokens

    def _rows(self, rows: list[list[int]]) -> Floats:
        """Returns logits `[rows, longest, vocab]`; those behind the end of a shorter row mean nothing."""
        import ctranslate2

        try:
            found = self._generator.forward_batch(rows)
        except (RuntimeError, ValueError) as error:
            longest = max(map(len, rows))
            raise Failure(f"CTranslate2 failed on {longest} tokens of {self.folder}: {error}") from error
        if self.device != "cpu":
            found = found.to(ctranslate2.DataType.float32).to_device(ctranslate2.Device.cpu)
        return np.asarray(found, dtype=np.float32)

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        found: Floats = self._rows([ids.tolist()])[0]
        return found

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`. Every ending is a row with its context before it: the library takes no mask."""
        alone = [(number, ending) for number, question in enumerate(questions) for ending in question.endings]
        rows = [Question(questions[number].context, [ending]) for number, ending in alone]
        found: dict[int, Score] = {}
        start = time.monotonic()
        report(0, len(rows), "")
        for batch in by_length(rows, BATCH_TOKENS, padded=True):
            layouts = [Layout(rows[place]) for place in batch]
            logits = self._rows([layout.ids.tolist() for layout in layouts])
            wanted = np.concatenate([logits[row, each.wanted] for row, each in enumerate(layouts)])
            for place, (score,) in zip(batch, read_scores(wanted, layouts), strict=True):
                found[place] = score
            report(len(found), len(rows), f"{len(found) / (time.monotonic() - start):.1f} endings/s")
        scores: list[list[Score]] = [[] for _ in questions]
        for place, (number, _) in enumerate(alone):
            scores[number].append(found[place])
        return scores

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`. The library tells of every token as it comes."""
        rows, last = [[self._tokens[id] for id in row] for row in prompt.tolist()], len(prompt) - 1
        times: list[float] = []

        def told(step: Any) -> bool:
            if step.batch_id == last:
                times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        found = self._generator.generate_batch(
            rows,
            max_length=steps,
            min_length=steps,  # an end of text does not end it before
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
        )
        if len(times) != steps:
            raise Failure(f"CTranslate2 wrote {len(times)} tokens where {steps} were asked for")
        passed = np.diff([start, *times])
        ids = np.array([each.sequences_ids[0] for each in found])
        return Timings(float(passed[0]), [float(each) for each in passed[1:]], ids)

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`. The library keeps no cache between calls, so every token computes its whole text."""
        ids = list(prompt)
        for _ in range(most):
            ids.append((yield self._rows([ids])[0, -1]))

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._tokenizer is None:
            self._tokenizer = HfTokenizer(self.folder)
        return self._tokenizer.encode(text)

    def close(self) -> None:
        """See `Runtime`."""
        self._generator.unload_model()


def _context(folder: Path) -> int | None:
    """Returns the number of positions that the export noted; None for a directory of another maker."""
    if not (folder / MANIFEST).is_file():
        return None
    found = read_artifact(folder).facts.get("context")
    return found if isinstance(found, int) else None
