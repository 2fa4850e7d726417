"""`lighten inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Json, TrustCode, print_json


def inspect(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or demo:NAME.")],
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Say what a model consists of, what each method would cover of its weights, and what stays and why."""
    from lighten.doctor import inspection

    found = inspection.inspect(model, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(found)
        return
    from lighten.doctor.inspection_text import show

    screen.console().print(show(found))
