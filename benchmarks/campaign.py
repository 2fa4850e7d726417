"""The table of docs/robustness.md: what was disturbed, how often, and what was found."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]
WIDTH = 24
"""Characters of the longest bar."""


def campaign(found: Found) -> str:
    """Returns kills by what was going on, and all other disturbances."""
    kills = found["kills"]
    most = max(kills.values())
    full = found["full"]
    titles = ("stage", "kills at a random moment after its start", "", "disks that filled up in it")
    whole = found["checks"] - found["gc_kills"]
    lines = [f"| {' | '.join(titles)} |", "| :--- | ---: | :--- | ---: |"]
    for name in sorted({*kills, *full}, key=lambda each: (-kills.get(each, 0), each)):
        bar = "█" * round(WIDTH * kills.get(name, 0) / most)
        lines.append(f"| {name} | {kills.get(name, 0)} | {bar} | {full.get(name, 0) or ''} |")
    lines.append(f"| **all** | **{sum(kills.values())}** | | **{sum(full.values())}** |")
    said = [
        f"- `gc` killed {found['gc_kills']} times while it removed objects.",
        f"- {found['damaged']} objects damaged between a kill and the next run.",
        f"- Two runs at once: {found['together']}; `gc` was called {found['gc_beside']} times beside them.",
        f"- {found['read_only']} commands on a read-only store.",
        f"- {found['checks']} checks for damaged, lost and leftover files: {whole} after runs, in which every byte was "
        f"compared with an undisturbed run, and {found['gc_kills']} after a killed `gc`. Faults: "
        f"{len(found['faults'])}.",
    ]
    where = (
        f"`{found['command']}`, {found['minutes']:g} minutes on {found['machine']['cores']} cores beside other work."
    )
    where += f" Disks: {found['disk']}."
    stages = "; ".join(f"{each['name']}: {', '.join(each['stages'])}" for each in found["recipes"])
    return "\n".join([*lines, "", *said, "", where, f"Stages: {stages}."])
