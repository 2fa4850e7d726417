"""`lighten run` and `lighten plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, TrustCode, TrustServers, TrustTasks, print_json
from lighten.cli.report import Public, Push, check_push, push_version, show
from lighten.errors import RequestError

Only = Annotated[list[str] | None, typer.Option(help="Only this variant (and the baseline); may be repeated.")]


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe such as quickstart.")],
    only: Only = None,
    device: Device = "auto",
    push_to_hub: Push = None,
    public: Public = False,
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
    trust_servers: TrustServers = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Run or resume a recipe: compress, export, measure, report."""
    from lighten.cli.progress import watching
    from lighten.pipeline import run as pipeline

    if public and not push_to_hub:
        raise RequestError("--public belongs to --push-to-hub OWNER/NAME")
    wanted = only or list(pipeline.open_recipe(recipe, only).variants)
    if push_to_hub:
        check_push(push_to_hub, wanted)
    with watching(quiet=as_json) as watcher:
        folder = pipeline.run(
            recipe,
            artifacts=artifacts,
            only=only,
            device=device,
            watcher=watcher,
            trust_remote_code=trust_remote_code,
            trust_tasks=trust_tasks,
            trust_servers=trust_servers,
        )
    if push_to_hub:
        push_version(folder, push_to_hub, wanted, public=public, quiet=as_json)
    show(folder, as_json)


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe.")],
    only: Only = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
    trust_servers: TrustServers = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Show the stages of a recipe: what is cached, and predicted time, memory and disk."""
    from lighten.cli.progress import plan_table
    from lighten.pipeline import run as pipeline
    from lighten.pipeline.build import check_options
    from lighten.pipeline.predict import Predictor
    from lighten.store.store import Store

    trusts = {"trust_remote_code": trust_remote_code, "trust_tasks": trust_tasks, "trust_servers": trust_servers}
    todo = pipeline.plan(recipe, only=only, device=device, **trusts)
    check_options(todo.recipe.evaluate.speed, todo.device.name)
    store = Store(artifacts)
    predictor = Predictor(store, todo.device)
    rows = []
    for stage in todo.stages:
        predicted = predictor.predict(stage)
        rows.append(
            {
                "name": stage.name,
                "key": stage.key,
                "variants": stage.variants,
                "cached": store.find(stage.key) is not None,
                "seconds": round(predicted.seconds, 1),
                "peak_bytes": predicted.peak_bytes,
                "disk_bytes": predicted.disk_bytes,
                "remarks": stage.remarks,
            }
        )
    if as_json:
        print_json({"recipe": todo.recipe.name, "stages": rows})
    else:
        screen.console().print(plan_table(todo.recipe.name, rows))
        for stage in todo.stages:
            for remark in stage.remarks:
                screen.console().print(f"! {stage.name}: {remark}", markup=False, highlight=False, soft_wrap=True)
