"""The rows of results: an artifact, a model or a server, and what was measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.evaluate import paired
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.runtimes.choose import weight_endings
from lighten.evaluate.runtimes.endpoint.step import FORM
from lighten.evaluate.runtimes.measurable import Served
from lighten.evaluate.serving.settings import Serve
from lighten.model import gguf_header, gguf_source
from lighten.model.checkpoint import read_config
from lighten.model.export_formats import EXPORTS
from lighten.model.source import Found
from lighten.pipeline.build import Builder
from lighten.pipeline.recipe import BASELINE
from lighten.pipeline.stage import Plan, Stage
from lighten.store.artifact import Artifact, read_artifact
from lighten.store.files import MANIFEST


def row_of(name: str, todo: Plan, builder: Builder, root: Artifact) -> dict[str, Any]:
    """Returns the row of a variant: its facts, its measurements, and what failed; `root` is the baseline."""
    stage = todo.artifacts[name]
    steps = [] if name == BASELINE else [{step.kind: step.dump()} for step in todo.recipe.steps(name)]
    row: dict[str, Any] = {"name": name, "key": stage.key, "status": "ok", "error": None, "steps": steps}
    failed = [each for each in (stage, *todo.measurements[name]) if each.key in builder.failed]
    if failed:
        row |= {"status": "failed", "error": f"{failed[0].name}: {builder.failed[failed[0].key]}"}
    artifact = builder.done.get(stage.key)
    if not artifact:
        return row
    row |= describe(artifact, _nearest(stage, builder, "params")) | {"path": f"variants/{name}"}
    row["training"] = _nearest(stage, builder, "training")
    measured = []
    alone = [
        [each for each in todo.measurements[of] if each.settings and not each.settings.pair] for of in (name, BASELINE)
    ]
    for each, base in zip(*alone, strict=True):
        found, against = builder.done.get(each.key), builder.done.get(base.key)
        if found and each.settings:
            measured.append((each.settings, found.path, against.path if against else None))
    add_measurements(row, measured, name == BASELINE)
    row["speculative"] = None
    for each in _drafted(name, todo):
        if each.settings and (found := builder.done.get(each.key)):
            add_measurement(row, each.settings, paired.read(found.path))
    if name != BASELINE and row["size_bytes"]:
        row.setdefault("delta", {})["size_ratio"] = row["size_bytes"] / root.size_bytes
    return row


def _drafted(name: str, todo: Plan) -> list[Stage]:
    """Returns the measurements in which a variant is the target of a draft."""
    found = [(stage, stage.settings.pair) for some in todo.measurements.values() for stage in some if stage.settings]
    return [stage for stage, pair in found if pair and pair[0] == name]


def _nearest(stage: Stage, builder: Builder, fact: str) -> Any:
    """Returns a fact of an artifact; if it lacks the fact, that of the nearest parent that has it."""
    found = builder.done[stage.key].facts.get(fact)
    return found if found is not None or not stage.parents else _nearest(stage.parents[0], builder, fact)


def describe(artifact: Artifact, params: int | None) -> dict[str, Any]:
    """Returns the columns of a row that need no measuring: format, size, bits per weight, facts."""
    if artifact.format == FORM:
        size = artifact.facts.get("size_bytes")
        return {
            "format": FORM,
            "size_bytes": size,
            "bits_per_weight": 8 * size / params if size and params else None,
            "params": params,
            "facts": artifact.facts,
            "notes": [*Served.notes],
        }
    assert params
    weights = sum(entry["size"] for entry in artifact.manifest["files"] if entry["path"].endswith(weight_endings()))
    return {
        "format": artifact.format,
        "size_bytes": artifact.facts.get("size_bytes", artifact.size_bytes),
        "bits_per_weight": 8 * weights / params,
        "params": params,
        "facts": {name: value for name, value in artifact.facts.items() if name != "training"},
        "notes": list(artifact.manifest["warnings"]),
    }


def describe_source(source: Found | Served) -> dict[str, Any]:
    """Returns the columns of a model's row that need no measuring."""
    if isinstance(source, Served):
        params, size = source.facts.params or None, source.size_bytes
        return {
            "path": source.name,
            "error": None,
            "format": source.form,
            "size_bytes": size,
            "bits_per_weight": 8 * size / params if size and params else None,
            "params": params,
            "notes": [*source.notes],
        }
    files = [file for file in source.path.rglob("*") if file.is_file()] if source.path.is_dir() else [source.path]
    weights = sum(
        file.stat().st_size for file in files if file.name.endswith(weight_endings()) or gguf_header.is_gguf(file)
    )
    return {
        "path": str(source.path),
        "error": None,
        "format": _format(source),
        "size_bytes": sum(file.stat().st_size for file in files),
        "bits_per_weight": 8 * weights / source.facts.params,
        "params": source.facts.params,
        "notes": [*source.notes, *(gguf_source.doubts(source.path) if source.form == "gguf" else [])],
    }


