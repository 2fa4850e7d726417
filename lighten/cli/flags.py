"""Flags that several commands have, and printing for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from lighten.errors import RequestError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of text for a person.")]
Artifacts = Annotated[Path, typer.Option(help="Directory of objects and versions.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="If the model is a LoRA adapter, merge it into its base first.")
]

MEASUREMENTS = ("perplexity", "accuracy", "speed")
"""Measurements that `--skip` can leave out."""
CONTROLS = "[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
"""Characters that JSON leaves as they are, and a terminal must not get."""

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with a model, where the recipe names it for that."
    ),
]
TrustTasks = Annotated[
    bool, typer.Option("--trust-tasks", help="Let lm-eval run what the task files (.yaml) that are named say.")
]
TrustServers = Annotated[
    bool,
    typer.Option(
        "--trust-servers", help="Start the programs that the recipe names for servers, and send a key to its addresses."
    ),
]


def print_json(value: Any) -> None:
    """Prints a value as JSON on standard output. Control characters that JSON allows are escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    sys.stdout.write(re.sub(CONTROLS, lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def typed_flags(context: typer.Context, parameters: Iterable[str]) -> list[str]:
    """Returns the flags of those `parameters` of a command that the person typed."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    return [
        "--" + name.rstrip("_").replace("_", "-")
        for name, source in sources.items()
        if source and source.name == "COMMANDLINE"
    ]


def measurements_left_out(skip: list[str] | None) -> set[str]:
    """Returns what `--skip` names; raises RequestError if that is no measurement."""
    left_out = {name.lower() for name in skip or ()}
    if unknown := left_out - set(MEASUREMENTS):
        raise RequestError(f"--skip {unknown.pop()}: there is perplexity, accuracy and speed")
    return left_out
