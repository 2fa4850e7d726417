"""What a model's tokenizer does: ids, ends, rendered chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lighten.model.tokenizer_files import chat_templates, ends

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Words:
    """What turns text into ids."""

    encode: Callable[[str], list[int]]
    bos: int | None
    """The id that a text begins with."""
    eos: int | None
    render: Mapping[str, Callable[[Chat], str]]
    """What writes a chat with each of the model's templates, by name."""
    special: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    """Every id that ends a text: EOS, of a turn, of a message."""
    room: bool = True
    """Whether the file could hold more of them."""


def words_of(path: Path) -> Words:
    """Opens what turns text into ids for a model directory or a .gguf file."""
    from lighten.evaluate.runtimes.opening import find_gguf
    from lighten.model.onnx_source import find_onnx

    if onnx := find_onnx(path):
        return _hf_words(onnx.parent)
    gguf = find_gguf(path)
    return _gguf_words(gguf) if gguf else _hf_words(path)


def _hf_words(path: Path) -> Words:
    from transformers import AutoTokenizer

    from lighten.evaluate.runtimes.opening import open_tokenizer
    from lighten.model.checkpoint import read_config
    from lighten.model.onnx_source import ends as graph_ends

    simple = open_tokenizer(path)
    full = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    templates = chat_templates(path)

    def render(name: str, chat: Chat) -> str:
        asked = {"chat_template": templates[name], "tokenize": False, "add_generation_prompt": True}
        return str(full.apply_chat_template(chat, **asked))

    rows = read_config(path).get("vocab_size") or len(full)
    special = tuple(str(token) for token, index in full.get_added_vocab().items() if index < rows)
    named = [each for each in (full.eos_token_id, *ends(path), *graph_ends(path)) if each is not None and each < rows]
    renders = {name: partial(render, name) for name in templates}
    return Words(simple.encode, simple.bos, full.eos_token_id, renders, special, tuple(dict.fromkeys(named)))


def _gguf_words(path: Path) -> Words:
    from lighten.evaluate.runtimes.llama_binding import GgufTokenizer
    from lighten.model.gguf_header import read_header
    from lighten.model.gguf_source import chat_templates

    header = read_header(path)
    fields = header.fields
    simple = GgufTokenizer(path)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    templates = chat_templates(header)
    names = {name: "" if index is None else str(tokens[index]) for name, index in ids.items()}

    def render(name: str, chat: Chat) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        tokens = {"bos_token": names["bos"], "eos_token": names["eos"]}
        rendered, _ = render_jinja_template([chat], chat_template=templates[name], add_generation_prompt=True, **tokens)
        return str(rendered[0])

    full = all(f"tokenizer.ggml.{name}_token_id" in fields for name in ("eot", "eom"))
    renders = {name: partial(render, name) for name in templates}
    return Words(simple.encode, simple.bos, ids["eos"], renders, ends=simple.ends(), room=not full)
