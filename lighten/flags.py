"""Options that several commands have, and how they print for a program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of text for a person.")]
Artifacts = Annotated[Path, typer.Option(help="Directory of objects and versions.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="If the model is a LoRA adapter, merge it into its base first.")
]


def print_json(value: Any) -> None:
    """Prints a value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
