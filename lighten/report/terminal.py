"""The last table of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from lighten.report.cell import Cell, Column
from lighten.report.headline import Headline, headline
from lighten.report.matrix import Matrix, mark, matrix
from lighten.report.roofs import lines, prices
from lighten.report.serving import load_lines
from lighten.report.table import Table, first_line, table
from lighten.results.results import Results

GAP = 2


def terminal(results: Results) -> RenderableType:
    """Returns the comparison and the headline. When printed, it keeps the columns that fit, most important first."""
    tried = matrix(results)
    remarks = (*lines(results), *prices(results), *load_lines(results), *_lacking(results))
    return _Comparison(table(results), headline(results), tried.used() if tried else None, remarks)


def _lacking(results: Results) -> Iterator[str]:
    """Yields what was asked for and could not be measured, and why."""
    for variant in results.measured:
        for each in variant.unavailable:
            yield f"{variant.name}: {each.measurement} is not available: {each.reason}"


@dataclass(frozen=True)
class _Comparison:
    """The comparison, which chooses its columns by the width of the console."""

    table: Table
    headline: Headline
    tried: Matrix | None
    remarks: tuple[str, ...] = ()
    """Remarks on roofline, cost and load, and on what could not be measured."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if any(row.cells for row in self.table.rows):
            yield self._grid(options.max_width)
        for row in self.table.rows:
            if not row.cells:
                yield Text.assemble((f"{row.variant.name}  ", "red"), (f"failed: {first_line(row.reason)}", "red"))
        for note in self.table.notes:
            yield Text(note, style="yellow")
        if self.tried:
            yield from _loads(self.tried, options.max_width)
        for remark in self.remarks:
            yield Text(remark)
        yield Text("\n" + self.headline.sentence, style="bold")
        for line in (self.headline.reason, *self.headline.others):
            yield Text(line, style="dim")

    def _grid(self, width: int) -> RichTable:
        places, full = self._fit(width)
        grid = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
        for column in (self.table.columns[i] for i in places):
            heading = Text(f"{column.title}\n{column.unit}" if column.unit else column.title, style="dim")
            grid.add_column(heading, justify="right" if column.better else "left", no_wrap=True)
        for row in self.table.rows:
            if row.cells:
                grid.add_row(*(self._text(i, row.cells[i], full) for i in places), style="dim" if row.baseline else "")
        return grid

    def _text(self, i: int, cell: Cell, full: bool) -> Text:
        column = self.table.columns[i]
        picked = column.name == "variant" and cell.text == self.headline.pick
        return Text(_shown(column, cell, full), style="bold" if picked else "green" if cell.best else "")

    def _fit(self, width: int) -> tuple[list[int], bool]:
        """Returns the columns that fit, and whether the details of every cell fit."""
        every = range(len(self.table.columns))
        if sum(self._width(i, True) + GAP for i in every) - GAP <= width:
            return list(every), True
        kept: list[int] = []
        left = width + GAP
        for i in sorted(every, key=lambda i: self.table.columns[i].rank):
            needed = self._width(i, False) + GAP
            if needed <= left or not kept:
                left -= needed
                kept.append(i)
        return sorted(kept), False

    def _width(self, i: int, full: bool) -> int:
        column = self.table.columns[i]
        shown = [_shown(column, row.cells[i], full) for row in self.table.rows if row.cells]
        return max(cell_len(text) for text in (column.title, column.unit, *shown))


def _loads(tried: Matrix, width: int) -> Iterator[RenderableType]:
    """Yields where the variants load: a grid, or a line for each variant if the grid is too wide."""
    yield Text("\nWhere it loads", style="bold")
    cells = [[name, *map(mark, loads)] for name, loads in tried.rows]
    heads = ["", *(name for name, _ in tried.loaders)], ["", *(version for _, version in tried.loaders)]
    columns = range(len(heads[0]))
    if sum(max(cell_len(row[at]) for row in (*heads, *cells)) + GAP for at in columns) - GAP <= width:
        grid = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
        for name, version in zip(*heads, strict=True):
            grid.add_column(Text(f"{name}\n{version}", style="dim"), no_wrap=True)
        for row in cells:
            grid.add_row(*(Text(text, style="red" if text.startswith("✗") else "") for text in row))
        yield grid
    else:
        for name, loads in tried.rows:
            yield Text(
                f"{name}: " + ", ".join(f"{each.loader} {mark(each)}" for each in loads if each.status != "other")
            )
    for remark in tried.remarks:
        yield Text(remark, style="dim")


def _shown(column: Column, cell: Cell, full: bool) -> str:
    """Returns a cell's text. If space is short, only the change in perplexity keeps its interval."""
    return cell.line if full or column.name.startswith("change") else cell.text
