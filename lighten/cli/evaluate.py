"""Measures models without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighten import screen
from lighten.cli.flags import (
    Artifacts,
    Device,
    Json,
    MergeAdapter,
    TrustCode,
    TrustTasks,
    measurements_left_out,
    print_json,
    typed_flags,
)
from lighten.errors import Failure, RequestError

if TYPE_CHECKING:
    from lighten.evaluate.accuracy.settings import Accuracy
    from lighten.evaluate.load.settings import Load
    from lighten.evaluate.perplexity.settings import Perplexity
    from lighten.evaluate.serving.settings import Serve as ServeSettings
    from lighten.evaluate.speed.settings import Speed

COMMAND = "lighten evaluate"
NOT_ON_DEVICE = (
    *("data", "protocol", "length", "samples", "task", "limit", "shots", "scorer", "chat", "system", "device"),
    *("trust_remote_code", "trust_tasks", "attention", "compile_", "cache", "roofline", "price_per_hour", "currency"),
    *("model", "tokenizer", "timeout", "rate", "concurrency", "requests"),
    *("serve", "serve_python", "serve_arg", "serve_start"),
)
"""Names of the flags that bench.py on a device does not know."""
OF_CAUSAL = (
    *("protocol", "length", "task", "limit", "shots", "scorer", "chat", "system", "attention", "compile_", "cache"),
    *("roofline", "price_per_hour", "currency", "rate", "concurrency", "requests", "serve"),
)
"""Names of the flags about measurements of causal language models."""
COMMON = ("data", "samples")
"""Names of the flags that measurements of all models share."""
SAME = ("roofline", "price_per_hour", "currency", "trust_remote_code", "trust_tasks", "device", "merge_adapter")
"""Names of the flags that `measure` has too."""

Paths = Annotated[
    list[str],
    typer.Argument(
        help="Model directories, .gguf files, bundles, NAME:VARIANT, or servers (http://HOST:8000/v1); the first one "
        "is the baseline."
    ),
]
Target = Annotated[
    str | None, typer.Option(help="Measure bundles on this device instead, with their bench.py: ssh://user@host.")
]
Python = Annotated[str, typer.Option(help="The Python on the device.")]
Data = Annotated[str, typer.Option(help="Text for perplexity: builtin, a file, or a hub data set.")]
Protocol = Annotated[
    list[str] | None,
    typer.Option(help="How perplexity is told: lighten, gptq, llama.cpp or lm-eval; may be repeated."),
]
Length = Annotated[int | None, typer.Option(help="Tokens of a chunk (default: the protocol's own, 512 by lighten's).")]
Samples = Annotated[int | None, typer.Option(help="Chunks at most; by lm-eval's protocol, documents.")]
Task = Annotated[
    list[str] | None,
    typer.Option(
        help="builtin, hellaswag, a .jsonl file in HellaSwag's format, any task of lm-eval's, or the .yaml file of "
        "one; may be repeated (default: builtin)."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Questions at most, of every task.")]
Shots = Annotated[int | None, typer.Option(help="Examples before each question, by lm-eval.")]
Scorer = Annotated[
    str | None, typer.Option(help="lm-eval: also for what lighten scores itself (hellaswag, .jsonl files).")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Ask in the model's own chat template, the examples as turns, by lm-eval.")
]
System = Annotated[str | None, typer.Option(help="Text before every chat, with --chat.")]
Attention = Annotated[
    str | None, typer.Option(help="Attention in transformers when speed is measured: eager, sdpa or flash.")
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile", help="torch.compile's mode when speed is measured: off, default, reduce-overhead or max-autotune."
    ),
]
Cache = Annotated[
    str | None, typer.Option(help="Cache of keys and values when speed is measured: dynamic, static or quantized.")
]
Model = Annotated[
    list[str] | None, typer.Option(help="Name of the model on a server; one for all servers, or one for each.")
]
Tokenizer = Annotated[
    list[str] | None,
    typer.Option(help="Directory or .gguf file with the tokenizer of the model on a server (default: the server's)."),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a server may stay silent (default: 300).")]
Rate = Annotated[
    list[float] | None,
    typer.Option(help="Measure load: requests that arrive at random, so many a second; may be repeated."),
]
Concurrency = Annotated[
    list[int] | None, typer.Option(help="Measure load: requests of so many users at once; may be repeated.")
]
Requests = Annotated[int | None, typer.Option(help="Requests of each load (default: 16).")]
Serve = Annotated[
    list[str] | None,
    typer.Option(
        help="Start this server and measure every model in it too: llama.cpp, transformers, vllm or mlx; repeatable."
    ),
]
ServePython = Annotated[
    Path | None, typer.Option(help="Python of another environment, which has the server (default: this one).")
]
ServeArg = Annotated[
    list[str] | None,
    typer.Option(help="Argument for the server, such as --serve-arg=--dtype=float32; may be repeated."),
]
ServeStart = Annotated[float | None, typer.Option(help="Seconds until the server answers, at most (default: 600).")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave out perplexity, accuracy or speed; may be repeated.")]
Roofline = Annotated[
    bool, typer.Option("--roofline", help="Say how near each speed is to what memory and arithmetic allow.")
]
Price = Annotated[
    float | None, typer.Option(help="What the machine costs in an hour: tells what a million tokens cost.")
]
Currency = Annotated[str, typer.Option(help="Of that price.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write a trace of each model there and say where its time goes, instead of measuring."
    ),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Also write results.json and the report there.")]


def evaluate(
    context: typer.Context,
    paths: Paths,
    target: Target = None,
    python: Python = "python3",
    data: Data = "builtin",
    protocol: Protocol = None,
    length: Length = None,
    samples: Samples = None,
    task: Task = None,
    limit: Limit = None,
    shots: Shots = None,
    scorer: Scorer = None,
    chat: Chat = False,
    system: System = None,
    attention: Attention = None,
    compile_: Compile = None,
    cache: Cache = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    timeout: Timeout = None,
    rate: Rate = None,
    concurrency: Concurrency = None,
    requests: Requests = None,
    serve: Serve = None,
    serve_python: ServePython = None,
    serve_arg: ServeArg = None,
    serve_start: ServeStart = None,
    skip: Skip = None,
    roofline: Roofline = False,
    price_per_hour: Price = None,
    currency: Currency = "USD",
    profile: Profile = None,
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
    out: Out = None,
    device: Device = "auto",
    artifacts: Artifacts = Path("artifacts"),
    merge_adapter: MergeAdapter = False,
    as_json: Json = False,
) -> None:
    """Measure any model directories, .gguf files, variants of a version or models on servers side by side."""
    from lighten.evaluate.runtimes.endpoint.address import addressed
    from lighten.pipeline.verbs import check_new

    left_out = measurements_left_out(skip)
    if out:
        check_new(out)
    paths = addressed([_path_of(text, artifacts) for text in paths], model or [], tokenizer or [], timeout)
    servers = _servers(serve or [], {"python": serve_python, "args": serve_arg, "start": serve_start})
    if profile:
        _profile(paths, profile, device, as_json, trust_remote_code)
        return
    asked: dict[str, Any] = {
        "perplexity": _perplexity({"data": data, "length": length, "samples": samples}, protocol or ["lighten"]),
        "accuracy": _accuracy(
            {"limit": limit, "scorer": scorer, "shots": shots, "chat": chat, "system": system}, task or ["builtin"]
        ),
        "speed": _speed({"attention": attention, "compile": compile_, "cache": cache}),
        "load": _load(rate, concurrency, requests),
    }
    if target:
        _check_flags_of_device(context, left_out, paths)
        value = _measure_on_device(paths, target, python, "perplexity" not in left_out, as_json)
    else:
        kept = {name: value for name, value in asked.items() if name not in left_out}
        value = _measure_here(context, paths, {**kept, "serve": servers}, None if left_out else _usual(context))
    _show(value, out, as_json)


def _measure_here(
    context: typer.Context, paths: list[str], asked: dict[str, Any], usual: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the contents of a results.json that this machine measured. Flags of `SAME` go on as they are."""
    from lighten.cli.progress import watching
    from lighten.pipeline.verbs import measure

    given = {name: context.params[name] for name in SAME}
    with watching(quiet=context.params["as_json"]) as watcher:
        return measure(paths, **asked, **given, watcher=watcher, usual=usual)


