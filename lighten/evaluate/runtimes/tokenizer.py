"""The tokenizer of a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path

from lighten.errors import RequestError
from lighten.model import tokenizer_files


class HfTokenizer:
    """Wraps AutoTokenizer. It reads the directory only, and runs no code of its own."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # its parts in Rust raise nothing more special
            if not (path / tokenizer_files.FILE).is_file():
                raise RequestError(tokenizer_files.without(path)) from error
            reason = " ".join(str(error).split())[:400]
            raise RequestError(f"{path} has no tokenizer that transformers can read: {reason}") from error
        first = self._tokenizer("a", add_special_tokens=True)["input_ids"][0]
        self.bos: int | None = int(first) if first == self._tokenizer.bos_token_id else None
        self.eos: int | None = self._tokenizer.eos_token_id
        named = self._tokenizer.bos_token_id
        self.prefix: int | None = self.eos if named is None else int(named)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Returns the text of ids; special tokens are left out, or spelled out where `special` is true."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text
