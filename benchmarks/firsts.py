"""The tables of the time to the first report, the memory of parity, and the engine; `tables.py` puts them there."""

from __future__ import annotations

from typing import Any

from tables import made, rows, significant

from lighten.report.numbers import NOT_MEASURED, byte_count

Found = dict[str, Any]


def from_nothing(found: Found) -> str:
    """Returns seconds of installation and run, on a still machine and beside one busy core."""
    titles = ("`make demo`, from a fresh clone", "Installation", "Run", "Together", "Peak of the run")
    names = {"still": "the machine otherwise still", "busy": "beside one busy core"}
    lines = []
    for name, row in found["rows"].items():
        install, run = row["install"]["seconds"], row["run"]["seconds"]
        seconds = [f"{each:.0f} s" for each in (install, run, install + run)]
        lines.append([names[name], *seconds, byte_count(row["run"]["peak_bytes"])])
    return f"{rows(titles, lines)}\n\n{made(found)}"


def parity(found: Found) -> str:
    """Returns the peak memory of the check of each export."""
    titles = ("Export", "Size", "Peak memory of parity", "Same likeliest token, %")
    lines = [
        [
            name,
            byte_count(row["bytes"]),
            byte_count(row["peak_bytes"]),
            significant(100 * row["top1"], 3),
        ]
        for name, row in found["rows"].items()
    ]
    return f"{rows(titles, lines)}\n\n{made(found)}"


def engine(found: Found) -> str:
    """Returns seconds and memory of commands and stages at an older commit and now, and which outputs are equal."""
    costs = [f"{part}, {when}" for part in ("Wall", "CPU", "Peak") for when in ("before", "now")]
    titles = ["Command or stage", *costs]
    before, now = found["rows"]["before"], found["rows"]["now"]
    lines = []
    for name in before:
        cells = [name if name in found["rounds"]["now"][0]["stages"] else f"`lighten quantize`, {name}"]
        for part, show in (("seconds", "{:.1f} s"), ("cpu_seconds", "{:.1f} s"), ("peak_bytes", None)):
            for row in (before[name], now[name]):
                known = part in row
                cells.append((show.format(row[part]) if show else byte_count(row[part])) if known else NOT_MEASURED)
        lines.append(cells)
    equal = ", ".join(name for name, same in found["equal"].items() if same) or "none"
    differ = ", ".join(name for name, same in found["equal"].items() if not same)
    told = f"Equal byte by byte: {equal}." + (f" Not: {differ}." if differ else "")
    return f"{rows(titles, lines)}\n\n{told}\n\n{made(found)}"