def _usual(context: typer.Context) -> dict[str, Any] | None:
    """Returns those of the common settings that were typed; None if a measurement was asked for by name."""
    if typed_flags(context, OF_CAUSAL):
        return None
    typed = typed_flags(context, COMMON)
    return {name: context.params[name] for name in COMMON if f"--{name}" in typed}


def _load(rate: list[float] | None, concurrency: list[int] | None, requests: int | None) -> Load | None:
    """Returns the settings of the load measurement; None if neither rates nor users were given."""
    from lighten.evaluate.load.settings import Load
    from lighten.pipeline.recipe import parse_settings

    if not (rate or concurrency):
        if requests is not None:
            raise RequestError("--requests is the number of requests of a load: add --rate or --concurrency")
        return None
    given = {"rate": rate or [], "concurrency": concurrency or [], "requests": requests}
    return parse_settings(Load, {name: value for name, value in given.items() if value is not None}, COMMAND)


def _servers(names: list[str], settings: dict[str, Any]) -> list[ServeSettings]:
    """Returns the settings of the servers that are to be started."""
    from lighten.evaluate.serving.settings import Serve as Settings
    from lighten.pipeline.recipe import parse_settings

    given = {name: value for name, value in settings.items() if value not in (None, [])}
    if given and len(names) != 1:
        raise RequestError(f"--serve-{next(iter(given)).rstrip('s')} is about one server: give --serve once with it")
    return [parse_settings(Settings, {"with": name, **given}, f"{COMMAND} --serve {name}") for name in names]


