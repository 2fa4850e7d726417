"""The rooms of the package, the floors they are on, and the picture of what imports what: `make map` writes it.

The picture leaves out an arrow that others imply: where `cli` knows `pipeline` and `pipeline` knows `store`, the arrow
from `cli` to `store` is not drawn. `tests/test_house.py` holds the code to the floors, and the picture to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent / "lighten"
PICTURE = HERE / "architecture.svg"
FLOORS = (
    ("errors", "settings", "facts", "screen"),
    ("data", "numerics", "plugins", "store"),
    ("step", "results"),
    ("process",),
    ("model",),
    ("observe",),
    ("compress", "evaluate", "export", "report"),
    ("pipeline",),
    ("compare", "doctor"),
    ("recommend",),
    ("cli",),
)
"""From the ground up; a room knows rooms of lower floors only, and so no other of its own."""
WIDTH, HEIGHT, ACROSS, DOWN = 110, 34, 150, 74
"""Pixels: a room, and the distance between the middles of two."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "recipes":
            found[".".join((root.name, *parts)).removesuffix(".__init__")] = path
    return found


def imports(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Returns the modules of the package that each of them imports, wherever in the file."""
    arrows = {}
    for module, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    child = f"{node.module}.{name.name}"
                    found.add(child if child in known else node.module)
            elif isinstance(node, ast.Import):
                found.update(name.name for name in node.names)
        arrows[module] = (found & set(known)) - {module}
    return arrows


def room(module: str) -> str:
    """Returns the room that a module lies in, "" for the package itself."""
    return [*module.split("."), ""][1]


def rooms(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns the rooms that each room knows."""
    found: dict[str, set[str]] = {name: set() for floor in FLOORS for name in floor}
    for module, others in arrows.items():
        for other in others:
            here, there = room(module), room(other)
            if here != there and here in found and there in found:
                found[here].add(there)
    return found


def reach(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns what each node leads to, over any number of arrows."""
    reached = {node: set(ends) for node, ends in arrows.items()}
    for middle in reached:
        for ends in reached.values():
            if middle in ends:
                ends |= reached[middle]
    return reached


def circles(arrows: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Returns the nodes that lead back to themselves, each together with those on its way."""
    reached = reach(arrows)
    back = {node: tuple(sorted(end for end in ends if node in reached.get(end, ()))) for node, ends in reached.items()}
    return sorted({circle for circle in back.values() if circle})


def needed(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns the arrows that no others imply; the graph has no circle."""
    reached = reach(arrows)
    return {
        node: {end for end in ends if not any(end in reached[other] for other in ends if other != end)}
        for node, ends in arrows.items()
    }


def draw(known: Mapping[str, set[str]]) -> str:
    """Returns the rooms as an SVG picture, the ground floor at the bottom."""
    wide = max(map(len, FLOORS)) * ACROSS
    high = len(FLOORS) * DOWN
    place = {}
    for number, floor in enumerate(FLOORS):
        for at, name in enumerate(floor):
            place[name] = ((at + 0.5) * wide / len(floor), high - (number + 0.5) * DOWN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
        ' font-family="sans-serif" font-size="13">',
        "<title>Rooms of lighten: an arrow means that the upper one imports the lower one</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
    ]
    for name, ends in needed(known).items():
        for end in sorted(ends):
            (x, y), (to_x, to_y) = place[name], place[end]
            begin, finish = y + HEIGHT / 2, to_y - HEIGHT / 2
            bend = (finish - begin) / 2
            lines.append(
                f'<path d="M{x:g} {begin:g} C{x:g} {begin + bend:g} {to_x:g} {finish - bend:g} {to_x:g} {finish:g}"'
                ' fill="none" stroke="#667" marker-end="url(#head)"/>'
            )
    for name, (x, y) in place.items():
        lines.append(
            f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef"'
            ' stroke="#446"/>'
        )
        lines.append(f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle" fill="#112">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Writes the picture, and says how many rooms, floors and arrows there are."""
    arrows = imports(modules())
    known = rooms(arrows)
    PICTURE.write_text(draw(known), encoding="utf-8")
    count = sum(map(len, known.values()))
    print(f"{len(known)} rooms on {len(FLOORS)} floors, {count} arrows, {len(circles(arrows))} circles: {PICTURE}")


if __name__ == "__main__":
    main()
