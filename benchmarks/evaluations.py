"""The tables of measurements for docs/benchmarks.md; `tables.py` puts them there."""

from __future__ import annotations

from typing import Any

from tables import made, rows

from lighten.report.numbers import NOT_MEASURED, byte_count, duration, fixed, significant

Found = dict[str, Any]


def harness(found: Found) -> str:
    """Returns HellaSwag by lighten beside lm-eval."""
    agreed = {each["name"]: each for each in found["agreement"]}
    lines = []
    for row in found["rows"]:
        same = agreed.get(row["name"])
        agreements = ["", ""]
        if same:
            agreements = [_same(same, name) for name in ("acc", "acc_norm")]
        shares = [f"{fixed(100 * row[name], 2)} %" for name in ("acc", "acc_norm")]
        spent = [duration(row["seconds"]), f"{row['share_of_lm_eval']:.2f}×", byte_count(row["peak_bytes"])]
        lines.append([row["name"], *spent, *shares, *agreements])
    titles = ("Scorer", "Wall time", "of lm-eval's", "Peak memory", "acc", "acc_norm", "acc: same ending", "acc_norm")
    settings = found["settings"]
    pairs = "; ".join(f"{each['name']} with {each['with']}" for each in found["agreement"])
    caption = (
        f"{settings['model']}, {settings['n']:,} tasks of HellaSwag, {settings['dtype']} everywhere. lm-eval "
        f"{settings['lm_eval']['lm_eval']} runs its `hf` model; times are multiples of its fastest time. The last two "
        f"columns compare task by task: {pairs}. A tie is a choice between endings that are less than "
        f"{settings['tie_nats']} nats apart."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"


def scorers(found: Found) -> str:
    """Returns the short table of the README: the same tasks by lighten on each runtime, and by lm-eval."""
    agreed = {each["name"]: each for each in found["agreement"]}
    lines = []
    for row in found["rows"]:
        same = f"{agreed[row['name']]['acc_norm']['same_result']:,}" if row["name"] in agreed else ""
        cells = [duration(row["seconds"]), byte_count(row["peak_bytes"]), f"{fixed(100 * row['acc_norm'], 2)} %", same]
        lines.append([row["name"], *cells])
    titles = ("Scorer", "Wall time", "Peak memory", "acc_norm", "the same answers")
    caption = (
        f"SmolLM2-135M, {found['settings']['n']:,} tasks of HellaSwag in {found['settings']['dtype']}. lm-eval "
        f"{found['settings']['lm_eval']['lm_eval']} runs its `hf` model. The last column compares torch with lm-eval, "
        "and llama.cpp and onnxruntime with torch: [benchmarks](docs/benchmarks.md#hellaswag-beside-lm-eval)."
    )
    return f"{rows(titles, lines)}\n\n{caption}"


def _same(agreed: Found, name: str) -> str:
    found = agreed[name]
    ties = f", {found['ties']} ties" if found["ties"] else ""
    return f"{found['same_choice']:,} of {agreed['of']:,}{ties}"


def protocols(found: Found) -> str:
    """Returns perplexities by every protocol, and by llama.cpp's own tool."""
    lines = []
    for row in found["rows"]:
        by, own = row["protocols"], row["llama_perplexity"]
        gap = f"{100 * (by['llama.cpp']['value'] / own - 1):+.3f} %" if own else NOT_MEASURED
        values = [significant(by[name]["value"], 5) for name in ("lighten", "gptq", "llama.cpp")]
        its = f"{own:.4f}" if own else NOT_MEASURED
        levels = by["lm-eval"]["levels"]
        lines.append([row["name"], *values, its, gap, significant(levels["word"], 5), significant(levels["byte"], 4)])
    titles = (
        "Artifact",
        "lighten",
        "gptq",
        "llama.cpp",
        "by llama-perplexity",
        "gap",
        "lm-eval, by word",
        "lm-eval, by byte",
    )
    settings = found["settings"]
    caption = (
        f"{settings['model']} on {settings['test']}: {settings['samples']} chunks, of 512 tokens by lighten's and "
        f"llama.cpp's protocol and of 2,048 tokens by gptq's. lm-eval's protocol takes {settings['documents']} "
        f"articles. llama-perplexity is that of llama-cpp-python {found['llama_cpp_python']}. Numbers can be compared "
        "within one column only."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{made(found)}"
