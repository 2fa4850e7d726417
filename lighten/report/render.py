"""Writes the report of a version: report.md, report.html, plots/ and the model cards."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lighten.errors import Failure, RequestError
from lighten.report import calibration, facts, numbers, whole_texts
from lighten.report.allocation import allocations, draw_allocation
from lighten.report.card import CARD, cards
from lighten.report.csv_table import csv_table
from lighten.report.drawing import inline
from lighten.report.headline import headline
from lighten.report.learning import draw_lessons, lessons
from lighten.report.markdown import markdown, markdown_table
from lighten.report.matrix import LEGEND, mark, matrix
from lighten.report.pareto import pareto
from lighten.report.plots import draw, plots
from lighten.report.points import figures, lively
from lighten.report.roofs import price
from lighten.report.sections import parts
from lighten.report.table import first_line, table
from lighten.report.terminal import terminal
from lighten.results.measured import Free
from lighten.results.results import Results, Variant
from lighten.store.store import write_file

__all__ = ["csv_table", "html", "markdown", "page", "pareto", "terminal", "write_report"]


def write_report(results: Results, directory: Path, earlier: Sequence[Results] = ()) -> list[Path]:
    """Writes report.md, report.html, plots/ and cards/ into a directory (made if need be) and returns their paths.

    `earlier` are the versions before it, oldest first, for the history. Without matplotlib the report is complete but
    for the plots, and says how to get them.

    Raises:
        Failure: the directory cannot be written to.
    """
    drawings, obstacle = _drawings(results, earlier)
    svgs = {stem: svg for stem, (svg, _) in drawings.items()}
    written = {
        "report.md": markdown(results, earlier).encode(),
        "report.html": html(results, svgs, obstacle, earlier).encode(),
    }
    written |= {f"cards/{name}/{CARD}": text.encode() for name, text in cards(results, directory).items()}
    for stem, (svg, png) in drawings.items():
        written[f"plots/{stem}.svg"] = svg
        written[f"plots/{stem}.png"] = png
    try:
        for name, content in written.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(directory / name, content)
    except OSError as error:
        raise Failure(f"cannot write the report to {directory}: {error.strerror}") from error
    return [directory / name for name in written]


def page(results: Results, earlier: Sequence[Results] = ()) -> str:
    """Returns report.html, with its plots if matplotlib is installed."""
    drawings, obstacle = _drawings(results, earlier)
    return html(results, {stem: svg for stem, (svg, _) in drawings.items()}, obstacle, earlier)


def _drawings(results: Results, earlier: Sequence[Results]) -> tuple[dict[str, tuple[bytes, bytes]], str]:
    """Returns every picture as SVG and PNG by stem; without matplotlib, none and how to get them."""
    try:
        drawings = {plot.stem: draw(plot) for plot in plots(results)}
        drawings |= {each.stem: draw_allocation(each) for each in allocations(results)}
        drawings |= {each.stem: draw_lessons(each) for each in lessons(results)}
        drawings |= {each.stem: each.draw() for part in parts(results, earlier) for each in part.pictures}
    except RequestError as error:
        return {}, str(error)
    return drawings, ""


def html(results: Results, svgs: Mapping[str, bytes], obstacle: str = "", earlier: Sequence[Results] = ()) -> str:
    """Returns report.html with the drawn plots inside. `obstacle` says why there are none."""
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        pairs=facts.pairs,
        settings=facts.settings,
        kept=facts.kept,
        byte_count=numbers.byte_count,
        duration=numbers.duration,
        first_line=first_line,
        flow=_flow,
        share=numbers.share,
        sig=numbers.significant,
    )
    environment.globals["dash"] = numbers.NOT_MEASURED
    comparison = table(results)
    figures_by_name = figures(comparison)
    drawn = {stem: inline(svg, stem) for stem, svg in svgs.items()}
    return environment.get_template("template.html.j2").render(
        style=Markup(_read("page.css")),
        script=Markup(_read("page.js")),
        results=results,
        headline=headline(results),
        table=comparison,
        downloads=_downloads(results),
        drawn=drawn,
        plots=[
            (plot, lively(drawn[plot.stem], [point.name for point in plot.points], figures_by_name))
            for plot in plots(results)
            if plot.stem in drawn
        ],
        grids=[each for each in allocations(results) if each.stem in drawn],
        lessons=[each for each in lessons(results) if each.stem in drawn],
        parts=parts(results, earlier),
        price=price,
        matrix=matrix(results),
        mark=mark,
        loads_legend=LEGEND,
        amount=calibration.amount,
        shared=calibration.shared,
        obstacle=obstacle,
        protocols=facts.protocols(results),
        instead=whole_texts.instead(results),
        spent=sum(stage.actual.seconds or 0.0 for stage in results.stages if stage.actual),
        changes={variant.name: _changes(variant) for variant in results.variants},
    )


def _read(name: str) -> str:
    """Returns the text of one of the page's files."""
    return (files("lighten.report") / name).read_text(encoding="utf-8")


def _downloads(results: Results) -> list[tuple[str, str, Markup]]:
    """Returns label, file name and data URL of each download. The page needs no script for them."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", results.title) or "results"
    made = [
        ("CSV", f"{stem}.csv", "text/csv", csv_table(results)),
        ("Markdown", f"{stem}.md", "text/markdown", markdown_table(table(results)) + "\n"),
    ]
    return [
        (label, name, Markup(f"data:{media_type};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"))
        for label, name, media_type, text in made
    ]


def _changes(variant: Variant) -> dict[str, str]:
    """Returns the change of each task's acc_norm (acc if there is none), its interval, gained and lost tasks."""
    found = {}
    for delta in variant.delta.accuracy if variant.delta else []:
        norm = delta.acc_norm is not None
        value, interval = (delta.acc_norm, delta.acc_norm_ci95) if norm else (delta.acc, delta.acc_ci95)
        parts = [] if value is None else [" ".join(numbers.change(value, interval, least=1)).strip()]
        if delta.gained is not None and delta.lost is not None:
            parts.append(f"gained {delta.gained}, lost {delta.lost}")
        found[delta.task] = "; ".join(parts)
    return found


def _flow(step: Free) -> Markup:
    """Returns a step as one line of YAML, escaped."""
    line = yaml.safe_dump(step, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return Markup.escape(line.strip())
