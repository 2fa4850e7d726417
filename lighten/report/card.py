"""The model card of a variant: README.md as the Hugging Face hub reads it, with front matter and measured metrics.

A card lies beside the artifact, at cards/NAME/README.md of a version, and not in it: it tells what was measured after
the artifact was made, so it would change the artifact's hash with every measurement. Pushing puts the two together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lighten.errors import LightenError
from lighten.model.export_formats import export_format
from lighten.report import claims
from lighten.report.accuracy import in_chat
from lighten.report.calibration import amount
from lighten.report.facts import protocols, sentence, settings, text
from lighten.report.loading import loading
from lighten.report.markdown import code, escape, fence, grid_table
from lighten.report.numbers import NOT_MEASURED, byte_count
from lighten.report.part import Grid
from lighten.report.shareable import shareable
from lighten.report.table import table
from lighten.results.results import Results, Variant
from lighten.store.artifact import Artifact, read_artifact
from lighten.store.links import follow

CARD = "README.md"
UNKNOWN = "unknown"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
BASES = {"demo:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Names of the demo models on the hub."""


def cards(results: Results, folder: Path) -> dict[str, str]:
    """Returns the cards, by name, of all variants of a version whose artifact is there."""
    found = {}
    for variant in results.measured:
        if variant.elsewhere:  # there is no artifact of it here
            continue
        try:
            artifact = read_artifact(follow(folder / "variants" / variant.name))
        except LightenError:
            continue
        found[variant.name] = card(results, variant, artifact)
    return found


def card(results: Results, variant: Variant, artifact: Artifact, repo: str | None = None) -> str:
    """Returns a variant's card. It names no path of this machine.

    Args:
        results: the version.
        variant: its row.
        artifact: the artifact that the card describes.
        repo: the repository of the hub where the card will lie; None if it is read beside the version.
    """
    results = shareable(results)
    variant = next(each for each in results.variants if each.name == variant.name)
    where = f'snapshot_download("{repo}")' if repo else f'"variants/{variant.name}"'
    files = artifact.manifest["files"]
    parts = [
        f"---\n{_front(results, variant)}---",
        f"# {escape(_called(results, variant, repo))}",
        _opening(results, variant),
        "## Use",
        loading(variant.format or "", [entry["path"] for entry in files], where),
        *([] if repo else ["From the directory of this version."]),
        "## What was measured",
        *_measured(results, variant),
        "## How it was made",
        *_made(results, variant),
        "## Files",
        grid_table(_files(files)),
    ]
    if variant.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in variant.notes)]
    return "\n\n".join(parts) + "\n"


def base_model(results: Results) -> str | None:
    """Returns the hub id of the source; None if the source was a directory or a file of a person's own."""
    model = BASES.get(results.source.model, results.source.model)
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _called(results: Results, variant: Variant, repo: str | None) -> str:
    if repo:
        return repo.partition("/")[2]
    return f"{Path(results.source.model.removeprefix('demo:')).name} {variant.name}"


def _front(results: Results, variant: Variant) -> str:
    """Returns the front matter: the fields by which the hub files the model, and the metrics that it shows."""
    licence = (results.source.model_extra or {}).get("licence")
    steps = list(dict.fromkeys(name for step in variant.steps for name in step))
    retrained = {"prune", "distill"} & set(steps)
    fields: dict[str, Any] = {
        "base_model": base_model(results),
        "base_model_relation": ("finetune" if retrained else "quantized") if variant.steps else None,
        "license": str(licence).lower() if licence else "other",
        "library_name": known.library if (known := export_format(variant.format)) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in dict.fromkeys(["lighten", variant.format, *steps, _method(variant)]) if tag],
        "model-index": [{"name": variant.name, "results": found}] if (found := _index(results, variant)) else None,
    }
    kept = {name: value for name, value in fields.items() if value is not None}
    if "base_model" not in kept:
        kept.pop("base_model_relation", None)
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)


def _method(variant: Variant) -> str | None:
    value = variant.facts.get("method") or variant.facts.get("type")
    return str(value).lower() if value else None


