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
    lines = ["| killed or full during | kills | | full disks |", "| :--- | ---: | :--- | ---: |"]
    for name in sorted({*kills, *full}, key=lambda each: -kills.get(each, 0)):
        bar = "█" * round(WIDTH * kills.get(name, 0) / most)
        lines.append(f"| {name} | {kills.get(name, 0)} | {bar} | {full.get(name, 0) or ''} |")
    lines.append(f"| **all** | **{sum(kills.values())}** | | **{sum(full.values())}** |")
    said = [
        f"- `gc` killed {found['gc_kills']} times while it removed objects.",
        f"- {found['damaged']} objects damaged between a kill and the next run.",
        f"- {found['together']} times two runs at once, with `gc` called {found['gc_beside']} times beside them.",
        f"- {found['read_only']} commands on a read-only store.",
        f"- {found['checks']} times everything was compared with an undisturbed run: {len(found['faults'])} faults.",
    ]
    where = (
        f"`{found['command']}`, {found['minutes']:g} minutes on {found['machine']['cores']} cores beside other work."
    )
    where += f" Disks: {found['disk']}."
    stages = "; ".join(f"{each['name']}: {', '.join(each['stages'])}" for each in found["recipes"])
    return "\n".join([*lines, "", *said, "", where, f"Stages: {stages}."])
