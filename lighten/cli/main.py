"""Commands, and nothing else: parse, call, print. Nothing here imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lighten import screen
from lighten.cli.compare import compare
from lighten.cli.doctor import doctor
from lighten.cli.fit import fit
from lighten.cli.flags import Artifacts, Device, Json, MergeAdapter, TrustCode, TrustTasks
from lighten.cli.flags import print_json as _print_json
from lighten.cli.recommend import recommend
from lighten.cli.report import Public, Push, check_push, push_version, report, show
from lighten.cli.step import add_verb
from lighten.errors import Failure, LightenError, RequestError, check_names, disk_full, unexpected

VERBS = {
    "prune": "Prune a model: one step, no recipe.",
    "distill": "Train a model on what its teacher says: one step, no recipe.",
    "quantize": "Quantize a model: one step, no recipe.",
    "export": "Export a model to another runtime's format: one step, no recipe.",
}
app = typer.Typer(
    name="lighten",
    help="Compress a causal language model in one pass over the calibration data, and measure what you ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
Only = Annotated[list[str] | None, typer.Option(help="Only this variant (and the baseline); may be repeated.")]
Extra = Annotated[list[str] | None, typer.Argument()]


def _version(asked: bool) -> None:
    if asked:
        from lighten import __version__

        print(f"lighten {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress a causal language model in one pass over the calibration data, and measure what you ship."""


def main() -> None:
    """Runs the command line: exit code 0 done, 1 something failed, 2 the request was wrong, 130 interrupted."""
    try:
        check_names(sys.argv[1:])
        app(standalone_mode=True)
    except LightenError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        if full := disk_full(error):
            _stop(str(full), full.exit_code)
        _stop(f"{error.strerror or error}{': ' + str(error.filename) if error.filename else ''}", 1)
    except Exception as error:
        _stop(unexpected(error), 1)