def _perplexity(settings: dict[str, Any], protocols: list[str]) -> list[Perplexity]:
    """Returns the settings of a perplexity for each protocol."""
    from lighten.evaluate.perplexity.settings import PROTOCOLS, Perplexity
    from lighten.pipeline.recipe import parse_settings

    names = list(dict.fromkeys(name.lower() for name in protocols))
    if unknown := set(names) - set(PROTOCOLS):
        raise RequestError(f"--protocol {unknown.pop()}: there is {', '.join(PROTOCOLS)}")
    return [parse_settings(Perplexity, settings | {"protocol": name}, COMMAND) for name in names]


def _accuracy(settings: dict[str, Any], tasks: list[str]) -> list[Accuracy]:
    """Returns the settings of an accuracy for each task: its name, or a file with its questions."""
    from lighten.evaluate.accuracy.settings import Accuracy
    from lighten.pipeline.recipe import parse_settings

    return [parse_settings(Accuracy, settings | _task(name), COMMAND) for name in tasks]


def _task(name: str) -> dict[str, str]:
    """Returns the settings of what --task names: a task, or a file with the questions of one."""
    path = Path(name).expanduser()
    local = path.suffix in (".jsonl", ".json", ".csv", ".parquet") or (
        path.is_file() and path.suffix not in (".yaml", ".yml")
    )
    return {"task": path.stem, "local": name} if local else {"task": name}


def _speed(options: dict[str, str | None]) -> Speed:
    """Returns the settings of the speed measurement, with the options of transformers that were given."""
    from lighten.evaluate.speed.settings import Speed
    from lighten.pipeline.recipe import parse_settings

    return parse_settings(Speed, {name: value for name, value in options.items() if value}, COMMAND)


def _check_flags_of_device(context: typer.Context, left_out: set[str], paths: list[str]) -> None:
    """Raises RequestError for a server, or a flag that bench.py on the device does not know."""
    from lighten.evaluate.runtimes.endpoint.address import is_url

    if servers := [path for path in paths if is_url(path)]:
        raise RequestError(f"--target measures bundles, and {servers[0]} is a server: leave out --target")
    useless = typed_flags(context, NOT_ON_DEVICE) + (["--skip speed"] if "speed" in left_out else [])
    if useless:
        raise RequestError(f"--target measures what the bundle's bench.py measures: leave out {useless[0]}")


def _measure_on_device(paths: list[str], target: str, python: str, perplexity: bool, quiet: bool) -> dict[str, Any]:
    """Returns the contents of a results.json that the device measured."""
    from lighten.cli.progress import watching
    from lighten.pipeline.device import measure_there

    with watching(quiet=quiet) as watcher:
        return measure_there(paths, target, watcher.follow(target), python=python, perplexity=perplexity)


def _show(value: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Prints results and writes them to `out`; raises Failure if a model failed."""
    from lighten.report.render import write_report
    from lighten.report.terminal import terminal
    from lighten.results.results import Results
    from lighten.store.store import write_json

    results = Results.model_validate(value)
    if out:
        out.mkdir(parents=True)
        write_json(out / "results.json", value)
        write_report(results, out)
    if as_json:
        print_json(value)
    else:
        screen.console().print(terminal(results))
    if failed := [variant for variant in results.variants if variant.failed]:
        # The table shows a reason of one line. Longer reasons, and those beside JSON, are printed whole.
        long = [each for each in failed if as_json or "\n" in str(each.error)]
        short = ", ".join(str(each.path) for each in failed if each not in long)
        reasons = [f"{each.path}: {each.error}" for each in long] + ([f"failed, see above: {short}"] if short else [])
        raise Failure("; ".join(reasons))


def _path_of(text: str, artifacts: Path) -> str:
    """Returns the path of a variant such as `quickstart@v1:gptq-int4`; any other text unchanged."""
    from lighten.compare.operand import VariantOf, Version, resolve
    from lighten.evaluate.runtimes.endpoint.address import is_url

    if Path(text).expanduser().exists() or ":" not in text or text.startswith("demo:") or is_url(text):
        return text
    named = resolve(text, artifacts)
    if isinstance(named, Version):
        raise RequestError(f"{text} is a version: name one of its variants, {text}:VARIANT")
    return str(named.version.folder / "variants" / named.row.name) if isinstance(named, VariantOf) else text


def _profile(paths: list[str], folder: Path, device: str, as_json: bool, trusted: bool) -> None:
    from lighten.cli.profile import shown
    from lighten.cli.progress import watching
    from lighten.pipeline.verbs import profile

    found = {}
    for number, path in enumerate(paths):
        out = folder if len(paths) == 1 else folder / f"{number + 1}-{Path(path).stem}"
        with watching(quiet=as_json) as watcher:
            found[path] = profile(path, out, device=device, watcher=watcher, trust_remote_code=trusted)
        if not as_json:
            screen.console(highlight=False).print(*shown(path, found[path], out), sep="\n")
    if as_json:
        print_json(found)
