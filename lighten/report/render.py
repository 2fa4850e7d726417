"""Write the report of a version: report.md, report.html and plots/."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lighten.errors import Failure, RequestError
from lighten.report import calibration, facts, numbers
from lighten.report.allocation import allocations, draw_allocation
from lighten.report.drawing import inline
from lighten.report.headline import headline
from lighten.report.learning import draw_lessons, lessons
from lighten.report.markdown import markdown
from lighten.report.matrix import LEGEND, mark, matrix
from lighten.report.pareto import pareto
from lighten.report.plots import draw, plots
from lighten.report.results import Free, Results, Variant
from lighten.report.roofs import LEGEND as ROOFS
from lighten.report.roofs import draw_roofs, lines, price, roofs
from lighten.report.table import first_line, table
from lighten.report.terminal import terminal
from lighten.store import write_file

__all__ = ["html", "markdown", "pareto", "terminal", "write_report"]


def write_report(results: Results, directory: Path) -> list[Path]:
    """Writes report.md, report.html and plots/ into a directory (made if need be) and returns their paths.

    Without matplotlib the report is complete but for the plots, and says how to get them.

    Raises:
        Failure: the directory cannot be written to.
    """
    drawings: dict[str, tuple[bytes, bytes]] = {}
    obstacle = ""
    try:
        drawings = {plot.stem: draw(plot) for plot in plots(results)}
        drawings |= {each.stem: draw_allocation(each) for each in allocations(results)}
        drawings |= {each.stem: draw_lessons(each) for each in lessons(results)}
        drawings |= {each.stem: draw_roofs(each) for each in filter(None, [roofs(results)])}
    except RequestError as error:
        obstacle = str(error)
    written = {
        "report.md": markdown(results).encode(),
        "report.html": html(results, {stem: svg for stem, (svg, _) in drawings.items()}, obstacle).encode(),
    }
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


def html(results: Results, svgs: Mapping[str, bytes], obstacle: str = "") -> str:
    """Returns report.html with the drawn plots inside; `obstacle` says why there are none, if that is so."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
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
    template = environment.from_string((files("lighten.report") / "template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        results=results,
        headline=headline(results),
        table=table(results),
        plots=[(plot, inline(svgs[plot.stem], plot.stem)) for plot in plots(results) if plot.stem in svgs],
        grids=[(each, inline(svgs[each.stem], each.stem)) for each in allocations(results) if each.stem in svgs],
        lessons=[(each, inline(svgs[each.stem], each.stem)) for each in lessons(results) if each.stem in svgs],
        roofs=[(each, inline(svgs[each.stem], each.stem)) for each in [roofs(results)] if each and each.stem in svgs],
        roof_lines=lines(results),
        roofs_legend=ROOFS,
        price=price,
        matrix=matrix(results),
        mark=mark,
        loads_legend=LEGEND,
        amount=calibration.amount,
        shared=calibration.shared,
        obstacle=obstacle,
        protocols=facts.protocols(results),
        changes={variant.name: _changes(variant) for variant in results.variants},
        dash=numbers.NOT_MEASURED,
    )


def _changes(variant: Variant) -> dict[str, str]:
    """Returns the change of each task's acc_norm (acc where there is none), its interval, and what was won and lost."""
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
