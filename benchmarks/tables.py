"""Writes the tables of docs/ and of both READMEs, the quickstart's apart, from the results of the scripts beside it.

python benchmarks/tables.py [RESULTS]

RESULTS is the directory of the result files, benchmarks/results unless given. What stands between two marks is
replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lighten.report.markdown import escape
from lighten.report.numbers import NOT_MEASURED, byte_count, duration, ratio, significant

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "benchmarks.md"
EDGE = HERE.parent / "docs" / "edge.md"
ROBUST = HERE.parent / "docs" / "robustness.md"
METHOD = HERE.parent / "docs" / "how-it-works.md"
FAMILIES = HERE.parent / "docs" / "families.md"
SERVERS = HERE.parent / "docs" / "endpoints.md"
TEXTS = HERE.parent / "docs" / "encoders-and-translation.md"
README = HERE / "README.md"
FRONT = HERE.parent / "README.md"
TOOLS = {
    "lighten": "lighten",
    "gptqmodel": "GPTQModel",
    "llmcompressor": "llm-compressor",
    "autoround": "AutoRound",
}
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "awq-torch": "AWQ, its CPU backend named",
    "rtn": "RTN",
    "opt-rtn": "RTN, scales searched",
    "light": "light",
    "default": "default",
    "static": "GPTQ in order of activation",
    "streams": "GPTQ in order of activation and two streams",
    "refined": "GPTQ in order of activation and two streams, refined twice",
    "polished": "GPTQ in order of activation and two streams, refined twice, then polish",
}
PACKAGES = {"gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor", "autoround": "auto-round"}
WHOLE = {
    "campaign": "kills",
    "families": "families",
    "zeros": "perplexity",
    "shrunk": "perplexity",
    "quicker": "speed",
    "card-equal": "equal",
    "card-whole": "gptq",
    "card-decode": "equal",
    "gemma": "models",
    "vllm": "load",
    "vllm-float16": "load",
}
"""The part that a result file must have for a section to be written."""
Found = dict[str, Any]


def rows(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose first column is text and whose others are numbers."""
    lines = [titles, [":---", *["---:"] * (len(titles) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made(found: Found) -> str:
    """Returns the command and the machine of a result file, and the commands of runs whose rows it still has."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers"))
    earlier = ", ".join(f"`{each}`" for each in found.get("earlier", []))
    others = f" Rows that were there before: {earlier}." if earlier else ""
    return f"`{found['command']}` on {machine['cores']} cores ({machine['cpu']}), {versions}.{others}"


def comparison(found: Found) -> str:
    """Returns the table of the tools."""
    lines = []
    for entry in found["summary"].values():
        name = f"{tool_of(found, entry)}, {METHODS[entry['method']]}"
        if entry["error"]:
            lines.append([name, "refused", *[""] * 5])
            continue
        compared = entry.get("times_ours", {})
        times = f" ({ratio(compared['seconds'])})" if compared else ""
        memory = f" ({ratio(compared['peak_bytes'])})" if compared else ""
        spread = " – ".join(duration(end) for end in entry["seconds_range"])
        scored = significant(entry["perplexity"], 4) if entry["perplexity"] else NOT_MEASURED
        error = f" ± {significant(entry['stderr'], 2)}" if entry["stderr"] else ""
        lines.append(
            [
                name,
                duration(entry["seconds"]) + times,
                spread if entry["rounds"] > 1 else NOT_MEASURED,
                byte_count(entry["peak_bytes"]) + memory,
                byte_count(entry["size_bytes"]),
                scored + error,
                significant(entry["kl"], 3) if entry["kl"] else NOT_MEASURED,
            ]
        )
    titles = ("Tool and method", "Wall time", "Fastest – slowest", "Peak memory", "Size", "Perplexity", "KL, nats")
    rounds = max(entry["rounds"] for entry in found["summary"].values())
    source = found["facts"].get("source") or {}
    settings = found["settings"]
    caption = [
        f"{settings['model']}, {settings['bits']} bits, group {settings['group_size']}, {settings['samples']} × "
        f"{settings['length']} tokens of {settings['calibration']}",
        f"Perplexity is measured on {settings['test_samples']} × {settings['test_length']} tokens of "
        f"{settings['test']}, in float32",
        f"The source has {significant(source['value'], 4)}" if source else "",
        f"Times are {f'the median of {rounds} rounds' if rounds > 1 else 'those of one round'}",
        "× is the multiple of lighten's run with the same grid",
    ]
    return f"{rows(titles, lines)}\n\n{'. '.join(filter(None, caption))}.\n\n{made(found)}"


def peers(found: Found) -> str:
    """Returns the short table of the README: GPTQ, AutoRound light and AWQ, one tool beside the other."""
    lines = []
    for entry in found["summary"].values():
        if entry["method"] in ("gptq", "static", "streams", "refined", "polished", "light", "awq"):
            costs = [NOT_MEASURED, NOT_MEASURED, "refused, as called"]
            if not entry["error"]:
                costs = [
                    duration(entry["seconds"]),
                    byte_count(entry["peak_bytes"]),
                    significant(entry["perplexity"], 4),
                ]
            lines.append([f"{tool_of(found, entry)}, {METHODS[entry['method']]}", *costs])
    settings, source = found["settings"], found["facts"]["source"]["value"]
    caption = (
        f"SmolLM2-135M, {settings['bits']} bits, group {settings['group_size']}, {settings['samples']} × "
        f"{settings['length']} tokens of WikiText-2. Perplexity is measured on its test set; the "
        f"source has {significant(source, 4)}. [Benchmarks](docs/benchmarks.md) has the command, the machine, more "
        "peers, and what they refuse."
    )
    return f"{rows(('Tool and method', 'Wall time', 'Peak memory', 'Perplexity'), lines)}\n\n{caption}"


def tool_of(found: Found, entry: Found) -> str:
    tool = entry["tool"]
    versions = {"lighten": found["machine"]["packages"], **found["facts"].get("versions", {})}.get(tool) or {}
    return f"{TOOLS[tool]} {versions.get(PACKAGES.get(tool, tool), '')}".strip()


def variants(found: Found) -> str:
    """Returns what 1, 2, 4 and 8 variants of one sweep cost."""
    summary = found["summary"]
    lines = []
    for row in found["rows"]:
        many = "count" in row
        times = summary["times_longest"][str(row["count"])] if many else 1.0
        lines.append(
            [
                str(row["count"]) if many else f"{row['alone']}, alone",
                duration(row["seconds"]),
                ratio(times),
                duration(row["stages_sum"]),
                duration(row["stages_longest"]),
                byte_count(row["peak_bytes"]),
            ]
        )
    titles = ("Variants", "Wall time", "Times the longest alone", "Sum of stages", "Longest stage", "Peak memory")
    order = next(row for row in reversed(found["rows"]) if "count" in row)["variants"]
    failed = sorted({row["error"] for row in found["rows"] if row["error"]})
    caption = [f"In this order: {', '.join(order)}.", *(f"Failed: {escape(error)}" for error in failed), made(found)]
    return "\n\n".join([rows(titles, lines), *caption])


def quality(found: Found) -> str:
    """Returns what each method costs in perplexity, on the model as it is and off its grid."""
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    named = {(row["model"], row["name"]): row for row in found["rows"]}
    lines = []
    for name in dict.fromkeys(row["name"] for row in found["rows"]):
        first = named[models[0], name]
        cells = [name, byte_count(first["size_bytes"]), significant(first["bits_per_weight"], 3)]
        for model in models:
            if (row := named.get((model, name))) is None:
                cells += [NOT_MEASURED, NOT_MEASURED]
                continue
            measured = row["perplexity"]
            cells.append(significant(measured["value"], 4) if measured else escape(str(row["error"])))
            kl = (row["divergence"] or {}).get("kl_mean")
            cells.append(significant(kl, 2) if kl else NOT_MEASURED)
        lines.append(cells)
    titles = ["Variant", "Size", "Bits per weight", *(each for model in models for each in (model, "KL, nats"))]
    settings = found["settings"]
    caption = (
        f"Perplexity of {settings['model']}, calibrated on {settings['samples']} × {settings['length']} tokens of "
        f"{settings['calibration']} and measured on {settings['test_samples']} × {settings['length']} tokens of "
        f"{settings['test']}. Groups of 64. `gguf-budget` has the size of `q4_k_m`. Off the grid, the model is the "
        "same function with random scales moved between neighbouring matrices."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def search(found: Found) -> str:
    """Returns GPTQ's perplexity for powers of the columns' cost, a row for each damping."""
    powers, dampings = (sorted({row[key] for row in found["rows"]}) for key in ("power", "damping"))
    value = {(row["power"], row["damping"]): significant(row["perplexity"], 4) for row in found["rows"]}
    lines = [[f"damping {damping:g}", *(value[power, damping] for power in powers)] for damping in dampings]
    settings = found["settings"]
    caption = (
        f"Perplexity with {settings['bits']} bits, symmetric, group {settings['group_size']}, {settings['tokens']} "
        f"tokens of calibration, on {settings['test_samples']} × 512 tokens of {settings['test']} in "
        f"{settings['arithmetic']}. The source has {significant(found['source'], 4)}."
    )
    return f"{rows(['power of `1 / U[j,j]²`', *(f'{power:g}' for power in powers)], lines)}\n\n{caption} {made(found)}"


def growth(found: Found) -> str:
    """Returns seconds per layer and peak memory of growing models."""
    kinds = [what for what in found["rows"][0]["seconds_per_layer"] if what != "source"]
    kinds.sort(key=lambda what: what != "sweep")
    lines = []
    for row in found["rows"]:
        costs = [byte_count(next(s["peak_bytes"] for s in row["stages"] if s["what"] == kind)) for kind in kinds]
        shares = [f"{significant(row['seconds_per_layer'][kind], 3, decimals=2)} s" for kind in kinds]
        weights = f"{significant(row['params'] / 1e9, 3)} B, {'random' if row['shape'] else 'real'}"
        lines.append([weights, str(row["layers"]), *shares, *costs, byte_count(row["peak_bytes"])])
    titles = ["Weights", "Layers", *(f"{kind}, per layer" for kind in kinds), *(f"{kind}, peak" for kind in kinds)]
    caption = "The seconds include starting Python and importing torch. The largest peak is that of any stage."
    return f"{rows([*titles, 'Largest peak'], lines)}\n\n{caption}\n\n{made(found)}"


def refusals(found: Found) -> str:
    """Returns what each peer refuses, in its own words."""
    lines = [
        f"- {tool_of(found, entry)}, {METHODS[entry['method']]}: `{entry['error']}`"
        for entry in found["summary"].values()
        if entry["error"]
    ]
    unopened = {row["run"]: row["unopened"] for row in found["rows"] if row.get("unopened")}
    lines += [f"- {run}: `lighten evaluate` could not open it: `{why}`" for run, why in unopened.items()]
    return "\n".join(lines) or "Nothing was refused."


def environments(found: Found) -> str:
    """Returns the lines that make the peers' environments, with the versions that were measured."""
    lines = []
    for peer, versions in found["facts"].get("versions", {}).items():
        torch = versions["torch"].partition("+")[0]
        pinned = f"torch=={torch} {PACKAGES[peer]}=={versions[PACKAGES[peer]]}"
        lines += [f"python -m venv {peer} && {peer}/bin/pip install {pinned} transformers=={versions['transformers']}"]
    return "\n".join(["```", *lines, "```"])


SECTIONS: tuple[tuple[Path, str, str, Callable[[Found], str]], ...] = (
    (DOCS, "comparison", "quantize.json", comparison),
    (DOCS, "variants", "quantize_variants.json", variants),
    (DOCS, "quality", "quality.json", quality),
    (DOCS, "growth", "quantize_growth.json", growth),
    (METHOD, "search", "search.json", search),
    (METHOD, "streams", "quantize_streams.json", comparison),
    (FRONT, "peers", "quantize.json", peers),
    (README, "environments", "quantize.json", environments),
    (README, "refusals", "quantize.json", refusals),
)

SUMMARISED = ("comparison", "variants", "streams", "peers", "environments", "refusals")
"""Sections whose files end with a summary once all is measured."""


def main() -> None:
    import campaign
    import cards
    import evaluations
    import exports
    import family_table
    import firsts
    import floats
    import serving
    import smaller

    sections = (
        *SECTIONS,
        (DOCS, "card-equal", "gpu.json", cards.equal),
        (DOCS, "card-whole", "gpu.json", cards.whole),
        (DOCS, "card-decode", "gpu.json", cards.decode),
        (DOCS, "destinations", "destinations.json", exports.destinations),
        (DOCS, "onnx", "onnx.json", exports.onnx),
        (TEXTS, "encoders", "encoders.json", exports.encoders),
        (DOCS, "gguf", "gguf.json", exports.gguf),
        (DOCS, "gemma", "gemma.json", exports.gemma),
        (EDGE, "arm64", "arm64.json", exports.arm64),
        (DOCS, "zeros", "sparsity.json", smaller.zeros),
        (DOCS, "shrunk", "sparsity.json", smaller.shrunk),
        (DOCS, "quicker", "sparsity.json", smaller.quicker),
        (DOCS, "training", "training.json", smaller.training),
        (DOCS, "ready", "recipes.json", smaller.ready),
        (DOCS, "harness", "evaluate.json", evaluations.harness),
        (FRONT, "scorers", "evaluate.json", evaluations.scorers),
        (DOCS, "protocols", "protocols.json", evaluations.protocols),
        (DOCS, "ladder", "ladder.json", serving.ladder),
        (DOCS, "repeat", "repeat.json", serving.repeat),
        (SERVERS, "vllm", "vllm.json", serving.vllm),
        (SERVERS, "vllm-float16", "vllm-float16.json", serving.vllm),
        (DOCS, "served", "serving.json", serving.served),
        (FAMILIES, "families", "families.json", family_table.families),
        (ROBUST, "campaign", "campaign.json", campaign.campaign),
        (DOCS, "from-nothing", "from_nothing.json", firsts.from_nothing),
        (METHOD, "int3", "int3.json", exports.low_bits),
        (METHOD, "low-bits", "low_bits.json", exports.low_bits),
        (METHOD, "kquants", "kquants.json", exports.kquants),
        (METHOD, "parity", "parity.json", firsts.parity),
        (METHOD, "floats", "floats.json", floats.table),
        (DOCS, "engine", "engine.json", firsts.engine),
    )
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    for page, name, file, section in sections:
        path = results / file
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not found.get("summary" if name in SUMMARISED else WHOLE.get(name, "rows")):
            print(f"{page.name}, {name}: {path} is not there or not finished; left as it is")
            continue
        begin = f"<!-- {name}: written by benchmarks/tables.py from benchmarks/results/{file} -->"
        end = f"<!-- end of {name} -->"
        before, first, rest = page.read_text(encoding="utf-8").partition(begin)
        _, second, after = rest.partition(end)
        if not (first and second):
            raise SystemExit(f"{page} needs the marks {begin} and {end}")
        page.write_text(f"{before}{begin}\n{section(found)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
