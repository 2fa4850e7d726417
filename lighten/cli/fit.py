"""`lighten fit`."""

from __future__ import annotations

from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Json, print_json


def fit(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or demo:NAME.")],
    memory: Annotated[str | None, typer.Option(help="Memory for the model: 8GB.")] = None,
    target: Annotated[str | None, typer.Option(help="A device instead: rpi5, laptop-cpu, desktop-8gb-gpu, …")] = None,
    context: Annotated[int, typer.Option(help="Tokens of context of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    cache: Annotated[str, typer.Option(help="Keys and values in llama.cpp: f16 or q8_0.")] = "f16",
    as_json: Json = False,
) -> None:
    """Say which formats of a model fit into a memory, with the keys and values of a context and batch."""
    from lighten.recommend import fit as fitting

    space, where = fitting.room(memory, target)
    shown, value = fitting.show(model, space, where, context, batch, cache)
    if as_json:
        print_json(value)
    else:
        screen.console().print(shown)
