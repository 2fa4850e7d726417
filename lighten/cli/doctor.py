"""`lighten doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, TrustCode, TrustTasks, print_json
from lighten.errors import Failure, RequestError


def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="Open this artifact, model directory or .gguf file with every loader instead.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Examine this recipe's calibration text instead.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure memory bandwidth and matrix products of this machine again.")
    ] = False,
    trust_remote_code: TrustCode = False,
    trust_tasks: TrustTasks = False,
    device: Device = "auto",
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Tell what this machine can do, where a model loads, or what a recipe's calibration text is worth."""
    if path is not None and calibration is not None:
        raise RequestError("give either a path or --calibration, not both")
    if calibration is None and (trust_remote_code or trust_tasks):
        raise RequestError("--trust-remote-code and --trust-tasks belong to --calibration RECIPE")
    if path is not None:
        _try_loaders(path, device, as_json)
    elif calibration is not None:
        _examine(calibration, artifacts, device, as_json, trust_remote_code, trust_tasks)
    else:
        _describe_machine(device, fresh, as_json)


def _describe_machine(device: str, fresh: bool, as_json: bool) -> None:
    """Prints what this machine can do: its figures, the extras that lack a package, and the loaders."""
    from lighten.cli.progress import watching
    from lighten.doctor import packages
    from lighten.evaluate import machine
    from lighten.evaluate.loaders import survey as loaders
    from lighten.pipeline.build import choose_device
    from lighten.pipeline.roofline import busy, machine_peaks

    with watching(quiet=as_json) as watcher:
        peaks = machine_peaks(choose_device(device).name, watcher.follow("roofs of this machine"), fresh=fresh)
    missing, faults = packages.missing_modules(), packages.faults()
    facts = machine.fingerprint()
    if as_json:
        found = {"machine": {**facts, **peaks.facts()}, "missing": missing, "loaders": loaders.versions()}
        print_json({**found, "faults": faults} if faults else found)
        return
    for key, value in facts.items():
        screen.say(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    screen.say(
        f"reading: {peaks.memory:.1f} GB/s from memory, {peaks.bandwidth[0][1]:.1f} GB/s from caches "
        f"({peaks.device}, {peaks.measured})"
    )
    rates = {name: f"{rate:,.0f}" if rate else "none" for name, rate in peaks.matrix.items()}
    screen.say(f"products: {', '.join(f'{name} {rate} GFLOP/s' for name, rate in rates.items())}")
    if peaks.busy:
        screen.say(f"warning: {busy(peaks)}")
    for extra, modules in missing.items():
        screen.say(
            f"extra {extra}: " + (f"lacks {', '.join(modules)}: pip install 'lighten[{extra}]'" if modules else "ready")
        )
    for name, version in loaders.versions().items():
        screen.say(f"loader {name}: {version or 'not installed'}")
    for fault in faults:
        screen.say(f"warning: {fault}")


def _try_loaders(path: Path, device: str, as_json: bool) -> None:
    from lighten.cli.progress import watching
    from lighten.doctor.diagnose import try_loaders
    from lighten.report.matrix import mark
    from lighten.results.measured import Load

    with watching(quiet=as_json) as watcher:
        found = try_loaders(path, device=device, watcher=watcher)
    if as_json:
        print_json({"path": str(path), "loads": found})
    else:
        for load in map(Load.model_validate, found):
            why = f": {load.error}" if load.error else " (not for this format)" if load.status == "other" else ""
            screen.say(f"{' '.join(filter(None, (load.loader, load.version)))}: {mark(load)}{why}")
    if not any(load["status"] == "ok" for load in found):
        raise Failure(f"no loader opens {path}")


def _examine(recipe: str, artifacts: Path, device: str, as_json: bool, code: bool, tasks: bool) -> None:
    from lighten.cli.progress import watching
    from lighten.doctor.diagnose import diagnose

    with watching(quiet=as_json) as watcher:
        diagnosis = diagnose(
            recipe,
            artifacts=artifacts,
            device=device,
            watcher=watcher,
            trust_remote_code=code,
            trust_tasks=tasks,
        )
    if as_json:
        print_json(diagnosis.json())
        return
    console = screen.console(soft_wrap=True, highlight=False)
    for finding in diagnosis.findings:
        console.print(finding.title, style="bold", markup=False)
        for line in finding.lines:
            console.print(f"  {line}", markup=False)
        console.print(f"  → {finding.verdict}\n", style="yellow" if finding.advice else "green", markup=False)
