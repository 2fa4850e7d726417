"""Perplexity of a text: settings, key, checks, prediction and columns of a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from lighten.data import text
from lighten.data.origin import Text
from lighten.errors import RequestError
from lighten.evaluate.measurement import BYTES_PER_TOKEN, FIXED_BYTES, Measurement, linear_flops
from lighten.evaluate.paired import Z95
from lighten.evaluate.perplexity.change import change
from lighten.facts import ModelFacts
from lighten.model.tokens import check_text
from lighten.step import Estimate

Protocol = Literal["lighten", "gptq", "llama.cpp", "lm-eval"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
LENGTHS: dict[str, int | None] = {"lighten": 512, "gptq": 2048, "llama.cpp": 512, "lm-eval": None}
"""Default tokens of a chunk; None stands for all that the model takes."""
CLOSE = 0.05
"""Nats between a model and a usual 4-bit variant of it, for which `Perplexity.within` plans."""
CLUSTERED = 2.0
"""Factor by which the changes of chunks scatter more than those of as many independent tokens."""
FEWEST = 8
"""Minimum number of chunks for a useful interval of their changes."""


class Perplexity(Measurement):
    """Perplexity of a text by a named protocol.

    The text is cut into chunks of `length` tokens, at most `samples` of them. lm-eval's protocol has windows over at
    most `samples` documents. `within`, instead of `samples`, asks for a precision: as many chunks, spread evenly over
    the text, as make the change of perplexity known within that share. The number follows from the settings alone and
    is known before anything is measured. So nothing stops at a lucky moment, and all variants get the same tokens.
    """

    name = "perplexity"
    work = "lighten.evaluate.perplexity.work:measure"
    younger: ClassVar[dict[str, Any]] = {"protocol": "lighten", "within": None}
    needs = frozenset({"logits", "scores"})
    over_http = True
    of_quality = True
    refers = True

    data: Text = "builtin"
    length: int | None = Field(512, ge=8)
    samples: int | None = Field(None, ge=1)
    within: float | None = Field(None, gt=0, lt=1)
    protocol: Protocol = "lighten"

    @model_validator(mode="before")
    @classmethod
    def _length_of_the_protocol(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("length") is None:
            return {**value, "length": LENGTHS.get(str(value.get("protocol", "lighten")), 512)}
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.within is not None and (self.samples is not None or self.protocol == "lm-eval"):
            why = "lm-eval's takes whole documents" if self.samples is None else "samples says how many chunks already"
            raise ValueError(f"within decides how many chunks are measured, but {why}: leave one of them out")
        return self

    @property
    def most(self) -> int | None:
        """Maximum number of chunks, or documents; None for all.

        If logits change a little, the log-likelihood of a token changes with a variance of twice the divergence in nats
        (both are the same form in Fisher's information). So half of the 95 % interval of the mean change over n tokens
        of a variant `CLOSE` to its source is 1.96 √(2 · CLOSE · CLUSTERED / n).
        """
        if self.within is None:
            return self.samples
        assert self.length
        scored = self.length - 1 - (self.length // 2 if self.protocol == "llama.cpp" else 0)
        return max(FEWEST, math.ceil(2 * CLOSE * CLUSTERED * (Z95 / self.within) ** 2 / scored))

    @property
    def needed(self) -> frozenset[str]:
        """Logits, or scores if there are none. lm-eval's protocol always takes scores."""
        return frozenset({"scores"}) if self.protocol == "lm-eval" else self.needs

    @property
    def title(self) -> str:
        """Perplexity, with the protocol if it is not lighten's."""
        return "perplexity" + ("" if self.protocol == "lighten" else f" by {self.protocol}")

    def tokens(self, context: int | None) -> int:
        """Returns the tokens of a chunk or window, for a model that takes `context` positions."""
        return self.length or context or 2048

    def longest(self, context: int | None) -> int:
        """Returns the tokens of a chunk or window, and one that a server writes behind it."""
        return self.tokens(context) + 1

    def data_digest(self) -> str:
        """Returns the SHA-256 of the text; for lm-eval's protocol that of its documents, one by one."""
        found = text.read(self.data, "perplexity")
        plain = [each for each in found if isinstance(each, str)]
        if self.protocol != "lm-eval" or len(plain) < len(found):
            return text.identity(self.data, "perplexity")
        return text.digest("\0".join([each for each in plain if each.strip()][: self.samples]))

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if chunks are longer than the model's context."""
        self.check_length(facts.context, model)

    def check_length(self, context: int | None, model: str) -> None:
        """Raises RequestError if chunks are longer than the positions that a model takes."""
        if context and self.length and self.length > context:
            raise RequestError(
                f"perplexity by the protocol {self.protocol} takes chunks of {self.length} tokens, but {model} "
                f"takes {context} positions: set `length` to {context} or less, for a number of that length only"
            )

    def check_text(self, model: Path) -> None:
        """Raises RequestError or Failure for a text that cannot be read, or is shorter than a chunk."""
        check_text(model, self.data, "perplexity", 1 if self.protocol == "lm-eval" else self.length or 1)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of a pass over the text, and of the reference's head for the divergence."""
        found = [text.letters_of(each) for each in text.read(self.data, "perplexity")]
        letters = found[: self.samples] if self.protocol == "lm-eval" else [sum(found)]
        documents = [each / BYTES_PER_TOKEN for each in letters]
        tokens, length = sum(documents), self.tokens(facts.context)
        if self.protocol == "lm-eval":
            length = int(min(length, max(documents) + 1))
        elif self.most:
            tokens = min(tokens, self.most * length)
        head = facts.vocab * facts.hidden
        return Estimate(
            float32_flops=tokens * (linear_flops(facts) + 2.0 * head),
            seconds=6,
            peak_bytes=int(FIXED_BYTES + 4 * facts.params + 12 * length * facts.vocab + 4 * head),
            disk_bytes=int(tokens * (16 + 4 * facts.hidden)),
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts perplexity and divergence into a row. That of a second protocol goes to `other_perplexity`."""
        found = result["perplexity"]
        found["protocol"] = {"name": "lighten", **found["protocol"]}  # results from before there were several
        if "perplexity" not in row:
            row["perplexity"] = found
        else:
            row.setdefault("other_perplexity", []).append(found)
        row["divergence"] = row.get("divergence") or result.get("divergence")
        note = "its own tokenizer gives other ids than the baseline's on this text"
        if result.get("tokenizer_match") is False and note not in row.setdefault("notes", []):
            row["notes"].append(note)

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the paired change of perplexity into a row; nothing if the vocabularies differ."""
        if row.get("vocabulary"):
            return
        found, delta = change(measured, baseline), row.setdefault("delta", {})
        if "other_perplexity" in row:
            name = row["other_perplexity"][-1]["protocol"]["name"]
            delta.setdefault("other_perplexity", []).append({"protocol": name, **found})
        else:
            delta["perplexity"] = found
