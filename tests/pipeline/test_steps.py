"""Settings that were checked once, on their way to the process that uses them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.distill.teacher import Teacher
from lighten.model.source import Source
from lighten.pipeline.recipe import load
from lighten.pipeline.steps import checked, open_step, step_class
from lighten.settings import rebuilt
from lighten.step import Step

ROOT = Path(__file__).parents[2]
METHODS = [
    ("quantize", each["settings"]) for each in json.loads((ROOT / "tests/compress/quantize/keys.json").read_text())
]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *METHODS,
    ("prune", {"what": "mlp", "ratio": 0.2}),
    ("prune", {"what": "layers", "count": 2}),
    ("prune", {"sparsity": 0.5, "method": "wanda", "ignore": ["*.0.mlp.*"]}),
    ("distill", {"length": 32, "quantize": "bits=3,group_size=32"}),
    ("distill", {"movement": {"sparsity": 0.5}, "epochs": 1}),
    (
        "distill",
        {"student": {"layers": 2}, "data": [{"path": "a.jsonl", "share": 0.75}, {"path": "b.txt", "share": 0.25}]},
    ),
    ("polish", {"steps": 20, "lr": 3e-4}),
    ("export", {"format": "gguf", "type": "Q4_K_M", "imatrix": True, "parity": "top1=0.9,perplexity=0.05"}),
    ("export", {"format": "gguf", "budget": "90MB"}),
    ("export", {"format": "onnx", "graph": "plain", "ignore": ["re:.*down_proj"]}),
    ("export", {"format": "bundle", "target": "rpi5"}),
]


def through_the_wall(step: Step) -> Step:
    """What the other process has: what JSON brings it, and nothing else."""
    payload = json.loads(json.dumps(checked(step)))
    return rebuilt(step_class(payload["kind"], payload["settings"]), payload["settings"])


def same(step: Step) -> None:
    found = through_the_wall(step)
    assert type(found) is type(step)
    assert found == step
    assert repr(found) == repr(step), "tuples stay tuples, settings inside settings stay what they are"


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_steps_arrive_as_they_were_checked(kind: str, settings: dict[str, Any]) -> None:
    same(open_step(kind, settings))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*[!u].yaml")), ids=lambda file: file.stem)
def test_so_do_those_of_the_recipes(file: Path) -> None:
    """Those for a GPU are on text that the hub has."""
    recipe = load(str(file))
    for variant in recipe.variants:
        for step in recipe.steps(variant):
            same(step)


def test_so_do_the_stages_that_the_pipeline_adds() -> None:
    mixed = {"data": [{"path": "a.jsonl", "share": 0.75}, {"path": "b.txt", "share": 0.25}], "samples": 4}
    source = {"model": "m", "path": "/m", "format": "directory", "identity": "0", "surplus": ("a", "b")}
    same(Sweep.model_validate({}))
    same(Sweep.model_validate(mixed))
    same(Sensitivities.model_validate({}))
    same(Source.model_validate(source))
    same(Teacher.model_validate({"length": 32}))
