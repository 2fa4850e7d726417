"""The token of each id, and whether two models mean the same by their ids.

Only then can the ids of one model be fed to the other, and their predictions be compared token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lighten.model import tokenizer_files
from lighten.model.gguf_header import is_gguf, read_header, within
from lighten.model.onnx_source import find_onnx
from lighten.model.tokenizer_table import BYTE, NORMAL, UNKNOWN


@dataclass(frozen=True)
class Entries:
    """A vocabulary."""

    learned: dict[int, str]
    """Tokens of the tokenizer's own model, by id."""
    others: dict[int, str]
    """Tokens that were added to it, and ids without a meaning."""

    @property
    def size(self) -> int:
        """Number of ids that a text can hold: the largest id plus one."""
        return max((*self.learned, *self.others), default=-1) + 1


def read(path: Path) -> Entries:
    """Returns the vocabulary of a model directory, a GGUF or an ONNX file.

    Raises:
        RequestError: it has no readable tokenizer.
        Failure: the file is damaged.
    """
    if onnx := find_onnx(path):
        return _of_directory(onnx.parent)
    gguf = path if is_gguf(path) else within(path)
    return _of_gguf(gguf) if gguf else _of_directory(path if path.is_dir() else path.parent)


def difference(ours: Entries, theirs: Entries) -> str | None:
    """Returns where two vocabularies differ, or None if every id of a text means the same in both.

    Padding does not count. Tokens that were added to only one of them do not count.
    """
    odd = [*_odd(ours, theirs), *_odd(theirs, ours)]
    if not odd:
        return None
    index = min(odd)
    first, second = (_words(each, index) for each in (ours, theirs))
    sizes = f"{len(ours.learned):,} and {len(theirs.learned):,} tokens"
    return f"{sizes}, the first that differs is id {index}: {first} and {second}"


def differing(first: Path, second: Path) -> str | None:
    """Returns where the vocabularies of two models differ, or None. Raises the errors of `read`."""
    return difference(read(first), read(second))


def _odd(ours: Entries, theirs: Entries) -> list[int]:
    return [
        index
        for index, token in ours.learned.items()
        if index not in theirs.others and theirs.learned.get(index) != token
    ]


def _words(entries: Entries, index: int) -> str:
    token = entries.learned.get(index, entries.others.get(index))
    return "none" if token is None else repr(token)


def _of_directory(folder: Path) -> Entries:
    if not (folder / tokenizer_files.FILE).is_file():
        return _of_transformers(folder)
    tokenizer = tokenizer_files.read_tokenizer(folder)
    others = {int(one["id"]): str(one["content"]) for one in tokenizer.get("added_tokens") or []}
    vocab = tokenizer_files.vocabulary_of(tokenizer["model"])
    return Entries({index: token for token, index in vocab.items() if index not in others}, others)


def _of_transformers(folder: Path) -> Entries:
    """Returns the vocabulary of a tokenizer without tokenizer.json, as transformers opens it."""
    from transformers import AutoTokenizer

    from lighten.errors import RequestError

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(tokenizer_files.without(folder)) from error
    others = {int(index): str(token) for token, index in tokenizer.get_added_vocab().items()}
    learned = {int(index): str(token) for token, index in tokenizer.get_vocab().items() if index not in others}
    return Entries(learned, others)


def _of_gguf(path: Path) -> Entries:
    fields = read_header(path).fields
    tokens = [str(token) for token in fields.get("tokenizer.ggml.tokens") or []]
    types = list(fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    own = {index for index, token_type in enumerate(types[: len(tokens)]) if token_type in (NORMAL, BYTE, UNKNOWN)}
    learned = {index: tokens[index] for index in sorted(own)}
    return Entries(learned, {index: token for index, token in enumerate(tokens) if index not in own})
