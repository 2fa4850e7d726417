"""report.md: the report in a form that can be pasted into a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lighten.report import sections, whole_texts
from lighten.report.allocation import allocations
from lighten.report.calibration import amount, shared
from lighten.report.facts import kept, pairs, protocols, sentence
from lighten.report.headline import headline
from lighten.report.learning import lessons
from lighten.report.matrix import LEGEND, Matrix, mark, matrix
from lighten.report.numbers import NOT_MEASURED, byte_count, duration
from lighten.report.part import Grid, Part
from lighten.report.table import Table, first_line, table
from lighten.results.results import Cost, Results, StageCost, Variant


def markdown(results: Results, earlier: Sequence[Results] = ()) -> str:
    """Returns the report in GitHub's Markdown; `earlier` are the versions before it, oldest first."""
    answer, comparison = headline(results), table(results)
    parts = [
        f"## {escape(results.title)}: {escape(results.source.model)}",
        f"**{escape(answer.sentence)}** {escape(answer.reason)}",
        *(escape(line) for line in answer.others),
        markdown_table(comparison),
        *(f"**{escape(note)}**" for note in comparison.notes),
        _legend(comparison),
    ]
    if results.warnings:
        parts += ["### Warnings", _bullets(results.warnings)]
    noted = [f"{variant.name}: {note}" for variant in results.variants for note in variant.notes]
    if noted:
        parts += ["### Notes", _bullets(noted)]
    left = [f"{variant.name}: {line}" for variant in results.variants if (line := _kept(variant))]
    if left:
        parts += ["### Left alone", _bullets(left)]
    given = [f"{each.variant}: {'; '.join(storage.line for storage in each.types)}" for each in allocations(results)]
    if given:
        parts += ["### Bits by tensor", _bullets(given)]
    learned = [f"{', '.join(each.variants)}: {each.sentence}" for each in lessons(results)]
    if learned:
        parts += ["### Training", _bullets(learned)]
    parts += [part_text(part) for part in sections.parts(results, earlier)]
    if tried := matrix(results):
        parts += ["### Where it loads", _matrix(tried), LEGEND]
        parts += [_bullets(list(tried.remarks))] if tried.remarks else []
    if results.calibration:
        lines = [amount(results.calibration), *map(shared, results.calibration.overlap)]
        parts += ["### Calibration", _bullets(lines)]
    measured = [f"Perplexity by {name}: {sentence(items)}" for name, items in protocols(results)]
    measured += [said] if not measured and (said := whole_texts.instead(results)) else []
    if measured:
        parts += ["### Protocol", _bullets(measured)]
    if results.machine:
        parts += ["### Machine", escape(sentence(pairs(results.machine)))]
    if results.stages:
        parts += ["### Predicted and actual", _stages(results.stages)]
    if results.recipe_yaml:
        parts += ["<details><summary>Recipe</summary>", fence(results.recipe_yaml), "</details>"]
    return "\n\n".join(parts) + f"\n\n<sub>Made by lighten, {escape(results.created)}.</sub>\n"


def markdown_table(comparison: Table) -> str:
    """Returns the comparison. The best values are bold. A failed variant is a row with its reason."""
    columns = comparison.columns
    lines = [
        _row([escape(f"{column.title}, {column.unit}" if column.unit else column.title) for column in columns]),
        _row(["---:" if column.better else ":---" for column in columns]),
    ]
    for row in comparison.rows:
        if row.cells:
            texts = [escape(cell.line) for cell in row.cells]
            lines.append(_row([f"**{t}**" if c.best else t for t, c in zip(texts, row.cells, strict=True)]))
        else:
            reason = [f"failed: {escape(first_line(row.reason))}"] if len(columns) > 1 else []
            cells = [escape(row.variant.name), *reason]
            lines.append(_row(cells + [""] * (len(columns) - len(cells))))
    return "\n".join(lines)


def escape(text: str) -> str:
    """Returns text that Markdown shows unchanged: it makes no table cells, tags, links or emphasis."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|#~]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", text)


def code(text: str) -> str:
    """Returns text as code inside a line. The fence is longer than any in the text."""
    text = " ".join(text.split())
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * (longest + 1)
    return f"{mark} {text} {mark}" if longest else f"`{text}`"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _kept(variant: Variant) -> str:
    return "; ".join(f"{names} ({why})" if why else names for names, why in kept(variant.facts))


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {escape(item)}" for item in items)


def _legend(comparison: Table) -> str:
    lines = [f"- {escape(column.title)}: {escape(column.about)}" for column in comparison.columns[1:]]
    lines.append(f"- {NOT_MEASURED} is not measured; bold is the best of the variants.")
    if comparison.missing:
        lines.append(f"- Not measured for any variant: {escape(', '.join(comparison.missing))}.")
    return "\n".join(["<details><summary>How to read it</summary>", "", *lines, "", "</details>"])


def part_text(part: Part) -> str:
    """Returns a section that a module added. Its pictures are in plots/."""
    said = [f"### {escape(part.title)}", *([escape(part.intro)] if part.intro else [])]
    for grid in part.grids:
        said += [f"**{escape(grid.caption)}**"] if grid.caption else []
        said.append(grid_table(grid))
    said += [f"![{escape(each.title)}](plots/{each.stem}.png)" for each in part.pictures]
    return "\n\n".join(said + ([_bullets(list(part.notes))] if part.notes else []))


def grid_table(grid: Grid) -> str:
    """Returns a grid of text as a table."""
    ruler = [":---" if i < grid.text else "---:" for i in range(len(grid.heads))]
    lines = [_row([escape(head) for head in grid.heads]), _row(ruler)]
    return "\n".join(lines + [_row([escape(cell) for cell in row]) for row in grid.rows])


def _matrix(tried: Matrix) -> str:
    heads = [escape(f"{name} {version}".strip()) for name, version in tried.loaders]
    lines = [_row(["Variant", *heads]), _row([":---"] * (1 + len(heads)))]
    return "\n".join(lines + [_row([escape(name), *map(mark, loads)]) for name, loads in tried.rows])


def _stages(stages: list[StageCost]) -> str:
    lines = [_row(["Stage", "Predicted", "Actual"]), _row([":---", ":---", ":---"])]
    for stage in stages:
        actual = cost_line(stage.actual) + (" (cached)" if stage.cached else "")
        lines.append(_row([escape(stage.name), cost_line(stage.predicted), actual]))
    return "\n".join(lines)


def cost_line(cost: Cost | None) -> str:
    """Returns "78 s, 1.2 GB memory, 105 MB disk", without the unknown parts."""
    if cost is None:
        return NOT_MEASURED
    parts = [] if cost.seconds is None else [duration(cost.seconds)]
    parts += [] if cost.peak_bytes is None else [f"{byte_count(cost.peak_bytes)} memory"]
    parts += [] if cost.disk_bytes is None else [f"{byte_count(cost.disk_bytes)} disk"]
    return ", ".join(parts) or NOT_MEASURED


def fence(code: str) -> str:
    """Returns a code block whose fence is longer than any in the code."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{code.rstrip()}\n{fence}"
