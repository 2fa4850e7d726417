"""`lighten recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Json, print_json


def recommend(
    name: Annotated[str, typer.Argument(help="NAME, NAME@v1, a version's directory, or a results.json.")],
    memory: Annotated[str | None, typer.Option(help="What it may take while it runs, such as 8GB.")] = None,
    target: Annotated[str | None, typer.Option(help="The device it is for, such as rpi5 or laptop-cpu.")] = None,
    max_drop: Annotated[str | None, typer.Option(help="Accuracy it may lose against the baseline: 1pp.")] = None,
    max_ppl: Annotated[str | None, typer.Option(help="How far its perplexity may rise: +5%.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens it is to read, or a training text has.")] = None,
    purpose: Annotated[
        str | None, typer.Option("--for", help="inference, training or edge (default: edge on a small device).")
    ] = None,
    prefer: Annotated[str, typer.Option(help="speed, quality, size or memory.")] = "speed",
    runtime: Annotated[
        str | None, typer.Option(help="Only what runs on it: torch, llama.cpp, onnxruntime, openvino.")
    ] = None,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Choose an artifact of a version for a situation: why this one, what was left out, and what else there is."""
    from lighten.compare.operand import find_version
    from lighten.recommend.question import ask
    from lighten.recommend.recommend import recommend as answer_to
    from lighten.recommend.text import lines

    question = ask(
        purpose=purpose,
        prefer=prefer,
        memory=memory,
        target=target,
        max_drop=max_drop,
        max_ppl=max_ppl,
        context=context,
        runtime=runtime,
    )
    answer = answer_to(find_version(name, artifacts), question)
    if as_json:
        print_json(answer.json())
    else:
        console = screen.console(highlight=False, soft_wrap=True)
        for line in lines(answer):
            console.print(line)
    if answer.pick is None:
        raise typer.Exit(1)