def _stop(message: str, code: int) -> None:
    screen.console(stderr=True, highlight=False, soft_wrap=True).print("lighten:", message, markup=False)
    sys.exit(code)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe such as quickstart.")],
    only: Only = None,
    device: Device = "auto",
    push_to_hub: Push = None,
    public: Public = False,
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
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
        )
    if push_to_hub:
        push_version(folder, push_to_hub, wanted, public=public, quiet=as_json)
    show(folder, as_json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe.")],
    only: Only = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Show the stages of a recipe: what is cached, and predicted time, memory and disk."""
    from lighten.cli.progress import plan_table
    from lighten.pipeline import run as pipeline
    from lighten.pipeline.plan import Predictor
    from lighten.store.store import Store

    todo = pipeline.plan(recipe, only=only, device=device, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks)
    pipeline.check_options(todo.recipe.evaluate.speed, todo.device.name)
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
            }
        )
    if as_json:
        _print_json({"recipe": todo.recipe.name, "stages": rows})
    else:
        screen.console().print(plan_table(todo.recipe.name, rows))


for _kind in VERBS:
    if sys.argv[1:2] == [_kind]:
        add_verb(app, _kind, VERBS[_kind])
    else:  # only listed: the settings' classes are imported for the verb that is asked for, so that help is quick
        app.command(_kind, help=VERBS[_kind])(lambda: None)


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Returns the flags among `names` that the person typed."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        "--" + name.rstrip("_").replace("_", "-")
        for name, source in sources.items()
        if source and source.name == "COMMANDLINE"
    ]


def _task(name: str) -> dict[str, str]:
    """Returns the settings of what --task names: a task, or a file with the questions of one."""
    path = Path(name).expanduser()
    local = path.suffix in (".jsonl", ".json", ".csv", ".parquet") or (
        path.is_file() and path.suffix not in (".yaml", ".yml")
    )
    return {"task": path.stem, "local": name} if local else {"task": name}


@app.command()
def evaluate(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(help="Model directories, .gguf files, bundles, or NAME:VARIANT; the first one is the baseline."),
    ],
    target: Annotated[
        str | None, typer.Option(help="Measure bundles on this device instead, with their bench.py: ssh://user@host.")
    ] = None,
    python: Annotated[str, typer.Option(help="The Python on the device.")] = "python3",
    data: Annotated[str, typer.Option(help="Text for perplexity: builtin, a file, or a hub data set.")] = "builtin",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="How perplexity is told: lighten, gptq, llama.cpp or lm-eval; may be repeated."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a chunk (default: the protocol's own, 512 by lighten's).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Chunks at most; by lm-eval's protocol, documents.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="builtin, hellaswag, a .jsonl file in HellaSwag's format, any task of lm-eval's, or the .yaml file of "
            "one; may be repeated (default: builtin)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions at most, of every task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question, by lm-eval.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="lm-eval: also for what lighten scores itself (hellaswag, .jsonl files).")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Of what transformers runs, when its speed is measured: eager, sdpa or flash.")
    ] = None,
    compile_: Annotated[
        str | None,
        typer.Option(
            "--compile", help="torch.compile's mode, likewise: off, default, reduce-overhead or max-autotune."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="What keeps keys and values, likewise: dynamic, static or quantized.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out perplexity, accuracy or speed; may be repeated.")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Say how near each speed is to what memory and arithmetic allow.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(help="What the machine costs in an hour: tells what a million tokens cost.")
    ] = None,
    currency: Annotated[str, typer.Option(help="Of that price.")] = "USD",
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write a trace of each model there and say where its time goes, instead of measuring."
        ),
    ] = None,
    trust_tasks: TrustTasks = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write results.json and the report there.")
    ] = None,
    device: Device = "auto",
    artifacts: Artifacts = Path("artifacts"),
    merge_adapter: MergeAdapter = False,
    as_json: Json = False,
) -> None:
    """Measure any model directories, .gguf files or variants of a version side by side."""
    from lighten.cli.progress import watching
    from lighten.evaluate.settings import PROTOCOLS, Accuracy, Perplexity, Speed
    from lighten.pipeline.recipe import parse_settings
    from lighten.pipeline.verbs import check_new, measure
    from lighten.report.render import write_report
    from lighten.report.terminal import terminal
    from lighten.results.results import Results
    from lighten.store.store import write_json

    left_out = {name.lower() for name in skip or ()}
    if unknown := left_out - {"perplexity", "accuracy", "speed"}:
        raise RequestError(f"--skip {unknown.pop()}: there is perplexity, accuracy and speed")
    if out:
        check_new(out)
    where = "lighten evaluate"
    paths = [_path_of(text, artifacts) for text in paths]
    if profile:
        _profile(paths, profile, device, as_json)
        return
    protocol = [name.lower() for name in protocol or ()]
    if unknown := set(protocol) - set(PROTOCOLS):
        raise RequestError(f"--protocol {unknown.pop()}: there is {', '.join(PROTOCOLS)}")
    common = {"limit": limit, "scorer": scorer, "shots": shots}
    accuracy = [parse_settings(Accuracy, _task(name) | common, where) for name in task or ["builtin"]]
    text = {"data": data, "length": length, "samples": samples}
    perplexity = [
        parse_settings(Perplexity, text | {"protocol": name}, where) for name in dict.fromkeys(protocol or ["lighten"])
    ]
    options = {"attention": attention, "compile": compile_, "cache": cache}
    speed = parse_settings(Speed, {name: value for name, value in options.items() if value}, where)
    flags = (
        "data",
        "protocol",
        "length",
        "samples",
        "task",
        "limit",
        "shots",
        "scorer",
        "trust_tasks",
        "device",
        *options,
    )
    useless = _given(context, [{"compile": "compile_"}.get(name, name) for name in flags])
    useless += _given(context, ("roofline", "price_per_hour", "currency"))
    useless += ["--skip speed"] if "speed" in left_out else []
    if target and useless:
        raise RequestError(f"--target measures what the bundle's bench.py measures: leave out {useless[0]}")
    with watching(quiet=as_json) as watcher:
        if target:
            from lighten.pipeline.device import measure_there

            follow = watcher.follow(target)
            value = measure_there(paths, target, follow, python=python, perplexity="perplexity" not in left_out)
        else:
            value = measure(
                paths,
                perplexity=[] if "perplexity" in left_out else perplexity,
                accuracy=[] if "accuracy" in left_out else accuracy,
                speed=None if "speed" in left_out else speed,
                roofline=roofline,
                price_per_hour=price_per_hour,
                currency=currency,
                trust_tasks=trust_tasks,
                device=device,
                merge_adapter=merge_adapter,
                watcher=watcher,
            )
    results = Results.model_validate(value)
    if out:
        out.mkdir(parents=True)
        write_json(out / "results.json", value)
        write_report(results, out)
    if as_json:
        _print_json(value)
    else:
        screen.console().print(terminal(results))
    if failed := [variant for variant in results.variants if variant.failed]:
        whole = [each for each in failed if as_json or "\n" in str(each.error)]  # of others the table has said it
        names = ", ".join(str(each.path) for each in failed if each not in whole)
        told = [f"failed, see above: {names}"] if names else []
        raise Failure("; ".join([f"{each.path}: {each.error}" for each in whole] + told))


def _path_of(text: str, artifacts: Path) -> str:
    """Returns where a variant lies that is named as `quickstart:gptq-int4` or `quickstart@v1:gptq-int4`."""
    from lighten.compare.operand import VariantOf, Version, resolve

    if Path(text).expanduser().exists() or ":" not in text or text.startswith("demo:"):
        return text
    named = resolve(text, artifacts)
    if isinstance(named, Version):
        raise RequestError(f"{text} is a version: name one of its variants, {text}:VARIANT")
    return str(named.version.folder / "variants" / named.row.name) if isinstance(named, VariantOf) else text


def _profile(paths: list[str], folder: Path, device: str, as_json: bool) -> None:
    from lighten.cli.profile import shown
    from lighten.cli.progress import watching
    from lighten.pipeline.verbs import profile

    found = {}
    for number, path in enumerate(paths):
        out = folder if len(paths) == 1 else folder / f"{number + 1}-{Path(path).stem}"
        with watching(quiet=as_json) as watcher:
            found[path] = profile(path, out, device=device, watcher=watcher)
        if not as_json:
            screen.console(highlight=False).print(*shown(path, found[path], out), sep="\n")
    if as_json:
        _print_json(found)


app.command("report")(report)
app.command("compare")(compare)
app.command("recommend")(recommend)
app.command("fit")(fit)


@app.command("ls")
def list_versions(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """List versions, and the objects that they refer to."""
    from rich.table import Table

    from lighten.store.links import follow
    from lighten.store.store import Store

    store = Store(artifacts)
    rows = []
    for version in store.versions():
        for link in sorted((version / "variants").iterdir()):
            key = follow(link).name
            artifact = store.find(key)
            size = artifact.size_bytes if artifact else None
            kind = artifact.format if artifact else "missing"
            row: dict[str, Any] = {"recipe": version.parent.name, "version": version.name, "variant": link.name}
            rows.append({**row, "format": kind, "size_bytes": size, "key": key})
    if as_json:
        _print_json(rows)
        return
    table = Table("recipe", "version", "variant", "format", "MB", "key", box=None)
    for row in rows:
        megabytes = f"{row['size_bytes'] / 1e6:.1f}" if row["size_bytes"] else "–"
        table.add_row(row["recipe"], row["version"], row["variant"], row["format"], megabytes, row["key"][:12])
    screen.console().print(table if rows else f"nothing in {artifacts} yet: try `lighten run quickstart`")


@app.command()
def verify(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """Re-hash every object; a corrupt one is reported and removed, to be made again by the next run."""
    from lighten.store.collection import check
    from lighten.store.store import Store

    damaged, kept = {}, {}
    count = 0
    for each in check(Store(artifacts)):
        count += 1
        if each.damage:
            damaged[each.key] = each.damage
            if each.kept:
                kept[each.key] = each.kept
            if not as_json:
                fate = f"not removed ({each.kept})" if each.kept else "removed"
                screen.say(f"{each.key[:12]}: corrupt, {fate}: {'; '.join(each.damage)}")
    if as_json:
        _print_json({"checked": count, "corrupt": damaged, "not_removed": kept})
    else:
        print(f"{count} objects checked, {len(damaged)} corrupt")
    if damaged:
        raise typer.Exit(1)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Remove objects that no version refers to, and what killed runs left."""
    from lighten.store.collection import collect
    from lighten.store.store import Store

    removed = collect(Store(artifacts), dry_run=dry_run)
    total = sum(size for _, size in removed)
    if as_json:
        _print_json({"removed": dict(removed), "bytes": total, "dry_run": dry_run})
    else:
        print(f"{'would remove' if dry_run else 'removed'} {len(removed)} objects, {total / 1e6:.1f} MB")


app.command("doctor")(doctor)
