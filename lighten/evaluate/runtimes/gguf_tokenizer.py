"""The tokenizer and the chat templates of a GGUF file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lighten.evaluate.runtimes.llama_binding import GgufModel
from lighten.evaluate.runtimes.words import Turns, Words
from lighten.model.gguf_header import read_header
from lighten.model.gguf_source import chat_templates
from lighten.model.template import TODAY


class GgufTokenizer:
    """The tokenizer of a GGUF file, without its weights."""

    def __init__(self, path: Path) -> None:
        self._model = GgufModel(path, "cpu", vocab_only=True)
        library = self._model.library
        adds = library.llama_vocab_get_add_bos(self._model.vocab)
        named = {each: int(getattr(library, f"llama_vocab_{each}")(self._model.vocab)) for each in ("bos", "eos")}
        self.bos: int | None = named["bos"] if adds else None
        self.eos: int | None = named["eos"] if named["eos"] >= 0 else None
        self.prefix: int | None = named["bos"] if named["bos"] >= 0 else self.eos

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        return self._model.encode(text)

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Returns the text of ids; special tokens are left out, or spelled out where `special` is true."""
        return self._model.decode(ids, special)

    def ends(self) -> tuple[int, ...]:
        """Returns every id that ends a text for llama.cpp: those of the file, and some that it knows."""
        library, vocab = self._model.library, self._model.vocab
        return tuple(
            each for each in range(library.llama_vocab_n_tokens(vocab)) if library.llama_vocab_is_eog(vocab, each)
        )


def gguf_words(path: Path) -> Words:
    """Opens the words of a .gguf file, by llama.cpp and by the templates in the file."""
    header = read_header(path)
    fields = header.fields
    simple = GgufTokenizer(path)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    templates = chat_templates(header)
    names = {name: "" if index is None else str(tokens[index]) for name, index in ids.items()}

    def render(name: str, chat: Turns) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {"bos_token": names["bos"], "eos_token": names["eos"], "strftime_now": TODAY.strftime}
        rendered, _ = render_jinja_template([chat], chat_template=templates[name], add_generation_prompt=True, **given)
        return str(rendered[0])

    full = all(f"tokenizer.ggml.{name}_token_id" in fields for name in ("eot", "eom"))
    renders = {name: partial(render, name) for name in templates}
    return Words(simple.encode, simple.bos, ids["eos"], renders, ends=simple.ends(), room=not full)
