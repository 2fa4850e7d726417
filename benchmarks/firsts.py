"""The tables of the time to the first report and of the memory of parity; `tables.py` puts them there."""

from __future__ import annotations

from typing import Any

from tables import made, rows, significant

from lighten.report.numbers import byte_count

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
