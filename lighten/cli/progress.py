"""The display while a recipe runs: a bar with the time left, and one line per finished stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lighten import screen
from lighten.pipeline.stage import Plan, Stage
from lighten.step import Report, silent

INTERRUPTED = 130


def duration(seconds: float) -> str:
    """Returns a duration as "12 s", "3 min 05 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bars:
    """Draws a run on standard error: bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._bars.start()
        self._overall: Any = None
        self._current: Any = None
        self._predicted: dict[str, float] = {}

    def close(self) -> None:
        """Removes the bars from the screen."""
        if self._bars:
            self._bars.stop()

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """Shows the bar of the whole run."""
        self._predicted = predicted
        if self._bars and self._overall is not None:
            self._bars.remove_task(self._overall)
        if self._bars:
            self._overall = self._bars.add_task("all stages", total=sum(predicted.values()), note="")

    def started(self, stage: Stage) -> Report:
        """Shows the bar of a stage, and what the person should know of it."""
        for remark in stage.remarks:
            self.say(f"! {stage.name}: {remark}")
        if not self._bars:
            known = self._predicted.get(stage.key)
            self.say(f"{stage.name} …" + ("" if known is None else f" (about {duration(known)})"))
        return self.follow(stage.name)

    def follow(self, name: str) -> Report:
        """Shows a bar, and returns the function that moves it."""
        if not self._bars:
            return silent
        self._current = self._bars.add_task(screen.visible(name), total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            if self._bars:
                self._bars.update(self._current, completed=done, total=total, note=screen.visible(note))

        return report

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """Replaces the bar of a stage by one line."""
        if self._bars and self._current is not None:
            self._bars.remove_task(self._current)
            self._current = None
        if self._bars and self._overall is not None:
            self._bars.advance(self._overall, self._predicted.get(stage.key, 0))
        if error:
            self.say(f"✗ {stage.name}: {error}")
        elif seconds is not None:
            self.say(f"✓ {stage.name}: {duration(seconds)}")

    def say(self, message: str) -> None:
        """Prints one line above the bars."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def watching(*, quiet: bool) -> Iterator[Bars]:
    """Yields a watcher for a run; with `quiet` it prints nothing."""
    bars = Bars(screen.console(stderr=True, quiet=quiet))
    try:
        yield bars
    except KeyboardInterrupt:
        bars.close()
        bars.say("lighten: interrupted: finished stages are kept; the same command goes on from them")
        raise SystemExit(INTERRUPTED) from None
    finally:
        bars.close()


def plan_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Returns the stages of a plan as a table, with totals of the stages that are not cached."""
    todo = [row for row in rows if not row["cached"]]
    table = Table(title=f"{name}: {len(rows)} stages, {len(rows) - len(todo)} cached", box=None, show_footer=True)
    table.add_column("stage", footer="to do")
    table.add_column("for")
    table.add_column("cached")
    table.add_column("time", justify="right", footer=duration(sum(row["seconds"] for row in todo)))
    peak = max((row["peak_bytes"] for row in todo), default=0)
    table.add_column("peak memory", justify="right", footer=f"{peak / 1e6:,.0f} MB")
    table.add_column("disk", justify="right", footer=f"{sum(row['disk_bytes'] for row in todo) / 1e6:,.1f} MB")
    table.add_column("key")
    for row in rows:
        used = ", ".join(row["variants"][:3]) + (" …" if len(row["variants"]) > 3 else "")
        table.add_row(
            row["name"],
            used,
            "yes" if row["cached"] else "",
            duration(row["seconds"]),
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['disk_bytes'] / 1e6:,.1f} MB",
            row["key"][:8],
        )
    return table
