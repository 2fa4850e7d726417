"""Published figures of formats that were not measured here, and the recipe that would measure them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from lighten.errors import RequestError
from lighten.export.bundle.bundle import need_of
from lighten.pipeline.steps import open_step
from lighten.recommend.candidate import Candidate
from lighten.recommend.question import Question
from lighten.recommend.sizes import Sizes
from lighten.report.asked import asked
from lighten.report.claims import BROKEN
from lighten.report.pareto import pareto
from lighten.results.results import Results, Variant

LLAMA_CPP = (
    "llama.cpp, tools/perplexity/README.md, LLaMA 3 8b Scoreboard at revision f364eb6f "
    "(https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md)"
)
LLAMA_3_8B = 6.231636
"""Perplexity that the board's differences start from: 6.233160 of f16, less its difference of 0.001524."""
BOARD = {
    "Q8_0": (0.002650, False),
    "Q6_K": (0.021748, False),
    "Q5_K_M": (0.056974, False),
    "Q5_K_S": (0.104964, False),
    "Q4_K_M": (0.151303, True),
    "Q4_K_S": (0.178064, True),
    "IQ4_NL": (0.223959, True),
    "IQ4_XS": (0.228071, True),
    "Q3_K_L": (0.439590, True),
    "Q3_K_M": (0.502622, True),
    "IQ3_M": (0.666694, True),
    "IQ3_S": (0.733867, True),
    "IQ3_XXS": (1.226803, True),
    "Q2_K": (2.416191, True),
    "IQ2_M": (2.369166, True),
    "IQ2_S": (3.419148, True),
}
"""Rise of perplexity on WikiText-2, and whether an importance matrix (WT 10m) was used, by type."""
AWQ_PAPER = "Lin et al. 2023, AWQ (https://arxiv.org/abs/2306.00978), Table 4, INT4 g128"
LLAMA_2_7B = 5.47
PAPER = {"awq": 5.60, "gptq": 5.69, "rtn": 5.73}
"""Perplexity of Llama-2-7B on WikiText-2, by method: 4 bits, groups of 128, GPTQ without reordering."""


@dataclass(frozen=True)
class Published:
    """A format that was not measured on this model. Its size is arithmetic; its rise is that of another model."""

    name: str
    step: dict[str, dict[str, Any]]
    size_bytes: int
    need: int
    rise: float
    of: str
    """Model and text of the published figure."""
    source: str


def formats(sizes: Sizes, context: int) -> list[Published]:
    """Returns every format with a published figure that such a model can have, with its size for this model.

    If groups of 128 do not divide the model's widths, smaller groups are taken.
    """
    found = []
    for type_, (rise, imatrix) in BOARD.items():
        step = {"export": {"format": "gguf", "type": type_, **({"imatrix": True} if imatrix else {})}}
        found.append((type_.lower(), step, rise / LLAMA_3_8B, "Llama-3-8B on WikiText-2", LLAMA_CPP))
    for method, value in PAPER.items():
        step = {"quantize": {"method": method, "group_size": 64 if sizes.facts.hidden % 128 else 128}}
        found.append((f"{method}-int4", step, value / LLAMA_2_7B - 1, "Llama-2-7B on WikiText-2", AWQ_PAPER))
    made = []
    for name, step, rise, of, source in found:
        if (size := _size(step, sizes)) is None:
            continue
        made.append(Published(name, step, size, need_of(sizes.facts, size, context).total, rise, of, source))
    return made


def _size(step: dict[str, dict[str, Any]], sizes: Sizes) -> int | None:
    """Returns the bytes of such a model after a step; None if the step refuses the model."""
    ((step_name, settings),) = step.items()
    made = open_step(step_name, settings)
    try:
        made.check(sizes.facts)
    except RequestError:
        return None
    return made.predict(sizes.facts, 0).disk_bytes


def better(
    results: Results, question: Question, sizes: Sizes, pick: Candidate | None, most: int = 3
) -> list[Published]:
    """Returns unmeasured formats that, by the published figures, pass and would beat the pick.

    Speed is assumed to follow size, because decoding reads every weight once. These figures have no accuracy, so a
    limit on accuracy removes nothing.
    """
    known = {_type_or_method(row) for row in results.variants}
    edge = question.purpose == "edge" or question.runtime == "llama.cpp"
    worst = BROKEN if question.max_ppl is None else question.max_ppl
    found = []
    for each in formats(sizes, question.context or 2048):
        ((step_name, settings),) = each.step.items()
        if (settings.get("type") or settings.get("method")) in known:
            continue
        if (step_name == "quantize" and edge) or (step_name == "export" and question.runtime == "torch"):
            continue
        if question.runtime not in (None, "torch", "llama.cpp"):
            continue
        if each.rise > worst or (question.room is not None and each.need > question.room):
            continue
        if pick is None or _beats(each, pick, question):
            found.append(each)
    front = [found[at] for at in pareto([(float(each.size_bytes), each.rise) for each in found])]
    return (front if question.prefer != "quality" else front[::-1])[:most]


def _type_or_method(row: Variant) -> str | None:
    """Returns the GGUF type or the 4-bit method of a row."""
    if row.facts.get("bits") in (None, 4):
        name = row.facts.get("type") or row.facts.get("method")
        return str(name) if name else None
    return None


def _beats(each: Published, pick: Candidate, question: Question) -> bool:
    if question.prefer == "quality":
        return pick.rise is not None and each.rise < pick.rise
    return pick.row.size_bytes is not None and each.size_bytes < pick.row.size_bytes


def recipe(results: Results, variants: dict[str, list[dict[str, Any]]], measured: Iterable[str] = ()) -> str:
    """Returns a recipe, as YAML, that measures these variants as the version measured its own.

    Args:
        results: results of the version.
        variants: variants to make.
        measured: measured variants that the recipe has again.
    """
    given = asked(results)
    made = given.get("variants")
    kept = {name: made[name] for name in measured if name in made} if isinstance(made, dict) else {}
    value = {
        "name": f"{results.recipe}-next",
        "model": results.source.model,
        **{key: given[key] for key in ("revision", "calibration") if given.get(key)},
        "variants": {**kept, **variants},
        "evaluate": given.get("evaluate") or {"perplexity": {}, "accuracy": {}, "speed": {}},
    }
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
