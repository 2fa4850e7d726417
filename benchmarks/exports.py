"""The tables of exports for docs/benchmarks.md and docs/edge.md; `tables.py` puts them there."""

from __future__ import annotations

from typing import Any

from tables import METHODS, made, rows, tool_of

from lighten.report.numbers import NOT_MEASURED, byte_count, duration, significant

Found = dict[str, Any]
ONNX = {
    "baseline": "source, transformers",
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "int8",
    "int4": "int4, embedding and head int8",
    "int4-all": "int4, embedding and head too",
    "builder-int4": "int4 by the builder alone",
    "builder-int4-last": "int4 by the builder alone, head int8",
    "gptq": "GPTQ checkpoint, transformers",
    "gptq-onnx": "GPTQ kept, embedding and head int8",
    "gptq-onnx-float": "GPTQ kept, embedding and head float32",
    "gptq-onnx-all": "GPTQ kept, embedding and head int4",
    "builder-gptq": "GPTQ by the builder alone",
}


def onnx(found: Found) -> str:
    """Returns what ONNX export costs, and decoding speed beside the builder's own graphs."""
    by_name = {row["name"]: row for row in found["rows"]}
    speed = found["speed"]["compared"]
    lines = []
    for name, title in ONNX.items():
        row = by_name.get(name)
        if row is None or not row["perplexity"]:
            continue
        against = by_name["gptq" if "gptq" in name else "baseline"]["perplexity"]["value"]
        value = row["perplexity"]["value"]
        change = "" if name in ("baseline", "gptq") else f"{value / against - 1:+.2%}"
        embedding = (row["facts"] or {}).get("embedding_bytes")
        pace = ", ".join(f"{each['ratio']:.2f}× ({ONNX[each['peer']]})" for each in speed if each["name"] == name)
        shown = byte_count(embedding) if embedding else NOT_MEASURED
        lines.append([title, byte_count(row["size_bytes"]), shown, significant(value, 5), change, pace])
    titles = (
        "Graph",
        "Size",
        "Embedding and head",
        "Perplexity",
        "against its source",
        "Decoding, against the builder's",
    )
    settings, turns = found["settings"], found["speed"]["turns"]
    caption = (
        f"{settings['model']}. Perplexity is measured on {settings['test_samples']} × 512 tokens of "
        f"{settings['test']}. GPTQ has 4 bits, group 64, and {settings['samples']} × 512 tokens of "
        f"{settings['calibration']}. Decoding is tokens per second over those of the graph in brackets: the median of "
        f"twice {turns} turns, one after the other."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def gguf(found: Found) -> str:
    """Returns export to GGUF beside llama.cpp's own converter and quantizer."""
    files = {row["name"]: row for row in found["rows"]}
    source = files["source"]["perplexity"]
    spent = found["summary"]
    lines = []
    for name, tool in {"lighten": "lighten", "llama.cpp": "llama.cpp"}.items():
        row = files[name]
        change = f"{row['perplexity'] / source - 1:+.2%}"
        speed = found["speed"]["ours_tok_s" if name == "lighten" else "theirs_tok_s"]
        cost = [duration(spent[name]["seconds"]), byte_count(spent[name]["peak_bytes"])]
        lines.append(
            [tool, *cost, byte_count(row["size_bytes"]), significant(row["perplexity"], 5), change, f"{speed:.0f}"]
        )
    titles = ("Tool", "Time", "Peak memory", "Size", "Perplexity", "against its source", "Tokens/s")
    alone = duration(spent["lighten, not compared"]["seconds"])
    same, settings, turns = found["same_tensors"], found["settings"], found["speed"]["turns"]
    caption = (
        f"{settings['model']} as {settings['type']}. Perplexity is measured on {settings['test_samples']} × 512 tokens "
        f"of {settings['test']}. Time is that of the whole commands. lighten's includes the comparison of the file "
        f"with its source; without it, it is {alone}. {same['type']} of {same['of']} tensors have the same type in "
        f"both files, {same['bytes']} hold the same bytes. lighten's file decodes at {found['speed']['ratio']:.2f}× "
        f"the speed of llama.cpp's (median of twice {turns} turns)."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def gemma(found: Found) -> str:
    """Returns GPTQ beside GPTQModel and Q4_K_M beside llama.cpp's tools, on Gemma 3 270M."""
    lines = []
    for name, model in found["models"].items():
        where = {"as-it-is": "as it is", "off-grid": "off its grid"}[name]
        source = model["source"]
        lines.append([f"source, {where}", "", "", byte_count(source["size_bytes"]), f"{source['perplexity']:.2f}", ""])
        parts = {
            "F16 GGUF": model["k_quants"]["F16"],
            "GPTQ 4 bits by lighten": model["gptq"]["lighten-gptq"],
            "GPTQ 4 bits by GPTQModel": model["gptq"]["gptqmodel-gptq"],
            "Q4_K_M without importance matrix": model["k_quants"]["Q4_K_M, no imatrix"],
            "Q4_K_M by lighten": model["k_quants"]["lighten"],
            "Q4_K_M by llama.cpp": model["k_quants"]["llama.cpp"],
        }
        for title, row in parts.items():
            cost = [duration(row["seconds"]), byte_count(row["peak_bytes"])] if row.get("seconds") else ["", ""]
            kl = significant(row["kl"], 2) if row.get("kl") else NOT_MEASURED
            lines.append([f"{title}, {where}", *cost, byte_count(row["size_bytes"]), f"{row['perplexity']:.2f}", kl])
    titles = ("", "Time", "Peak memory", "Size", "Perplexity", "KL, nats")
    settings, first = found["settings"], next(iter(found["models"].values()))
    caption = (
        f"Calibrated on {settings['samples']} × {settings['length']} tokens, measured on {settings['test_samples']} × "
        f"512 tokens of WikiText-2. Groups of {first['gptq']['settings']['group_size']}. The weights come from a "
        "Q4_K_M file, so as they are they lie on the grid of K-quants; off it, the model would be the same function "
        "with random scales moved between neighbouring matrices. llama.cpp's time is that of `llama-imatrix` and "
        f"`llama-quantize` of an F16 file that is there, from llama-cpp-python {found['llama_cpp_python']}; lighten's "
        f"is that of the whole command, from the source. GPTQModel {first['gptq']['versions']['gptqmodel']}."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def kquants(found: Found) -> str:
    """Returns K-quants rounded again beside llama.cpp's own, with paired changes."""
    lines = []
    for row in found["rows"]:
        ours, theirs, decode = row["ours"], row["theirs"], row.get("decode")
        kl, perplexity = row["kl_change"], row["perplexity_change"]
        source = significant(row["source"]["perplexity"], 4)
        lines.append(
            [
                f"{row['model']} {row['grid']} ({source}; {row['test_samples']}), {row['type']}, {row['way']}",
                byte_count(ours["size_bytes"]),
                significant(row["rounding"]["loss"], 2),
                f"{significant(theirs['kl'], 3)} → {significant(ours['kl'], 3)}",
                _span(kl["absolute"], kl["ci95"], ".4f"),
                f"{theirs['perplexity']:.2f} → {ours['perplexity']:.2f}",
                _span(perplexity["relative"], perplexity["ci95"], ".1%"),
                _decoding(decode) if decode else NOT_MEASURED,
            ]
        )
    titles = (
        "Model (perplexity of the source; chunks of text), type, way",
        "Size",
        "Loss",
        "KL, nats",
        "Change",
        "Perplexity",
        "Change",
        "Decoding",
    )
    settings = found["settings"]
    apart = sorted({abs(row["ours"]["size_bytes"] - row["theirs"]["size_bytes"]) for row in found["rows"]})
    alike = all(row["same"]["type"] == row["same"]["of"] for row in found["rows"])
    caption = (
        "From llama.cpp's own tools with an importance matrix to `rounding: gptq`, by one sweep or with `propagate: "
        "auto`. Both are calibrated on "
        f"{settings['samples']} × {settings['length']} tokens of {settings['calibration']}, and llama.cpp measures "
        f"them on chunks of {settings['length']} tokens of {settings['test']}. In brackets is the "
        "95 % interval of the paired change, with the chunk of text as the unit. The loss is that on the damped H of "
        "what is read, over that of ggml's own rounding. "
        f"{'All tensors have the same types' if alike else 'Not all tensors have the same types'}; "
        f"the files' descriptions differ by {apart[-1]} bytes at most. Decoding is the speed of our file over that of "
        "llama.cpp's; in brackets is that of a copy of llama.cpp's file over the file itself, which only chance makes "
        f"other than one. llama-cpp-python {settings['llama_cpp_python']}."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def low_bits(found: Found) -> str:
    """Returns every quantizer on every model, grid and width."""
    lines = []
    for row in found["rows"]:
        widths = f"{row['bits']} bits, groups of {row['group_size']}"
        source = f" ({significant(row['source'], 4)})" if row["source"] else ""
        tool = f"{tool_of(found, row)}, {METHODS[row['method']]}"
        line = [f"{row['model']} {row['grid']}{source}, {widths}", tool]
        right = row.get("accuracy")
        lines.append(
            [
                *line,
                significant(row["perplexity"], 4) if row.get("perplexity") else NOT_MEASURED,
                significant(row["kl"], 3) if row.get("kl") else NOT_MEASURED,
                f"{row['top1']:.1%}" if row.get("top1") else NOT_MEASURED,
                f"{right['acc_norm']:.1%}" if right else NOT_MEASURED,
                duration(row["seconds"]) if row.get("seconds") else NOT_MEASURED,
                byte_count(row["peak_bytes"]) if row.get("peak_bytes") else NOT_MEASURED,
                byte_count(row["size_bytes"]) if row.get("size_bytes") else row["error"],
            ]
        )
    titles = ("Model (perplexity of the source), widths", "Tool", "Perplexity", "KL, nats", "Same first token")
    titles += ("Questions right", "Time", "Peak memory", "Size")
    settings = found["settings"]
    caption = (
        f"Every tool gets the same {settings['samples']} × {settings['length']} tokens of {settings['calibration']}. "
        f"`lighten evaluate` measures in float32 on {settings['test_samples']} × 512 tokens of {settings['test']}. "
        "A run that shared the machine with other work has no time."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def _decoding(found: Found) -> str:
    """Returns the ratio of two speeds, and that of a file and its own copy if it was taken."""
    copy = found.get("ratio_of_copy")
    return f"{found['ratio']:.2f}×" + (f" ({copy:.2f}×)" if copy else "")


def _span(value: float, ends: list[float], form: str) -> str:
    """Returns a change and its interval."""
    return f"{value:+{form}} [{', '.join(f'{end:+{form}}' for end in ends)}]".replace("-", "−")


def destinations(found: Found) -> str:
    """Returns every destination: where it opens, what it costs against what it was made of, how fast it decodes."""
    by_name = {row["name"]: row for row in found["rows"]}
    lines = []
    for row in found["rows"]:
        name, pace = row["name"], found["decode"].get(row["name"])
        if row["status"] != "ok":
            lines.append([f"`{name}`", row["error"] or row["status"], *[NOT_MEASURED] * 6])
            continue
        of = None if name in ("baseline", "gptq") else by_name["gptq" if name.startswith("gptq-") else "baseline"]
        value, kl = row["perplexity"]["value"], (row["divergence"] or {}).get("kl_mean")
        change = f"{value / of['perplexity']['value'] - 1:+.3%}".replace("-", "−") if of else ""
        besides = [each for each in (pace, found.get("also", {}).get(name)) if each]
        told = [each.get("error") or f"{each['ratio']:.2f}× ({each['tool']})" for each in besides]
        beside = "; ".join(told) or NOT_MEASURED
        cells = [row["runtime"], byte_count(row["size_bytes"]), significant(value, 5), change]
        cells.append(NOT_MEASURED if kl is None else significant(kl, 3))
        cells.append(significant(pace["ours_tok_s"], 3) if pace and "ratio" in pace else NOT_MEASURED)
        lines.append([f"`{name}`", *cells, beside])
    slow = sorted({(each["generate"], name) for name, each in found["decode"].items() if "generate" in each})
    fewer = [f"{count} for `{name}`" for count, name in slow if count < found["settings"]["generate"]]
    titles = ("Variant", "Opens in", "Size", "Perplexity", "Against what it was made of", "KL to the source, nats")
    titles += ("Tokens/s", "Beside the format's own tool")
    settings, protocol = found["settings"], by_name["baseline"]["perplexity"]["protocol"]
    openings = max(each.get("openings", 0) for each in found["decode"].values())
    caption = (
        f"{settings['model']}, the recipe `destinations`. Perplexity is measured on {protocol['chunks']} × "
        f"{protocol['length']} tokens of the built-in text, on the runtime of the row. `gptq-` rows are made of the "
        f"same 4-bit GPTQ weights. Both models decode {', '.join([str(settings['generate']), *fewer])} tokens in turn, "
        f"one sequence, after the same prompt, {settings['turns']} times after each opening; the ratio is the median "
        f"of the turns of all openings, up to {openings}."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def arm64(found: Found) -> str:
    """Returns where the processors agree."""
    lines = []
    for row in found["rows"]:
        plain, parted = row["plain_kernels"], row.get("parts_at")
        close = f"{parted['here']['gap']:.3f} here, {parted['aarch64']['gap']:.3f} there" if parted else ""
        agreed = [f"{plain['same_choice']} of {row['of']}", f"{plain['same_logits']} of {row['of']}"]
        lines.append([f"{row['model']}, {row['prompt']}", *agreed, f"{row['same_choice']} of {row['of']}", close])
    titles = (
        "File, prompt",
        "Plain kernels: tokens",
        "all logits to the last bit",
        "Own kernels: tokens",
        "Gap where they part",
    )
    caption = (
        f"llama-cpp-python {found['llama_cpp_python']}, {found['emulator'].partition(' (')[0]}, {found['processor']}."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


GRAPHS = {"onnx": "fp32", "int8": "lighten, int8", "dynamic": "onnxruntime's `quantize_dynamic`"}


def encoders(found: Found) -> str:
    """Returns an encoder's graphs beside the one that onnxruntime makes of the same fp32 graph."""
    lines = []
    for row in found["rows"]:
        alike = row["similarity"]
        cells = [GRAPHS[row["name"]], byte_count(row["graph_bytes"]), byte_count(row["peak_rss_bytes"])]
        cells += [f"{alike[name]:.4f}" for name in ("mean", "p05", "least")]
        for speed in row["speed"]:
            times = " / ".join(significant(speed["latency_ms"][name], 3) for name in ("p50", "p95", "p99"))
            cells += [f"{significant(speed['sentences_s'], 3)} ({speed['ratio']:.2f}×)", times]
        lines.append(cells)
    titles = ["Graph", "Size", "Peak memory", "Cosine, mean", "5th percentile", "least"]
    for speed in found["rows"][0]["speed"]:
        titles += [f"Sentences/s, batch {speed['batch']}", "p50 / p95 / p99, ms"]
    settings = found["settings"]
    load = settings["load_before"]
    busy = f" The machine had other work (load {load} on {found['machine']['cores']} cores)." if load > 1 else ""
    caption = (
        f"{settings['model']}. The cosine is that of embeddings to the source's, for {settings['samples']} sentences "
        f"of {settings['text']}. Speed is the median of {settings['turns']} turns over {settings['timed']} sentences, "
        "graph after graph; in brackets is the median of the turns' ratios to fp32, which other work disturbs least. A "
        "latency is that of a batch, tokenizer included. The memory is that of a process with "
        f"onnxruntime alone, on 16 texts of 64 tokens.{busy}"
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"
