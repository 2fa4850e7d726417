"""What the keys of measurements are made of: a store that was filled before holds good."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lighten.compare.side import of_model
from lighten.evaluate.loaders import survey
from lighten.evaluate.machine import measuring_packages, this_machine
from lighten.evaluate.settings import Evaluate
from lighten.model.source import find
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse
from lighten.pipeline.stage import Stage
from lighten.pipeline.watcher import Silent
from lighten.store.artifact import read_artifact
from lighten.store.files import stage_key
from lighten.store.store import Store

EVALUATE = {
    "perplexity": [
        {"length": 64},
        {"protocol": "gptq", "length": 128, "within": 0.05},
        {"protocol": "llama.cpp", "samples": 3},
        {"protocol": "lm-eval", "samples": 4},
    ],
    "accuracy": [
        {"task": "builtin"},
        {"task": "mine", "local": "tasks.jsonl", "limit": 2},
        {"task": "hellaswag", "local": "tasks.jsonl", "within": 0.2},
        {"task": "task.yaml", "limit": 2},
    ],
    "speed": {"prompt": [32, 64], "generate": 8, "attention": "sdpa", "options": {"other*": {"cache": "static"}}},
    "load": {"rate": 2, "requests": 3},
    "speculative": {"draft": "q8", "tokens": 3},
    "loaders": True,
}
TASKS = [
    {"ctx": f"A question {n}?", "activity_label": "Asking", "endings": ["yes", "no"], "label": 0} for n in range(4)
]
TASK = """task: task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: endings
doc_to_target: label
"""


PINNED = json.loads((Path(__file__).parent / "measurement_keys.json").read_text())
"""Of every measurement its parents, what its key is made of, and its estimate.

Made before measurements had files of their own. A changed line means that a store measures again.
"""


def resolved(stage: Stage, names: dict[str, str]) -> list[Any]:
    """Returns what is pinned of a stage, after checking what differs from machine to machine."""
    config = dict(stage.config)
    packages = survey.packages() if stage.measure == "loaders" else measuring_packages()
    assert config.pop("packages") == packages
    if "machine" in config:
        assert config["machine"] == this_machine()
        config["machine"] = True
    if "lm_eval" in config:
        assert config["lm_eval"] == version("lm_eval")
        config["lm_eval"] = True
    assert stage.key == stage_key("measure", 1, stage.config, [parent.key for parent in stage.parents])
    return [[names.get(parent.key, parent.name) for parent in stage.parents], config, asdict(stage.estimate)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, TASKS)))
    Path("task.yaml").write_text(TASK)


@pytest.mark.usefixtures("tasks")
def test_keys_of_a_recipe_that_measures_everything(tiny: Callable[..., Path]) -> None:
    pytest.importorskip("lm_eval")
    student = {"distill": {"student": str(tiny()), "length": 32}}
    value = {
        "name": "r",
        "model": str(tiny(hidden_size=128, intermediate_size=128)),
        "variants": {"q8": [{"export": {"format": "gguf", "type": "Q8_0"}}], "other": [student]},
        "evaluate": EVALUATE,
    }
    todo = make_plan(parse(value))
    names = {stage.key: name for name, stage in todo.artifacts.items()}
    found = [[stage.name, *resolved(stage, names)] for stage in todo.stages if stage.measure]
    assert found == PINNED["recipe"]


@pytest.mark.usefixtures("warm_timings")
def test_keys_of_models_that_are_compared(tiny: Callable[..., Path], tmp_path: Path) -> None:
    evaluate = Evaluate.model_validate(
        {
            "perplexity": {"protocol": "lm-eval", "samples": 2},
            "accuracy": {"task": "builtin", "limit": 2},
            "speed": {"prompt": 4, "generate": 3, "repeats": 2},
        }
    )
    store = Store(tmp_path)
    with ExitStack() as kept:
        of_model(str(tiny()), evaluate, None, store=store, device="cpu", watcher=Silent(), kept=kept)
        manifests = [read_artifact(path).manifest for path in store.objects.glob("[0-9a-f]*")]
    found = {}
    identity = find(str(tiny())).identity
    for manifest in manifests:
        config = dict(manifest["config"])
        key = stage_key("measure-model", 1, {**config, "device": "cpu"}, [identity, identity])
        assert manifest["key"] == key
        assert config.pop("packages") == measuring_packages()
        if "machine" in config:
            assert config["machine"] == this_machine()
            config["machine"] = True
        found[config["measure"]] = config
    assert found == PINNED["compare"]
