"""The pairs that a translation model learns from: references, or what its teacher writes for the same texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lighten.data import pairs
from lighten.data.phrases import Pair
from lighten.errors import Failure
from lighten.facts import ModelFacts, Task
from lighten.step import Context, Estimate, Step
from lighten.store.artifact import Artifact

FILE = "pairs.jsonl"
AT_ONCE = 128
"""Number of texts that the teacher translates together."""


class PairTeacher(Step):
    """Pairs of texts; `writes_targets` puts the teacher's translations in the place of the references."""

    kind: ClassVar[str] = "pairs"
    version: ClassVar[int] = 1
    tasks: ClassVar[tuple[Task, ...]] = ("seq2seq",)

    data: str
    samples: int | None = Field(None, ge=1)
    most: int = Field(128, ge=1, description="tokens of a translation at most")
    writes_targets: bool = False

    def _pairs(self) -> list[Pair]:
        return pairs.load(self.data, "train", self.samples)

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the pairs by their content."""
        return {**self.model_dump(exclude={"samples"}), "data": pairs.digest(self._pairs())}

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the cost of a step of the decoder for every token of a batch."""
        found = self._pairs()
        steps = len(found) / AT_ONCE * 20 if self.writes_targets else 0
        size = sum(len(text) for pair in found for text in pair)
        return Estimate(
            seconds=4 + steps * (0.02 + 4e-10 * AT_ONCE * facts.params), peak_bytes=700_000_000, disk_bytes=size
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the pairs."""
        found = self._pairs()
        if self.writes_targets:
            found = self._written(found, source.path, context)
        with (out / FILE).open("w", encoding="utf-8") as file:
            for pair in found:
                file.write(json.dumps(pair._asdict(), ensure_ascii=False) + "\n")
        return {"format": "teacher", "pairs": len(found), "by": "teacher" if self.writes_targets else "references"}

    def _written(self, found: list[Pair], teacher: Path, context: Context) -> list[Pair]:
        from transformers import AutoTokenizer

        from lighten.model.answers import Rules, translated

        model = open_model(teacher, context).eval()
        tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True)
        rules, order = Rules.of(teacher), sorted(range(len(found)), key=lambda each: len(found[each].source))
        texts = [""] * len(found)
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            read = tokenizer(
                [found[each].source for each in chosen],
                padding=True,
                truncation=True,
                max_length=self.most,
                return_tensors="pt",
            )
            inputs = {name: read[name].to(context.device) for name in ("input_ids", "attention_mask")}
            for place, ids in zip(chosen, translated(model, inputs, rules, self.most), strict=True):
                texts[place] = tokenizer.decode(ids, skip_special_tokens=True).strip()
            done = start + len(chosen)
            context.report(done, len(found), f"the teacher translates, {done:,} of {len(found):,} texts")
        return [Pair(pair.source, text) for pair, text in zip(found, texts, strict=True) if text]


def open_model(path: Path, context: Context) -> Any:
    """Returns a sequence-to-sequence model in float32, on the device of a step."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from lighten.model.empty import quiet
    from lighten.model.loading import from_pretrained

    with quiet():
        model: Any = from_pretrained(
            AutoModelForSeq2SeqLM, path, dtype=torch.float32, trust_remote_code=context.trust_remote_code
        )
    return model.to(context.device)


def read_pairs(folder: Path) -> list[Pair]:
    """Returns the output of a `PairTeacher` stage.

    Raises:
        Failure: the directory holds no such stage.
    """
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
        return [Pair(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise Failure(f"{folder} does not hold pairs of a teacher: {error}") from error
