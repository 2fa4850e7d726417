"""Tables of what ran on a GPU, from the results of gpu.py."""

from __future__ import annotations

from typing import Any

from tables import NOT_MEASURED, duration, made, rows, significant

NAMES = {
    "baseline": "source",
    "gptq": "GPTQ, 4 bits, group 64",
    "awq": "AWQ, group 64",
    "w8a8": "SmoothQuant W8A8",
    "sparse": "SparseGPT 2:4",
    "distil": "10 % of the MLP pruned, 12 steps of distillation",
}


def equal(found: dict[str, Any]) -> str:
    """Returns the perplexity of what each device made, and how far the two are apart."""
    part = found["equal"]
    lines = []
    for name, gap in part["gaps"].items():
        scores = [part[device]["variants"][name]["perplexity"] for device in ("cpu", "cuda")]
        shown = [significant(score, 5) if score else NOT_MEASURED for score in scores]
        lines.append([NAMES[name], *shown, NOT_MEASURED if gap is None else f"{100 * gap:.2f} %"])
    table = rows(("Made of SmolLM2-135M", "by the CPU", f"by the {found['device']}", "apart"), lines)
    caption = "Perplexity of the built-in text in float32. Each artifact is measured on the device that made it."
    return f"{table}\n\n{caption}\n\n{made(found)}"


def whole(found: dict[str, Any]) -> str:
    """Returns the seconds of every stage of GPTQ in the shape of Llama 3.1 8B."""
    part = found["gptq"]
    lines = [[what, duration(stage["seconds"])] for what, stage in part["stages"].items()]
    lines.append(["the whole command, with copies and checksums", duration(part["seconds"])])
    table = rows(("Stage", "Time"), lines)
    caption = (
        f"The first {part['layers']} of 32 layers of a random model in the shape of Llama 3.1 8B, 4 bits, group 128, "
        f"{part['tokens']:,} tokens. The files are in memory (tmpfs); {found['device']}. The whole model: "
        f"{NOT_MEASURED}."
    )
    return f"{table}\n\n{caption}"


def decode(found: dict[str, Any]) -> str:
    """Returns decoding by format against the bandwidth of the card."""
    if "decode" not in found:
        return "Decoding by format on a GPU: not measured."
    lines = []
    for name, row in found["decode"]["formats"].items():
        speed = (row.get("speed") or [{}])[0]
        roof = row.get("roofline") or {}
        share = roof.get("share")
        joules = (row.get("energy") or {}).get("joules_per_token")
        lines.append(
            [
                name,
                significant(speed["decode_tok_s"], 3) if speed.get("decode_tok_s") else NOT_MEASURED,
                f"{100 * share:.0f} %" if share else NOT_MEASURED,
                significant(joules, 3) if joules else NOT_MEASURED,
            ]
        )
    return rows(("Format", "Decode, tok/s", "of the roof", "J/token"), lines)
