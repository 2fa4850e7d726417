"""A model's chat template: its place, and the text that it makes of a conversation.

Templates are Jinja that comes with a model. They run in Jinja's sandbox, without access to this machine. They get what
transformers gives them. The day of `strftime_now` is always the same, so that a text is always the same too.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lighten.data.documents import Message
from lighten.errors import RequestError, reading
from lighten.model.tokenizer_files import chat_templates

if TYPE_CHECKING:
    from lighten.data.text import Render

TODAY = datetime.datetime(2025, 1, 1)
"""Day in texts that name one."""
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Prompter(Protocol):
    """Function that writes the turns of a conversation as one text, and then the beginning of an answer if asked."""

    def __call__(self, messages: Sequence[Message], answer: bool = False) -> str:
        """Returns the text."""


def renderer(model: Path) -> Render | None:
    """Returns the function that writes turns for a model directory or a .gguf file; None without a chat template.

    Raises:
        RequestError: the template is no Jinja.
        Failure: the files of the tokenizer are damaged.
    """
    from lighten.model import gguf_header

    if model.is_file() and model.suffix == ".onnx":
        model = model.parent
    file = model if model.is_file() else gguf_header.within(model)
    template, specials = _of_gguf(file) if file else _of_directory(model)
    return _compiled(template, specials, str(file or model)) if template else None


def has_chat_template(model: Path) -> bool:
    """Returns whether a model directory or file has a chat template of any name. Raises as `renderer` does."""
    from lighten.model import gguf_header, gguf_source

    model = model.parent if model.is_file() and model.suffix == ".onnx" else model
    file = model if model.is_file() else gguf_header.within(model)
    return bool(gguf_source.chat_templates(gguf_header.read_header(file)) if file else chat_templates(model))


def prompter(model: Path) -> Prompter | None:
    """Returns the function that writes turns for a model directory; None without a chat template.

    Errors are those of `renderer`.
    """
    template, specials = _of_directory(model)
    return _compiled(template, specials, str(model)) if template else None


def _of_directory(model: Path) -> tuple[str | None, dict[str, str]]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (model / name).is_file():
            with reading(model / name, "save the tokenizer again"):
                settings |= json.loads((model / name).read_text(encoding="utf-8"))
    specials = {name: _spelled(settings[name]) for name in SPECIALS if settings.get(name)}
    return next(iter(chat_templates(model).values()), None) or None, specials


def _spelled(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _of_gguf(file: Path) -> tuple[str | None, dict[str, str]]:
    from lighten.model import gguf_header

    fields = gguf_header.read_header(file).fields
    tokens = fields.get("tokenizer.ggml.tokens", ())
    specials = {}
    for name in ("bos", "eos", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and index < len(tokens):
            specials[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = str(tokens[index])
    template = fields.get("tokenizer.chat_template")
    return (str(template) if template else None), specials


def _compiled(template: str, specials: dict[str, str], model: str) -> Prompter:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks the assistant's words. It changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    try:
        made = environment.from_string(template)
    except TemplateError as error:
        raise RequestError(f"the chat template of {model} cannot be read: {error}") from error

    def render(messages: Sequence[Message], answer: bool = False) -> str:
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": answer}
        try:
            return made.render(**given, **specials)
        except Exception as error:  # a template may fail in any way that Python has
            begins = json.dumps(messages[0], ensure_ascii=False)[:80]
            raise RequestError(
                f"the chat template of {model} does not take the conversation that begins {begins}: {error}"
            ) from error

    return render


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
