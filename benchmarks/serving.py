"""The tables of speed for docs/benchmarks.md; `tables.py` puts them there."""

from __future__ import annotations

from typing import Any

from tables import made, rows

from lighten.report.numbers import NOT_MEASURED, byte_count, fixed, ratio, significant
from lighten.report.table import first_line

Found = dict[str, Any]
PERCENTILES = ("p50", "p95", "p99")
WAITS = ("ttft_ms", "token_ms")
WAITED = ("first token p50/p95/p99", "between tokens p50/p95/p99")


def ladder(found: Found) -> str:
    """Returns the measured ladder with the published one beside it."""
    published = {each["rung"]: each for each in found["published"]["rows"]}
    first = next((row["decode_tok_s"] for row in found["rows"] if row["name"] == "baseline"), None)
    theirs_first = published["baseline"]["decode_tok_s"]
    lines, failed = [], []
    for row in found["rows"]:
        theirs = published.get(found["stands_for"].get(row["name"], row["name"]))
        beside = [NOT_MEASURED] * 3
        if theirs:
            memory = NOT_MEASURED if theirs["memory_gb"] is None else f"{theirs['memory_gb']} GB"
            speed = f"{theirs['decode_tok_s']:g} ({ratio(theirs['decode_tok_s'] / theirs_first)})"
            beside = [theirs["name"], memory, speed]
        if row["status"] == "failed":
            failed.append(f"- {row['name']}: {first_line(row['error'])}")
        speed = significant(row["decode_tok_s"], 3) if row["decode_tok_s"] else NOT_MEASURED
        speed += f" ({ratio(row['decode_tok_s'] / first)})" if row["decode_tok_s"] and first else ""
        sizes = [byte_count(row[key]) if row[key] else NOT_MEASURED for key in ("size_bytes", "peak_bytes")]
        quality = significant(row["perplexity"], 4) if row["perplexity"] else NOT_MEASURED
        roof = row.get("roofline")
        share = f"{fixed(100 * roof['share'], 0)} %, {roof['bound']}" if roof else NOT_MEASURED
        lines.append([", ".join(filter(None, (row["name"], _how(row)))), *sizes, speed, share, quality, *beside])
    titles = (
        "Rung",
        "Size",
        "Peak memory",
        "Decode, tok/s",
        "Of the roof",
        "Perplexity",
        "Published rung",
        "memory",
        "tok/s",
    )
    parts = [rows(titles, lines), *(["\n".join(failed)] if failed else [])]
    parts += [f"Published: {found['published']['source']}. × is the multiple of the first rung.", made(found)]
    return "\n\n".join(parts)


def _how(row: Found) -> str:
    if not row["attention"]:
        return row["runtime"] or ""
    extra = [] if row["compile"] == "off" else [f"compiled ({row['compile']})"]
    extra += [] if row["cache"] == "dynamic" else [f"{row['cache']} cache"]
    return ", ".join([row["attention"], *extra])


def repeat(found: Found) -> str:
    """Returns how far two measurements of the same speed are apart."""
    lines = [
        [
            each["name"],
            *(significant(value, 3) for value in each["decode_tok_s"]),
            f"{fixed(100 * each['apart'], 1)} %",
            ", ".join(f"{fixed(100 * spread, 0)} %" for spread in each["spread"]),
        ]
        for each in found["rows"]
    ]
    titles = ("Artifact", "First, tok/s", "Second, tok/s", "Apart", "Spread of the repeats")
    limit = f"{fixed(100 * found['limit'], 0)} %"
    beyond = [each["name"] for each in found["rows"] if each["apart"] > found["limit"]]
    verdict = f"More than {limit} apart: {', '.join(beyond)}." if beyond else f"None is more than {limit} apart."
    return f"{rows(titles, lines)}\n\n{verdict}\n\n{made(found)}"


