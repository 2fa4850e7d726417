"""The pages of docs: their commands exist, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.core
import typer.main

from lighten.cli import main
from lighten.cli.step import add_verb

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(text: str) -> list[str]:
    """Returns the lines of code that call lighten, continued lines joined, without their comments."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(lighten [^`]+)`", text)
    return [line for line in lines if line.startswith("lighten ")]


def app() -> typer.core.TyperGroup:
    """Returns the command line with the flags of every step."""
    steps = typer.Typer()
    for name, about in main.VERBS.items():
        add_verb(steps, name, about)
    group = typer.main.get_command(main.app)
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in typer.main.get_command(steps).commands.items():  # type: ignore[attr-defined]
        group.commands[name] = command
    return group


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path) -> None:
    group = app()
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)[1:]
        if words[0].startswith("-") or words[0].isupper():  # `lighten --help`, `lighten COMMAND --help`
            continue
        assert words[0] in group.commands, line
        command = group.commands[words[0]]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if word.startswith("-") and word not in ("-h", "--help"):
                assert word.partition("=")[0] in known, f"{line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_page_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
