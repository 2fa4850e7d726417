"""The results of a model's tokenizer: ids, ends, rendered chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.model.template import TODAY
from lighten.model.tokenizer_files import chat_templates, ends

Turns = list[dict[str, str]]
"""Turns of a chat, each with `role` and `content`."""


@dataclass(frozen=True)
class Words:
    """Functions and ids of a tokenizer."""

    encode: Callable[[str], list[int]]
    bos: int | None
    """Id that a text begins with."""
    eos: int | None
    render: Mapping[str, Callable[[Turns], str]]
    """Function that writes a chat with each of the model's templates, by name."""
    special: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    """Ids that end a text: EOS, of a turn, of a message."""
    room: bool = True
    """Whether the file could hold more of them."""


def hf_words(path: Path) -> Words:
    """Opens the words of a directory with a tokenizer of Hugging Face."""
    from transformers import AutoTokenizer

    from lighten.model.checkpoint import read_config
    from lighten.model.onnx_source import ends as graph_ends

    simple = HfTokenizer(path)
    full = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    templates = chat_templates(path)

    def render(name: str, chat: Turns) -> str:
        asked = {"chat_template": templates[name], "tokenize": False, "add_generation_prompt": True}
        return str(full.apply_chat_template(chat, **asked, strftime_now=TODAY.strftime))

    rows = read_config(path).get("vocab_size") or len(full)
    special = tuple(str(token) for token, index in full.get_added_vocab().items() if index < rows)
    named = [each for each in (full.eos_token_id, *ends(path), *graph_ends(path)) if each is not None and each < rows]
    renders = {name: partial(render, name) for name in templates}
    return Words(simple.encode, simple.bos, full.eos_token_id, renders, special, tuple(dict.fromkeys(named)))
