"""What was found in a model, as tables for a person."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table

WIDTH = 60
"""Letters of a reason or a list of names before it is cut."""


def show(found: dict[str, Any]) -> Group:
    """Returns the tables of what `inspection.inspect` found."""
    head = f"{found['model']}: {found['architecture']}, {found['params']:,} weights, {found['layers']} layers"
    if found["form"] == "gguf":
        return Group(head, "", _types(found), "", _source(found))
    parts: list[Any] = [head, "", _kinds(found), "", _parts(found)]
    if experts := found["experts"]:
        count = f"{experts['count']} experts" if experts["count"] else "experts"
        parts += ["", f"{count} in {len(experts['layers'])} layers: {percent(experts['share'])} of the weights"]
    parts += ["", _quantized(found["quantized"]) if found["quantized"] else _methods(found["methods"])]
    return Group(*parts, "", found["shared_inputs"])


def percent(share: float) -> str:
    """Returns a share as per cent, with digits where it is small or nearly everything."""
    text = f"{share:.1%}" if share in (0.0, 1.0) or 0.001 <= share < 0.9995 else f"{share:.3%}"
    return text.replace(".0%", "%") if share in (0.0, 1.0) else text


def runs(numbers: Iterable[int]) -> str:
    """Returns numbers of layers, neighbours together: "0–3, 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    steps = {other[0] - one[0] for one, other in itertools.pairwise(found)}
    if len(found) > 2 and len(steps) == 1 and all(first == last for first, last in found):
        return f"every {ordinal(steps.pop())} from {found[0][0]} to {found[-1][0]}"
    return cut(", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found))


def ordinal(number: int) -> str:
    """Returns "2nd", "3rd", "4th"."""
    return f"{number}{ {2: 'nd', 3: 'rd'}.get(number, 'th') }"


def cut(text: str, width: int = WIDTH) -> str:
    """Returns a text, shortened where it is long."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _table(*titles: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return table


def _kinds(found: dict[str, Any]) -> Table:
    table = _table("Kind of layer", "Layers", "Weights of one", "Linears", right=("Weights of one",))
    for kind in found["kinds"]:
        linears = Counter(f"{each['shape'][0]} x {each['shape'][1]}" for each in kind["linears"])
        shapes = ", ".join(f"{count} of {shape}" for shape, count in linears.most_common(4))
        more = f", {len(linears) - 4} other shapes" if len(linears) > 4 else ""
        table.add_row(kind["class"], runs(kind["layers"]), f"{kind['params_of_one']:,}", f"{shapes}{more}" or "none")
    return table


def _parts(found: dict[str, Any]) -> Table:
    table = _table("Weights", "Tensors", "Share", "For example", right=("Tensors", "Share"))
    for part in found["parts"]:
        what = {"linears": "linears of layers", "experts": "matrices of experts"}.get(part["what"])
        why = what or f"stay: {part['why']}"
        table.add_row(why, f"{part['tensors']:,}", percent(part["share"]), part["examples"][0])
    return table


def _methods(found: list[dict[str, Any]]) -> Table:
    """Returns a row for methods that cover the same."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in found:
        group = method.get("group_size")
        left = "; ".join(f"{count} linears: {why}" for why, count in method.get("left", {}).items())
        why = method.get("refused") or left
        key = (f" (group size {group})" if group else "", percent(method["covers"]), why)
        rows.setdefault(key, []).append(f"{method['step']} {method['method']}")
    table = _table("Methods", "Cover", "Leave alone", right=("Cover",))
    for (group, covers, why), names in rows.items():
        steps: dict[str, list[str]] = {}
        for name in names:
            step, _, short = name.partition(" ")
            steps.setdefault(step, []).append(short)
        table.add_row("; ".join(f"{step} {', '.join(each)}" for step, each in steps.items()) + group, covers, why)
    return table


def _quantized(found: dict[str, Any]) -> str:
    told = ", ".join(f"{name} {found[name]}" for name in ("bits", "group_size", "format", "sym") if name in found)
    size = f"{found['bytes'] / 1e6:,.1f} MB"
    return (
        f"quantized already ({found['format']}{', ' + told if told else ''}): {found['linears']} linears, "
        f"{percent(found['covers'])} of the weights, in {size}; {found['advice']}"
    )


def _types(found: dict[str, Any]) -> Table:
    table = _table(
        "Type", "Tensors", "Weights", "MB", "Bits", "For example", right=("Tensors", "Weights", "MB", "Bits")
    )
    for kind in found["types"]:
        bits = 8 * kind["bytes"] / kind["params"] if kind["params"] else 0.0
        numbers = (f"{kind['tensors']}", f"{kind['params']:,}", f"{kind['bytes'] / 1e6:,.1f}", f"{bits:.2f}")
        table.add_row(kind["type"], *numbers, kind["examples"][0])
    return table


def _source(found: dict[str, Any]) -> str:
    experts = f"{found['experts']} experts in a layer. " if found["experts"] else ""
    if found["source"]:
        return f"{experts}The file can be a source: every step turns it into a directory first, and methods take that."
    return f"{experts}The file can be measured, but is no source for methods: {found['refused']}"
