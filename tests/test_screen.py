"""What others wrote is shown on a terminal, and not obeyed."""

import io
import json

import pytest
from rich.table import Table

from lighten import screen
from lighten.cli.flags import print_json


def test_controls_are_pictures() -> None:
    assert screen.visible("a\x1b[31mb\x07\r\x7f\n\tc") == "a␛[31mb␇␍␡\n\tc"
    assert screen.visible("\x9b31m\u202ex\ud800") == "�31m�x�"
    assert screen.visible("naïve 日本 🙂") == "naïve 日本 🙂"
    assert screen.deep({"\x1b": [("\x07",), 1, None]}) == {"␛": [["␇"], 1, None]}


def test_a_console_obeys_neither_controls_nor_markup() -> None:
    out = io.StringIO()
    console = screen.console(file=out, force_terminal=True, width=60, color_system="standard")
    table = Table("head\x1b[2J")
    table.add_row("[/oops] \x1b]0;owned\x07")
    console.print("[bold]x[/y] \x1b[2J", style="red", highlight=False)
    console.print(table)
    text = out.getvalue()
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\x07" not in text
    assert "␛[2J" in text and "[/oops]" in text and "[bold]x[/y]" in text
    assert "\x1b[31m" in text  # its own colour


def test_json_for_a_program_keeps_the_text_and_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\x9b": "\x1b[31m \x7f \u202e ü \ud800"}
    print_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == value
    assert not set(text) & set("\x1b\x9b\x7f\u202e") and "ü" in text
