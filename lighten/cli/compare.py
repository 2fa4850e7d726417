"""`lighten compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, TrustCode, measurements_left_out, print_json, typed_flags
from lighten.errors import RequestError

NAMED = "NAME, NAME@v1, NAME:VARIANT, a version's directory, a results.json, or a model's directory or file."
FOR_TWO_MODELS = ("data", "length", "samples", "task", "limit", "skip")
"""Names of the flags that say how two models are measured."""

A = Annotated[str, typer.Argument(help=NAMED)]
B = Annotated[str, typer.Argument(help="The same; what changed from A to B.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(help='Exit with 1 if this is true of B, such as "ppl > +2%" or "acc < -1pp"; may be repeated.'),
]
Tokens = Annotated[int, typer.Option(min=0, help="Name this many tokens where the two disagree most.")]
Flips = Annotated[int, typer.Option(min=0, help="Show this many lost and gained tasks of each set in full.")]
Data = Annotated[str, typer.Option(help="Of two models: text for perplexity.")]
Length = Annotated[int, typer.Option(help="Of two models: tokens of a chunk.")]
Samples = Annotated[int | None, typer.Option(help="Of two models: chunks at most.")]
Task = Annotated[str, typer.Option(help="Of two models: multiple choice, as in evaluate.")]
Limit = Annotated[int | None, typer.Option(help="Of two models: tasks at most.")]
Skip = Annotated[
    list[str] | None, typer.Option(help="Of two models: leave out perplexity, accuracy or speed; may be repeated.")
]


def compare(
    context: typer.Context,
    a: A,
    b: B,
    fail_if: FailIf = None,
    tokens: Tokens = 0,
    flips: Flips = 3,
    data: Data = "builtin",
    length: Length = 512,
    samples: Samples = None,
    task: Task = "builtin",
    limit: Limit = None,
    skip: Skip = None,
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

    left_out = measurements_left_out(skip)
    typed = typed_flags(context, FOR_TWO_MODELS)
    two_models = all(isinstance(resolve(text, artifacts), Model) for text in (a, b))
    if typed and not two_models:
        raise RequestError(
            f"{typed[0]} is for two models: versions and variants are measured already, and a model beside a variant "
            "is measured as its version was"
        )
    local = task if task not in ("builtin", "hellaswag") else None
    wanted = {
        "perplexity": {"data": data, "length": length, "samples": samples},
        "accuracy": {"task": Path(task).stem if local else task, "local": local, "limit": limit},
        "speed": {},
    }
    settings = {name: value for name, value in wanted.items() if name not in left_out}
    evaluate = parse_settings(Evaluate, settings, "lighten compare") if two_models else None
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
