"""What the files of a model directory say of its tokenizer, in whatever file.

Tools leave added tokens in tokenizer.json, tokenizer_config.json, added_tokens.json or special_tokens_map.json, and
chat templates in four places. Only this module reads them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError, reading
from lighten.model.files import inside, read_json, without_pickles

Json = dict[str, Any]

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
DEFAULT = "default"
"""Name of the chat template that is used if no other is asked for."""
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
"""Directory of further templates, NAME.jinja each."""

_COPIED = (".json", ".model", ".spm", ".txt", ".jinja")
"""Endings of the names of files that are copied."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SENTENCEPIECE = "tokenizer.model"
_UNUSUAL = re.compile(r"[^\w-]")
"""Pattern of characters that cannot be in the name of a file."""


def save_again(folder: Path) -> str:
    """Returns the command that writes a directory's tokenizer anew, whole."""
    code = f"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('{folder}')"
    return f'python -c "{code}"'


def read_tokenizer(folder: Path) -> Json:
    """Returns a directory's tokenizer.json, with the tokens that other files add to it.

    Raises:
        RequestError: there is no tokenizer.json, or another file gives a token an impossible id; the message says what
            to do.
        Failure: a file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise RequestError(without(folder))
    tokenizer = read_json(path)
    with reading(path, "fetch the model again"):
        tokenizer["model"].setdefault("type", "BPE")
        if missing := list(_missing(folder, tokenizer)):
            tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *missing]
            _check_ids(folder, tokenizer, missing)
    return tokenizer


def is_whole(folder: Path) -> bool:
    """Returns whether tokenizer.json has every token that the other files name; False if there is none."""
    path = folder / FILE
    return path.is_file() and not list(_missing(folder, read_json(path)))


def chat_templates(folder: Path) -> dict[str, str]:
    """Returns a directory's chat templates by name, the default first if there is one.

    chat_template.jinja and additional_chat_templates/ have priority over tokenizer_config.json, and that over the
    chat_template.json of a processor.
    """
    found: dict[str, str] = {}
    for file, key in (("chat_template.json", "chat_template"), (SETTINGS, "chat_template")):
        if (folder / file).is_file():
            found |= named_templates(read_json(folder / file).get(key))
    if (folder / TEMPLATE).is_file():
        found[DEFAULT] = _text(inside(folder / TEMPLATE, folder))
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        found[path.stem] = _text(inside(path, folder))
    return dict(sorted(found.items(), key=lambda entry: (entry[0] != DEFAULT, entry[0])))


def named_templates(value: Any) -> dict[str, str]:
    """Returns the chat templates of one entry: none, a text, a list of names and templates, or a table."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if not isinstance(value, dict):
        return {}
    return {str(name): text for name, text in value.items() if name and isinstance(text, str)}


