"""Measures models without a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, MergeAdapter, TrustCode, TrustTasks, print_json
from lighten.errors import Failure, RequestError

Extra = Annotated[list[str] | None, typer.Argument()]


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
    trust_remote_code: TrustCode = False,
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
        _profile(paths, profile, device, as_json, trust_remote_code)
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
        "trust_remote_code",
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
                trust_remote_code=trust_remote_code,
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
        print_json(value)
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
