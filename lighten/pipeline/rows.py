"""The rows of a version's results: an artifact, and what was measured on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lighten.evaluate import paired
from lighten.evaluate.runtimes.opening import weight_endings
from lighten.pipeline.build import Builder
from lighten.pipeline.recipe import BASELINE
from lighten.pipeline.stage import Plan, Stage
from lighten.store.artifact import Artifact


def _row(name: str, todo: Plan, builder: Builder, root: Artifact) -> dict[str, Any]:
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
    pairs = [[each for each in todo.measurements[of] if each.measure != "speculative"] for of in (name, BASELINE)]
    for each, base in zip(*pairs, strict=True):
        found, against = builder.done.get(each.key), builder.done.get(base.key)
        if found:
            measured.append((each.measure, found.path, against.path if against else None))
    add_measurements(row, measured, name == BASELINE)
    row["speculative"] = _speculative(name, todo, builder)
    if name != BASELINE:
        row.setdefault("delta", {})["size_ratio"] = row["size_bytes"] / root.size_bytes
    return row


def _speculative(name: str, todo: Plan, builder: Builder) -> dict[str, Any] | None:
    """Returns what a draft is worth to this variant, if that was measured."""
    asked = todo.recipe.evaluate.speculative
    if not asked or asked.target != name:
        return None
    stage = next((each for each in todo.measurements.get(asked.draft, []) if each.measure == "speculative"), None)
    found = builder.done.get(stage.key) if stage else None
    return {"draft": asked.draft, **paired.read(found.path)["speculative"]} if found else None


def _nearest(stage: Stage, builder: Builder, fact: str) -> Any:
    """Returns a fact of an artifact, or of the nearest that it was made from and has it."""
    found = builder.done[stage.key].facts.get(fact)
    return found if found is not None or not stage.parents else _nearest(stage.parents[0], builder, fact)


def describe(artifact: Artifact, params: int) -> dict[str, Any]:
    """Returns the columns of a row that need no measuring: format, size, bits per weight, facts."""
    weights = sum(entry["size"] for entry in artifact.manifest["files"] if entry["path"].endswith(weight_endings()))
    return {
        "format": artifact.format,
        "size_bytes": artifact.facts.get("size_bytes", artifact.size_bytes),
        "bits_per_weight": 8 * weights / params,
        "params": params,
        "facts": {name: value for name, value in artifact.facts.items() if name != "training"},
        "notes": list(artifact.manifest["warnings"]),
    }


def _note_vocabulary(row: dict[str, Any], other: str) -> None:
    """Writes into a row that its vocabulary is not the baseline's, and what follows from that."""
    row["vocabulary"] = other
    note = (
        f"its vocabulary is not the baseline's ({other}), so it is measured on tokens of its own: compare bits per "
        "byte, not perplexity; there is no KL divergence"
    )
    if note not in row.setdefault("notes", []):
        row["notes"].append(note)


def add_measurements(row: dict[str, Any], measured: list[tuple[Any, Path, Path | None]], is_baseline: bool) -> None:
    """Puts measurements into a row: (kind, its directory, the baseline's directory or None) of each."""
    for kind, path, against in measured:
        result = json.loads((path / "result.json").read_text())
        if kind == "loaders":
            row["loads"] = result["loads"]
            continue
        if other := result.get("vocabulary"):
            _note_vocabulary(row, other)
        row["runtime"] = result.get("runtime", row.get("runtime"))
        row["device"] = result.get("device", row.get("device"))
        if kind == "perplexity":
            found = result["perplexity"]
            found["protocol"] = {"name": "lighten", **found["protocol"]}  # results from before there were several
            if "perplexity" not in row:
                row["perplexity"] = found
            else:
                row.setdefault("other_perplexity", []).append(found)
            row["divergence"] = row.get("divergence") or result.get("divergence")
            note = "its own tokenizer gives other ids than the baseline's on this text"
            if result.get("tokenizer_match") is False and note not in row.setdefault("notes", []):
                row["notes"].append(note)
        elif kind == "accuracy":
            row.setdefault("accuracy", []).append(result["accuracy"])
        elif kind == "load":
            row["load"] = result["load"]
            continue
        else:
            row |= {"speed": result["speed"], "memory": result["memory"], "energy": result["energy"]}
        if against and not is_baseline and not (other and kind == "perplexity"):
            delta = row.setdefault("delta", {})
            change = paired.compare(kind, path, against)
            if kind == "accuracy":
                delta.setdefault("accuracy", []).append(change)
            elif kind == "perplexity" and "other_perplexity" in row:
                change = {"protocol": result["perplexity"]["protocol"]["name"], **change["perplexity"]}
                delta.setdefault("other_perplexity", []).append(change)
            else:
                delta |= change
