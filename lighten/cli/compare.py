"""`lighten compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, TrustCode, print_json
from lighten.errors import RequestError

OPERAND = "NAME, NAME@v1, NAME:VARIANT, a version's directory, a results.json, or a model's directory or file."


def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(help=OPERAND)],
    b: Annotated[str, typer.Argument(help="The same; what changed from A to B.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help='Exit with 1 if this is true of B, such as "ppl > +2%" or "acc < -1pp"; may be repeated.'),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Name this many tokens where the two disagree most.")] = 0,
    flips: Annotated[int, typer.Option(min=0, help="Show this many lost and gained tasks of each set in full.")] = 3,
    data: Annotated[str, typer.Option(help="Of two models: text for perplexity.")] = "builtin",
    length: Annotated[int, typer.Option(help="Of two models: tokens of a chunk.")] = 512,
    samples: Annotated[int | None, typer.Option(help="Of two models: chunks at most.")] = None,
    task: Annotated[str, typer.Option(help="Of two models: multiple choice, as in evaluate.")] = "builtin",
    limit: Annotated[int | None, typer.Option(help="Of two models: tasks at most.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Of two models: leave out perplexity, accuracy or speed; may be repeated.")
    ] = None,
    trust_remote_code: TrustCode = False,
    device: Device = "auto",
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Compare two versions, variants or models: paired differences with intervals, and whether they are allowed."""
    from lighten.cli.progress import watching
    from lighten.compare import compare as comparing
    from lighten.compare.operand import Model, resolve
    from lighten.compare.text import lines
    from lighten.evaluate.settings import Evaluate
    from lighten.pipeline.recipe import parse_settings

    left_out = {name.lower() for name in skip or ()}
    if unknown := left_out - {"perplexity", "accuracy", "speed"}:
        raise RequestError(f"--skip {unknown.pop()}: there is perplexity, accuracy and speed")
    named = ("data", "length", "samples", "task", "limit", "skip")
    sources = {name: context.get_parameter_source(name) for name in named}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    both = all(isinstance(resolve(text, artifacts), Model) for text in (a, b))
    if given and not both:
        raise RequestError(
            f"--{given[0]} is for two models: versions and variants are measured already, and a model beside a variant "
            "is measured as its version was"
        )
    local = task if task not in ("builtin", "hellaswag") else None
    wanted = {
        "perplexity": {"data": data, "length": length, "samples": samples},
        "accuracy": {"task": Path(task).stem if local else task, "local": local, "limit": limit},
        "speed": {},
    }
    settings = {name: value for name, value in wanted.items() if name not in left_out}
    evaluate = parse_settings(Evaluate, settings, "lighten compare") if both else None
    with watching(quiet=as_json) as watcher:
        found = comparing.compare(
            a,
            b,
            artifacts=artifacts,
            fail_if=fail_if or (),
            tokens=tokens,
            evaluate=evaluate,
            device=device,
            watcher=watcher,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(found.json())
    else:
        console = screen.console(highlight=False, soft_wrap=True)
        for line in lines(found, flips):
            console.print(line)
    if found.failed:
        raise typer.Exit(1)