def served(found: Found) -> str:
    """Returns how artifacts serve requests that keep arriving, with a draft, under the roof and for what price."""
    loads, roofs, parts = [], [], []
    for row in found["rows"]:
        for each in row["load"]:
            waits = ("/".join(significant(each[key][share], 3) for share in PERCENTILES) for key in WAITS)
            counted = f"{each['completed']} of {each['requests']}"
            rate = f"{each['rate']:g}"
            loads.append([row["name"], each["server"], rate, counted, significant(each["throughput_tok_s"], 3), *waits])
        if place := row["roofline"]:
            price = row["cost"]["per_million_tokens"]
            reached = [significant(place[key], 3) for key in ("intensity", "gb_s", "gflop_s")]
            share = f"{fixed(100 * place['share'], 0)} % ({place['bound']})"
            roofs.append([row["name"], *reached, share, *(significant(price[key], 2) for key in ("prefill", "decode"))])
        if draft := row["speculative"]:
            differing = "none differs" if draft["identical"] else f"{len(draft['parted'])} differ"
            parts.append(
                f"With {draft['draft']} as its draft, {draft['tokens']} tokens at a time, {row['name']} "
                f"({draft['dtype']}) keeps {fixed(100 * draft['acceptance'], 0)} % of them. It writes "
                f"{significant(draft['decode_tok_s'], 3)} tok/s instead of {significant(draft['plain_tok_s'], 3)} "
                f"({ratio(draft['speedup'])}). Of {draft['texts']} texts, {differing} from what it writes alone."
            )
    titles = ("Artifact", "Server", "Requests/s", "Completed", "Tok/s", *(f"{each}, ms" for each in WAITED))
    hour = next((row["cost"] for row in found["rows"] if row["cost"]), None)
    paid = f", {hour['currency']} at {hour['price_per_hour']:g} an hour" if hour else ""
    heads = ("Artifact", "Operations a byte", "GB/s", "GFLOP/s", "Of the roof", "A million read", f"written{paid}")
    return "\n\n".join([rows(titles, loads), *parts, rows(heads, roofs), made(found)])


def vllm(found: Found) -> str:
    """Returns every format beside itself in vLLM, its kernels, many clients, and what a killed server leaves."""
    settings, by_name = found["settings"], {row["name"]: row for row in found["rows"]}
    lines = []
    for name, row in by_name.items():
        if name.endswith("-vllm"):
            continue
        there = by_name[f"{name}-vllm"]
        right = [[_right(each, norm) for norm in ("acc", "acc_norm")] for each in (row, there)]
        told = (there["facts"] or {}).get("server") or {}
        kernels = ", ".join(dict.fromkeys(f"`{each.split()[0]}`" for each in told.get("kernels") or []))
        cells = [
            " → ".join(
                significant(each["perplexity"]["value"], 4) if each["perplexity"] else "–" for each in (row, there)
            ),
            " → ".join(each[0] for each in right),
            " → ".join(each[1] for each in right),
            kernels or NOT_MEASURED,
        ]
        if there["status"] != "ok":
            cells[-1] = first_line(there["error"]).partition("-vllm: ")[2]
        lines.append([f"`{name}`", *cells])
    titles = ("Variant", "Perplexity", "Questions right", "by length", "Kernels of vLLM")
    load = []
    for row in found["load"]:
        for each in row["load"] or []:
            waits = ["/".join(fixed(each[wait][p], 0) for p in PERCENTILES) for wait in WAITS]
            done = f"{each['completed']} of {each['requests']}"
            load.append(
                [f"`{row['name']}`", f"{each['concurrency']:g}", done, fixed(each["throughput_tok_s"], 1), *waits]
            )
    waited = [f"{title}, ms" for title in WAITED]
    killed = next(row for row in found["killed"] if row["name"] == "gptq-vllm")
    others = ", ".join(f"`{row['name']}` {row['status']}" for row in found["killed"] if row is not killed)
    parts = [
        rows(titles, lines),
        f"{settings['model']}: from transformers on this side to vLLM, of {settings['tasks']} questions of HellaSwag.",
        rows(("Variant", "Users", "Requests", "Tokens/s", *waited), load),
        f"A server killed while it answered: `{killed['name']}` {killed['status']}, “{first_line(killed['error'])}”; "
        f"{others}.",
        made(found),
    ]
    return "\n\n".join(parts)


def _right(row: Found, metric: str) -> str:
    score = (row["accuracy"] or [{}])[0]
    return NOT_MEASURED if score.get(metric) is None else str(round(score[metric] * score["n"]))
