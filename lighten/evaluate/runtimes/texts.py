"""Runtimes of models that read whole texts: what they give, and how they read texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lighten.errors import RequestError
from lighten.evaluate.runtimes.runtime import Floats, Ids, Runtime


@dataclass(frozen=True)
class Texts:
    """Texts as a model reads them: ids and mask, both `[texts, longest]`."""

    ids: Ids
    mask: Ids


class TextRuntime(Runtime, Protocol):
    """A loaded encoder or sequence-to-sequence model. Methods of capabilities that it lacks are not called."""

    folder: Path
    """Directory of its tokenizer."""

    def translate(self, texts: Texts, most: int) -> list[list[int]]:
        """Returns the ids of the answers, at most `most` each, greedily, without the first and last special ids."""

    def states(self, texts: Texts) -> Floats:
        """Returns the last hidden states, `[texts, longest, hidden]`."""

    def fill(self, texts: Texts) -> Floats:
        """Returns the logits of every position, `[texts, longest, vocab]`."""


class Reader:
    """The tokenizer of a directory, for whole texts with the special tokens that the model expects."""

    def __init__(self, folder: Path, most: int | None) -> None:
        """Opens the tokenizer. Texts are cut to `most` tokens.

        Raises:
            RequestError: there is no tokenizer that transformers can read.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # its parts in Rust raise nothing more special
            reason = " ".join(str(error).split())[:400]
            raise RequestError(f"{folder} has no tokenizer that transformers can read: {reason}") from error
        if self.tokenizer.pad_token is None:
            raise RequestError(f"the tokenizer in {folder} has no token for padding: name one as pad_token")
        self.most = most

    def read(self, texts: Sequence[str]) -> Texts:
        """Returns texts as ids. Shorter ones are padded on the right."""
        found = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=self.most is not None,
            max_length=self.most,
            return_tensors="np",
        )
        return Texts(found["input_ids"].astype(np.int64), found["attention_mask"].astype(np.int64))

    def write(self, ids: list[list[int]]) -> list[str]:
        """Returns the texts of ids, without special tokens."""
        return [str(self.tokenizer.decode(each, skip_special_tokens=True)).strip() for each in ids]
