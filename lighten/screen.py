"""Text on a terminal. What came from files, results or devices is shown, and never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

_KEPT = "\n\t"
_HIDDEN = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in _KEPT},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}
"""Pictures of the control characters. Those without a picture, and those that turn the direction of text, become
U+FFFD."""


def visible(text: str) -> str:
    """Returns a text with a picture in place of every control character, except ends of lines and tabs."""
    return text.translate(_HIDDEN)


class _Shown:
    """Something to print. Its text is made visible when it is laid out."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _Visible(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(each) for each in renderables]


def console(**settings: Any) -> Console:
    """Returns a rich console that obeys no control character and no [markup] in what it prints.

    Styles that are given as arguments still work.
    """
    made = Console(**{"markup": False, **settings})
    made.push_render_hook(_Visible())
    return made


def deep(value: Any) -> Any:
    """Returns JSON's values in which every text is made visible, keys too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {deep(key): deep(each) for key, each in value.items()}
    return [deep(each) for each in value] if isinstance(value, list | tuple) else value


def say(text: str) -> None:
    """Prints a line on standard output."""
    print(visible(text))