def _format(source: Found) -> str:
    if source.form != "directory":
        return source.form
    if (source.path / MANIFEST).is_file() and (form := read_artifact(source.path).format) in EXPORTS.names:
        return form
    return str((read_config(source.path).get("quantization_config") or {}).get("quant_method", "hf"))


def label(source: Found | Served, serve: Serve | None = None) -> Path:
    """Returns the path that a row is named after: on a server, host and name of the model; in one, its name too."""
    if isinstance(source, Found):
        path = source.path
        return path.with_name(f"{path.name}-{serve.program}") if serve else path
    address = source.address
    return Path("/", address.host, *(address.model or "").split("/"))


def _note_vocabulary(row: dict[str, Any], other: str) -> None:
    """Notes in a row that its vocabulary differs from the baseline's, and the consequences."""
    row["vocabulary"] = other
    note = (
        f"its vocabulary is not the baseline's ({other}), so it is measured on tokens of its own: compare bits per "
        "byte, not perplexity; there is no KL divergence"
    )
    if note not in row.setdefault("notes", []):
        row["notes"].append(note)


def _note_server(row: dict[str, Any], server: dict[str, Any]) -> None:
    """Notes in a row the server that lighten started for it, and how that loaded the model."""
    row["runtime"] = f"{server['with']} server"
    row["facts"] = {**row.get("facts", {}), "server": server}
    package, version = next(iter(server["packages"].items()), (server["with"], ""))
    loaded = [f"quantization {server['quantization']}"] if server.get("quantization") else []
    loaded += server.get("kernels", [])
    note = f"measured over HTTP in {package} {version}".strip() + (f": {', '.join(loaded)}" if loaded else "")
    if note not in row.setdefault("notes", []):
        row["notes"].append(note)


def add_measurements(
    row: dict[str, Any], measured: list[tuple[Measurement, Path, Path | None]], is_baseline: bool
) -> None:
    """Puts measurements into a row: of each its settings, its directory, and the baseline's directory or None."""
    for settings, path, against in measured:
        result = paired.read(path)
        if other := result.get("vocabulary"):
            _note_vocabulary(row, other)
        row |= {name: result[name] for name in ("runtime", "device") if name in result}
        if server := result.get("server"):
            _note_server(row, server)
        there = add_measurement(row, settings, result)
        if there and against and not is_baseline and "unavailable" not in paired.read(against):
            settings.add_change(row, path, against)


def add_measurement(row: dict[str, Any], settings: Measurement, result: dict[str, Any]) -> bool:
    """Puts one measurement into a row, or why it is not available; returns whether it is."""
    if reason := result.get("unavailable"):
        row.setdefault("unavailable", []).append({"measurement": settings.title, "reason": reason})
        row.setdefault("notes", []).append(f"{settings.title} is not available: {reason}")
        return False
    settings.add(row, result)
    return True