def copy_templates(source: Path, out: Path) -> None:
    """Copies the directory of further chat templates, if there is one."""
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        (out / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(inside(file, source), out / TEMPLATES / file.name)


def copy_words(source: Path, out: Path, *, leave: Collection[str] = ()) -> None:
    """Copies all that turns text into ids and back for a model: tokenizer, chat templates, small settings, licence.

    Args:
        source: the model directory.
        out: where copies go.
        leave: names of files that stay, because `out` has its own or needs none.
    """
    copy_templates(source, out)
    for file in without_pickles(source):
        known = file.suffix in _COPIED or file.name.startswith("LICENSE")
        if known and not file.name.endswith(".index.json") and file.name not in ("artifact.json", *leave):
            shutil.copyfile(file, out / file.name)


def write_templates(templates: Mapping[str, str], out: Path) -> None:
    """Writes chat templates where every reader looks first, whatever their origin."""
    for name, text in templates.items():
        file = out / TEMPLATE if name == DEFAULT else out / TEMPLATES / f"{_UNUSUAL.sub('_', name)}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def ends(folder: Path) -> list[int]:
    """Returns the ids that end a text by generation_config.json; by config.json if that names none."""
    for file in ("generation_config.json", "config.json"):
        if (folder / file).is_file():
            value = read_json(folder / file).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if found := [each for each in ids if isinstance(each, int) and not isinstance(each, bool)]:
                return list(dict.fromkeys(found))
    return []


def says_more(folder: Path) -> bool:
    """Returns whether unusual files matter: added tokens, further templates, several ends.

    Artifacts of such a directory from before these files were read differ from those that are made now.
    """
    partial = (folder / FILE).is_file() and not is_whole(folder)
    return partial or bool(chat_templates(folder).keys() - {DEFAULT}) or len(ends(folder)) > 1


def without(folder: Path) -> str:
    """Returns the advice for a directory without a tokenizer.json."""
    if (folder / _SENTENCEPIECE).is_file():
        return (
            f"{folder} has only a {_SENTENCEPIECE}, and lighten reads {FILE}; write one once: "
            f"pip install sentencepiece protobuf tiktoken && {save_again(folder)}"
        )
    return f"{folder} has no {FILE}; write one once: {save_again(folder)}"


def _missing(folder: Path, tokenizer: Json) -> Iterator[Json]:
    """Yields the added tokens that tokenizer.json lacks, in the order of their ids.

    Tokens that no file gives an id come last. They get the next free ids.
    """
    known = {one["content"] for one in tokenizer.get("added_tokens") or []}
    vocab = _ids(tokenizer)
    listed = dict(sorted(_listed(folder).items(), key=lambda entry: entry[1]["id"]))
    found = {content: one for content, one in listed.items() if content not in known}
    yield from found.values()
    after = max([*vocab.values(), *(one["id"] for one in found.values())], default=-1) + 1
    for content, flags in _special(folder).items():
        if content in known or content in found:
            continue
        yield {"id": vocab.get(content, after), "content": content, **flags}
        after += content not in vocab


def _listed(folder: Path) -> dict[str, Json]:
    """Returns the added tokens whose ids stand in the files beside tokenizer.json, by content."""
    found: dict[str, Json] = {}
    if (folder / "added_tokens.json").is_file():
        for content, index in read_json(folder / "added_tokens.json").items():
            found[content] = {"id": int(index), "content": content, **dict.fromkeys(_FLAGS, False), "normalized": True}
    decoder = read_json(folder / SETTINGS).get("added_tokens_decoder") if (folder / SETTINGS).is_file() else None
    for index, one in (decoder or {}).items():
        found[one["content"]] = {"id": int(index), "content": one["content"], **_flags(one)}
    special = _special(folder)
    for content in found.keys() & special.keys():
        found[content]["special"] = True
    return found


def _special(folder: Path) -> dict[str, Json]:
    """Returns the flags, by content, of the special tokens that are named, which transformers adds by itself."""
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    lists = ("additional_special_tokens", "extra_special_tokens")
    named = {key: value for key, value in settings.items() if key in (*_NAMED, *lists)}
    path = folder / "special_tokens_map.json"
    if path.is_file() and "added_tokens_decoder" not in settings:
        named = {**named, **read_json(path)}
    found: dict[str, Json] = {}
    for value in named.values():
        for one in _several(value):
            one = {"content": one} if isinstance(one, str) else one
            if isinstance(one, dict) and isinstance(one.get("content"), str):
                found[one["content"]] = {**_flags(one), "special": True}
    return found


def _several(value: Any) -> list[Any]:
    """Returns the tokens of an entry, which may be one token, a list, or a table by name."""
    if isinstance(value, dict) and "content" not in value:
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _flags(one: Json) -> Json:
    return {name: bool(one.get(name, False)) for name in _FLAGS}


def _ids(tokenizer: Json) -> dict[str, int]:
    """Returns the id of every token of a tokenizer.json."""
    vocab = vocabulary_of(tokenizer["model"])
    return {**vocab, **{one["content"]: int(one["id"]) for one in tokenizer.get("added_tokens") or []}}


def vocabulary_of(model: Json) -> dict[str, int]:
    """Returns the id of every token of the `model` of a tokenizer.json, without added tokens."""
    if isinstance(model["vocab"], list):  # Unigram: pairs of token and score
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    vocab: dict[str, int] = model["vocab"]
    return vocab


def _check_ids(folder: Path, tokenizer: Json, added: list[Json]) -> None:
    """Raises RequestError if the tokens cannot have the ids that the other files give them."""
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(json.dumps({**tokenizer, "padding": None, "truncation": None}))
    for one in added:
        if (given := built.token_to_id(one["content"])) != one["id"]:
            taken = built.id_to_token(one["id"])
            why = f"which is {taken!r} there" if taken not in (None, one["content"]) else f"where it gets {given}"
            raise RequestError(
                f"{folder}: the files beside {FILE} give the token {one['content']!r} the id {one['id']}, {why}; "
                f"save the tokenizer again: {save_again(folder)}"
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read as text: {error}") from error
