"""A measurement of an installed package: how many different tokens a model writes."""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lighten
from lighten.errors import RequestError
from lighten.evaluate.measurement import MEASUREMENTS
from lighten.evaluate.settings import Evaluate
from lighten.pipeline.recipe import Recipe, parse

SETTINGS = """
from pydantic import Field

from lighten.evaluate.measurement import Measurement


class Variety(Measurement):
    name = "variety"
    work = "lighten_variety_work:measure"
    needs = frozenset({"decodes"})

    tokens: int = Field(8, ge=1)

    def add(self, row, result):
        row.setdefault("facts", {})["variety"] = result["different"]
"""
WORK = """
import numpy as np

from lighten.evaluate.request_model import facts, for_quality


def measure(request, report):
    runtime = for_quality(request)
    decoding = runtime.decode([5, 6, 7], request.settings.tokens)
    logits, seen = next(decoding), set()
    for _ in range(request.settings.tokens - 1):
        seen.add(int(np.argmax(logits)))
        logits = decoding.send(int(np.argmax(logits)))
    return {"different": len(seen | {int(np.argmax(logits))})} | facts(runtime)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    packages = tmp_path / "packages"
    declared = packages / "lighten_variety-1.0.dist-info"
    declared.mkdir(parents=True)
    (packages / "lighten_variety.py").write_text(textwrap.dedent(SETTINGS))
    (packages / "lighten_variety_work.py").write_text(textwrap.dedent(WORK))
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: lighten-variety\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text("[lighten.measurements]\nvariety = lighten_variety:Variety\n")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ["PYTHONPATH"]]))
    MEASUREMENTS.__dict__.pop("declared", None)
    yield
    MEASUREMENTS.__dict__.pop("declared", None)
    for name in ("lighten_variety", "lighten_variety_work"):
        sys.modules.pop(name, None)


def recipe(model: Path, **evaluate: object) -> Recipe:
    return parse({"name": "r", "model": str(model), "variants": {"baseline": []}, "evaluate": evaluate})


def test_a_measurement_that_was_added_is_asked_for_in_a_recipe(tiny: Callable[..., Path], tmp_path: Path) -> None:
    asked = recipe(tiny(), variety={"tokens": 4})
    assert "  variety:\n    tokens: 4\n" in asked.dump()
    again = Evaluate(**asked.evaluate.model_dump(mode="json"))
    assert again == asked.evaluate and [each.name for each in again.asked] == ["variety"]
    folder = lighten.run(asked, artifacts=tmp_path / "kept", device="cpu")
    results = json.loads((folder / "results.json").read_text())
    (row,) = results["variants"]
    assert row["status"] == "ok", row["error"]
    assert 1 <= row["facts"]["variety"] <= 4
    assert [each["kind"] for each in results["stages"]] == ["source", "variety"]
    assert lighten.run(asked, artifacts=tmp_path / "kept", device="cpu") == folder


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"variety": {"tokens": 0}}, "recipe: evaluate.variety.tokens: must be greater than or equal to 1, not 0"),
        ({"variety": {"tokns": 3}}, "recipe: evaluate.variety.tokns: unknown key; did you mean 'tokens'?"),
        ({"vrtxy": {}}, "recipe: evaluate.vrtxy: unknown key; known are perplexity, accuracy, speed,"),
    ],
)
def test_its_settings_are_checked_like_ours(tiny: Callable[..., Path], evaluate: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipe(tiny(), **evaluate)
    assert words in str(caught.value)