def _index(results: Results, variant: Variant) -> list[dict[str, Any]]:
    """Returns the metrics in the form of the hub's model-index, with one entry for every data set."""
    found = []
    for each in variant.perplexities:
        how = f"perplexity per {each.unit}, protocol {each.by}"
        length = each.protocol.get("length")
        how += f", chunks of {length}" if length else ""
        data = str(each.protocol.get("data", "text"))
        found.append(_entry(data, [{"type": "perplexity", "value": each.value, "name": how}]))
    if variant.divergence:
        numbers = [("kl_mean", variant.divergence.kl_mean), ("top1_agreement", variant.divergence.top1_agreement)]
        data = str(variant.perplexity.protocol.get("data", "text")) if variant.perplexity else "text"
        names = {"kl_mean": "mean KL divergence from the source, nats", "top1_agreement": "same likeliest next token"}
        metrics = [{"type": key, "value": value, "name": names[key]} for key, value in numbers if value is not None]
        found.append(_entry(data, metrics))
    for score in variant.accuracy:
        pairs = [("acc", score.acc), ("acc_norm", score.acc_norm)]
        name = f"{score.n:,} tasks, scored by {score.scorer or 'lighten'}{in_chat(score)}"
        metrics = [{"type": key, "value": value, "name": f"{key}, {name}"} for key, value in pairs if value is not None]
        reported = [
            {"type": m.metric, "value": m.value, "name": f"{m.task} {m.metric} ({m.filter})"} for m in score.metrics
        ]
        if metrics or reported:
            found.append(_entry(score.task, metrics or reported))
    return found


def _entry(data: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    name = Path(data).name
    identifier = re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "text"
    task = {"type": "text-generation", "name": "Text generation"}
    return {"task": task, "dataset": {"type": identifier, "name": name}, "metrics": metrics}


def _opening(results: Results, variant: Variant) -> str:
    base = base_model(results)
    source = f"[{base}](https://huggingface.co/{base})" if base else code(Path(results.source.model).name)
    size = f", {byte_count(variant.size_bytes)}" if variant.size_bytes is not None else ""
    part = results.size_ratio(variant)
    size += f", {100 * part:.0f} % of the source's size" if part is not None else ""
    how = "Made from" if variant.steps else "The source itself:"
    licence = (results.source.model_extra or {}).get("licence")
    terms = (
        f"The source's licence is {escape(str(licence))}."
        if licence
        else "The source names no licence: ask its makers."
    )
    return f"{how} {source} (format {code(variant.format or UNKNOWN)}{size}). {terms}"


def _measured(results: Results, variant: Variant) -> list[str]:
    """Returns the numbers beside the source's numbers, and how they were measured."""
    comparison = table(results)
    rows = {row.variant.name: row for row in comparison.rows}
    ours, base = rows[variant.name], results.baseline
    beside = rows[base.name].cells if base and base is not variant else ()
    lines = []
    for i, column in enumerate(comparison.columns[1:], 1):
        cells = [ours.cells[i], *beside[i : i + 1]]
        if column.name not in ("format",) and ours.cells[i].value is not None:
            said = [cell.with_unit(column.unit) if cell.value is not None else NOT_MEASURED for cell in cells]
            lines.append((column.title, *said, column.about))
    heads = ("", "This model", *(["The source"] if beside else []), "What it is")
    if not lines:
        return ["Nothing was measured but its size."]
    said = [grid_table(Grid(heads, tuple(lines)))]
    compared = [variant, *([base] if beside and base else [])]
    said += [escape(line) for line in (claims.bug(results, variant), claims.noise(compared)) if line]
    said += [f"Perplexity by the protocol {name}: {escape(sentence(items))}." for name, items in protocols(results)]
    machine = results.machine if not variant.elsewhere else variant.facts["machine"]
    if isinstance(machine, dict) and variant.speed:
        parts = [text(machine[key], key) for key in ("cpu", "cores", "gpus") if machine.get(key)]
        said.append(f"Speed and memory: {escape(', '.join(parts))}" + (" cores." if len(parts) == 2 else "."))
    return said


def _made(results: Results, variant: Variant) -> list[str]:
    """Returns the steps, the whole recipe, and the versions of the packages that ran it."""
    steps = yaml.safe_dump(variant.steps, sort_keys=False, allow_unicode=True) if variant.steps else ""
    said = [fence(steps)] if steps else ["No step: the source in a form that is measured alike."]
    if facts := settings(variant.facts):
        simple = {key: value for key, value in facts.items() if isinstance(value, (str, int, float, bool))}
        said += [escape(sentence((key.replace("_", " "), text(value, key)) for key, value in simple.items())) + "."]
    if results.calibration and variant.steps:
        said.append(f"Calibration text: {escape(amount(results.calibration))}.")
    identity = (results.source.model_extra or {}).get("identity")
    if not base_model(results) and identity:
        said.append(f"The source's identity (SHA-256 of its files): {escape(str(identity))}.")
    if results.recipe_yaml:
        said += ["The whole recipe, to be run again with `lighten run recipe.yaml`:", fence(results.recipe_yaml)]
    packages = results.machine.get("packages")
    made = f"Made by lighten, {results.title}, {results.created}"
    return [*said, escape(f"{made}; {text(packages)}." if packages else f"{made}.")]


def _files(files: Sequence[Mapping[str, Any]]) -> Grid:
    rows = tuple((entry["path"], byte_count(entry["size"]), entry["sha256"]) for entry in files)
    return Grid(("File", "Size", "SHA-256"), rows)
