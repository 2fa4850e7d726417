"""The ready GitHub Actions example is valid, and uses only what exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from lighten.cli.main import app
from lighten.compare.limits import parse

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TEXTS = ["examples/github-actions.yml", "docs/compare.md"]


def commands(text: str) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^\s*lighten (.*)", joined, re.MULTILINE)
    return [shlex.split(line.split("#")[0].split(" | ")[0]) for line in lines]


def test_the_workflow_is_valid_yaml_with_steps() -> None:
    workflow = yaml.safe_load((ROOT / TEXTS[0]).read_text())
    steps = workflow["jobs"]["compare"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    runs = [step["run"] for step in steps if "run" in step]
    lines = [line for run in runs for line in commands(run)]
    assert [line[0] for line in lines] == ["run", "run", "compare"]
    assert lines[-1].count("--fail-if") == 4


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_exists_and_every_limit_can_be_read(name: str) -> None:
    text = (ROOT / name).read_text()
    if name.endswith(".yml"):
        steps = yaml.safe_load(text)["jobs"]["compare"]["steps"]
        text = "\n".join(step["run"] for step in steps if "run" in step)
    found = commands(text)
    assert found
    for command, *words in found:
        options = {option for param in COMMANDS[command].params for option in param.opts}
        for at, word in enumerate(words):
            if word.startswith("--"):
                assert word in options, (command, word)
            if word == "--fail-if":
                parse(words[at + 1])
