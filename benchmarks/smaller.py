"""The tables of pruning and training for docs/benchmarks.md; `tables.py` puts them there."""

from __future__ import annotations

import math
from typing import Any

from sparsity import EXPORTED, PUBLISHED, SHRUNK, ZEROS
from tables import made, rows

from lighten.report.numbers import NOT_MEASURED, byte_count, significant

Found = dict[str, Any]
NAMES = {
    "mlp": "20 % of the MLP channels",
    "heads": "one of three key/value heads",
    "layers": "2 of 30 layers, neighbours",
    "layers-free": "2 of 30 layers, any",
    "target": "a mixture: a tenth of all weights",
}


def _setting(found: Found) -> str:
    settings = found["settings"]
    return (
        f"{settings['model']}, {settings['samples']} × 512 tokens of {settings['calibration']}. Perplexity is "
        f"measured on {settings['test_samples']} × 512 tokens of {settings['test']}"
    )


def zeros(results: Found) -> str:
    """Returns what zeros cost, beside the published figures."""
    found = results["perplexity"]
    value = {row["name"]: row["perplexity"]["value"] for row in found["rows"] if row["perplexity"]}
    dense = value["baseline"]

    def nats(perplexity: float, base: float) -> str:
        return f"{math.log(perplexity / base):+.2f}"

    lines = [["dense", significant(dense, 4), "", "", "", significant(PUBLISHED["dense"], 3), ""]]
    for method in ZEROS:
        half, pattern = value[f"{method}-50"], value[f"{method}-2of4"]
        published = PUBLISHED[method]
        cells = [significant(half, 4), nats(half, dense), significant(pattern, 4), nats(pattern, dense)]
        lines.append([method, *cells, significant(published, 4), nats(published, PUBLISHED["dense"])])
    titles = ("Method", "50 %", "nats", "2:4", "nats", "Llama-2-7B, 50 %", "nats")
    caption = (
        f"{_setting(found)}. A column of nats is the rise of the logarithm of perplexity. Llama-2-7B: Sun et al. "
        f"(2024). Magnitude that is compared over the whole model gives "
        f"{significant(value['magnitude-global-50'], 4)} at 50 %."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def shrunk(results: Found) -> str:
    """Returns what smaller shapes cost, with and without repair, as transformers and as llama.cpp measure them."""
    found = results["perplexity"]
    by_name = {row["name"]: row for row in found["rows"]}
    value = {name: row["perplexity"]["value"] for name, row in by_name.items() if row["perplexity"]}
    base = by_name["baseline"]
    lines = []
    for name, what in NAMES.items():
        left = by_name[name]["params"] / base["params"]
        cells = [what, f"{100 * left:.1f} %", significant(value[name], 4)]
        if name in SHRUNK:
            without = value[f"{name}-unrepaired"]
            back = 1 - math.log(value[name] / value["baseline"]) / math.log(without / value["baseline"])
            cells += [significant(without, 4), f"{100 * back:.0f} %"]
        else:
            cells += [NOT_MEASURED, NOT_MEASURED]
        gguf = value.get(f"{name}-f16")
        cells.append(f"{100 * (gguf / value[name] - 1):+.3f} %" if gguf else NOT_MEASURED)
        lines.append(cells)
    titles = ("What goes", "Weights left", "Perplexity", "Without repair", "Given back", "As F16 GGUF")
    chosen = {name: (value[f"{name}-energy"], value[f"{name}-energy-unrepaired"]) for name in SHRUNK}
    energy = ", ".join(
        f"{name} {significant(repaired, 4)} (unrepaired {significant(plain, 4)})"
        for name, (repaired, plain) in chosen.items()
    )
    caption = (
        f"{_setting(found)}; the source has {significant(value['baseline'], 4)}. Given back is the share of the "
        f"damage in log-perplexity that least squares undo, with no training. Chosen by energy instead of cost: "
        f"{energy}. Heads by Taylor scores: {significant(value['heads-taylor'], 4)}."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def quicker(results: Found) -> str:
    """Returns what smaller shapes gain in speed and memory."""
    found = results["speed"]
    by_name = {row["name"]: row for row in found["rows"]}
    lines = []
    for name, base in [*((each, "baseline") for each in EXPORTED), *((f"{each}-f16", "f16") for each in EXPORTED)]:
        row, whole = by_name[name], by_name[base]
        decode, before = (each["speed"][0]["decode_tok_s"] for each in (row, whole))
        memory, more = (each["memory"]["peak_rss_bytes"] for each in (row, whole))
        lines.append(
            [
                f"{NAMES[name.removesuffix('-f16')]}, {row['runtime']}",
                f"{100 * row['params'] / whole['params']:.1f} %",
                f"{100 * row['size_bytes'] / whole['size_bytes']:.1f} %",
                f"{significant(decode, 3)} ({decode / before:.2f}×)",
                f"{byte_count(memory)} ({byte_count(more)})",
            ]
        )
    titles = ("What goes", "Weights", "Size", "Decode, tok/s", "Peak memory (before)")
    return f"{rows(titles, lines)}\n\n{made(found)}"


def training(found: Found) -> str:
    """Returns memory and time of a training step."""
    base = found["rows"][0]
    lines = [
        [
            row["setting"],
            f"{significant(row['seconds_per_step'], 3)} s",
            f"{base['seconds_per_step'] / row['seconds_per_step']:.2f}×",
            significant(row["tokens_per_second"], 3),
            byte_count(row["peak_bytes"]),
        ]
        for row in found["rows"]
    ]
    settings = found["settings"]
    step = f"{settings['batch']} sequences of {settings['length']} tokens"
    caption = f"{settings['model']}, {step} a step. All weights train, except with LoRA."
    titles = ("Setting", "A step", "Speed", "Tokens/s", "Peak memory")
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def ready(found: Found) -> str:
    """Returns what the ready recipes gave."""
    parts = []
    for recipe in found["rows"]:
        lines = [
            [
                f"`{variant['name']}`",
                f"{variant['params'] / 1e6:,.1f} M",
                byte_count(variant["size_bytes"]),
                significant(variant["perplexity"]["value"], 4) if variant["perplexity"] else NOT_MEASURED,
            ]
            for variant in recipe["variants"]
        ]
        value = {each["name"]: each["perplexity"]["value"] for each in recipe["variants"] if each["perplexity"]}
        minutes = f"{recipe['seconds'] / 60:.1f} minutes"
        caption = f"{recipe['source']}, built-in held-out text. All stages together took {minutes}."
        if {"pruned", "slim"} <= set(value):
            given = math.log(value["pruned"] / value["slim"]) / math.log(value["pruned"] / value["baseline"])
            caption += f" Distillation gives back {given:.0%} of the log-perplexity that pruning cost.".replace(
                "%", " %"
            )
        titles = ("Variant", "Weights", "Size", "Perplexity")
        command = made({**recipe, "command": f"lighten run {recipe['recipe']}"})
        parts.append(f"**`{recipe['recipe']}`**\n\n{rows(titles, lines)}\n\n{caption} {command}")
    return "\n\n".join(parts)
