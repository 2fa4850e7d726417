"""A `Modelfile` for Ollama beside a GGUF file: template, system text, stop words and parameters.

Ollama writes turns by a Go template. A Jinja template cannot be translated in general. So the text around each turn is
found by rendering conversations of known words, and the template is kept only if it writes other conversations exactly
as the model's own does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten.data.documents import Message
from lighten.errors import LightenError
from lighten.model.files import read_json
from lighten.model.template import Prompter, prompter
from lighten.model.tokenizer_files import chat_templates, ends

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Names of generation_config.json, and Ollama's names of the same."""
ROLES = ("system", "user", "assistant")
S, U, A, V = "SysWordsOne", "UserWordsTwo", "AnswerWordsThree", "UserWordsFour"
"""Words that no template has."""
TRIALS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""Roles of the conversations that a template is tried on."""


@dataclass(frozen=True)
class Turns:
    """The texts around turns: before and after the words of each role."""

    before: dict[str, str]
    after: dict[str, str]
    opening: str
    """Text before the first turn."""
    answer: str
    """Beginning of an answer."""
    system: str
    """Words of the system if a conversation has none; empty if there is no such turn."""

    def write(self, messages: Sequence[Message]) -> str:
        """Returns the text of a conversation, up to the beginning of an answer, as Ollama would write it."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = [self.before[each["role"]] + each["content"] + self.after[each["role"]] for each in messages]
        return self.opening + "".join(turns) + self.answer

    @property
    def template(self) -> str:
        """The same in Go's template language."""
        branches = [
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for role in ROLES
            if role in self.before
        ]
        turns = "{{ range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}"
        return self.opening + turns + self.answer


def modelfile(file: str, source: Path, bos: str | None, tokens: Sequence[str]) -> str:
    """Returns the contents of the Modelfile.

    Args:
        file: name of the GGUF file, which lies beside it.
        source: directory of the model that it was made from.
        bos: beginning of text, if llama.cpp puts it before every text by itself.
        tokens: texts of the tokens by id.
    """
    lines = [f"FROM ./{file}"]
    templates = chat_templates(source)
    turns = find_turns(source, bos)
    if turns:
        if any("tools" in each for each in templates.values()):
            lines.append("# The template below is for conversations. Those with tools need the model's own.")
        lines.append(f'TEMPLATE """{turns.template}"""')
        lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    elif templates:
        lines.append(
            "# The model's chat template cannot be written in Ollama's language: Ollama takes one that is like it."
        )
    stops = dict.fromkeys(tokens[each] for each in ends(source) if each < len(tokens))
    lines += [f'PARAMETER stop "{each}"' for each in stops if each and '"' not in each and "\n" not in each]
    return "\n".join([*lines, *_parameters(source)]) + "\n"


def _parameters(source: Path) -> list[str]:
    path = source / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    found = {name: given.get(theirs) for theirs, name in PARAMETERS.items()}
    if given.get("do_sample") is False:
        found = {"temperature": 0, "num_predict": found["num_predict"]}
    return [
        f"PARAMETER {name} {json.dumps(value)}"
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def find_turns(source: Path, bos: str | None = None) -> Turns | None:
    """Returns the texts around the turns of a model's chat template; None without one, or if it does more than that.

    Args:
        source: directory of the model.
        bos: text that is left out at the beginning.
    """
    try:
        if any("strftime_now" in each for each in chat_templates(source).values()):
            return None  # it would say the same day for ever
        write = prompter(source)
        turns = _pieces(write, bos or "") if write else None
    except (LightenError, ValueError):
        return None
    if write is None or turns is None or not _can_be_written(turns):
        return None
    for roles in TRIALS:
        messages = [{"role": role, "content": f"{role} says {at}:\n«a» {{b}} 'c'"} for at, role in enumerate(roles)]
        try:
            if write(messages, True).removeprefix(bos or "") != turns.write(messages):
                return None
        except LightenError:
            if roles[0] != "system":  # some know no system; Ollama then writes what the others have
                return None
    return turns


def _pieces(write: Prompter, bos: str) -> Turns:
    """Returns the texts around turns, from conversations of known words.

    Raises:
        ValueError: the words are not there once and in order, or the texts are not the same in every place.
    """
    user, answer = {"role": "user", "content": U}, {"role": "assistant", "content": A}
    before, after_user = _cut(write([user], False).removeprefix(bos), U)
    _, with_answer = _cut(write([user], True), U)
    begins = _rest(with_answer, after_user)
    _, between, after_answer = _cut(write([user, answer], False), U, A)
    before_answer = _rest(between, after_user)
    _, _, next_user, _ = _cut(write([user, answer, {"role": "user", "content": V}], False), U, A, V)
    if not next_user.startswith(after_answer):
        raise ValueError("an answer ends in another way when it is the last one")
    before_user = next_user[len(after_answer) :]
    texts = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    try:
        start, middle, _ = _cut(write([{"role": "system", "content": S}, user], False).removeprefix(bos), S, U)
    except LightenError:  # there is no such turn
        return _turns(texts, before.removesuffix(before_user), begins, "")
    if not middle.endswith(before_user):
        raise ValueError("the first user turn is another one behind a system's")
    after_system = middle.removesuffix(before_user)
    opening, system = _of_system(before, start, after_system, before_user)
    texts["system"] = (start[len(opening) :], after_system)
    return _turns(texts, opening, begins, system)


def _turns(texts: dict[str, tuple[str, str]], opening: str, answer: str, system: str) -> Turns:
    before, after = ({role: pair[at] for role, pair in texts.items()} for at in (0, 1))
    return Turns(before, after, opening, answer, system)


def _of_system(before: str, start: str, after: str, before_user: str) -> tuple[str, str]:
    """Returns the text before all turns, and the system's words where a conversation has none of its own."""
    if not before.endswith(before_user):
        raise ValueError("the first user turn is another one than the next")
    first = before.removesuffix(before_user)
    if after and first.startswith(start) and first.endswith(after) and len(first) > len(start) + len(after):
        return "", first[len(start) : len(first) - len(after)]
    if not start.startswith(first):
        raise ValueError("a system's turn does not begin as other conversations do")
    return first, ""


def _cut(text: str, *words: str) -> list[str]:
    """Returns the texts around words, each of which must be there once."""
    found = []
    for word in words:
        before, there, text = text.partition(word)
        if not there or word in text:
            raise ValueError(f"{word} is not there once")
        found.append(before)
    return [*found, text]


def _rest(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError("a turn ends in another way when another one follows")
    return text[len(beginning) :]


def _can_be_written(turns: Turns) -> bool:
    """Returns whether no text would be taken for Go's or for the end of the template."""
    texts = [*turns.before.values(), *turns.after.values(), turns.opening, turns.answer, turns.system]
    return not any("{{" in each or '"""' in each for each in texts)
