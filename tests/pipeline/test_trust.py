"""Trust comes from the command line or as an argument, and never out of a file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.compare import compare as comparing
from lighten.compare import side
from lighten.compare.operand import Version, variant_of
from lighten.compare.side import of_variant
from lighten.doctor.diagnose import diagnose
from lighten.errors import Failure, LightenError, RequestError
from lighten.pipeline import run as pipeline
from lighten.pipeline import trust, verbs
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import Recipe, parse
from lighten.pipeline.stage import Plan, trusted
from lighten.pipeline.watcher import Silent
from lighten.process.isolate import Outcome
from lighten.recommend import published
from lighten.results.results import Results
from lighten.store.artifact import Artifact
from tests.command import lighten as command_line
from tests.report.sample import results

CODE = """import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def own_code(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose config names a module beside it; `ran` appears beside the directory when that is imported."""
    folder = shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def recipe(model: object, **more: object) -> Recipe:
    return parse({"name": "r", "model": str(model), "variants": {"baseline": []}, **more})


def test_a_recipe_cannot_grant_trust_to_itself(own_code: Path, tmp_path: Path) -> None:
    asking = recipe(own_code, trust_remote_code=True)
    for function in (pipeline.plan, lighten.run, diagnose):
        with pytest.raises(RequestError, match=r"asks to run the Python code .*--trust-remote-code"):
            function(asking)
    with pytest.raises(RequestError, match="--trust-remote-code"):  # and the model is not even looked for
        pipeline.plan(recipe("nobody/nothing", trust_remote_code=True))
    assert not (tmp_path / "ran").exists()
    todo = pipeline.plan(asking, trust_remote_code=True)
    assert trusted(todo.artifacts["baseline"])
    assert asking.dump().splitlines()[3] == "trust_remote_code: true"


def test_trust_that_no_recipe_asks_for_is_refused(own_code: Path) -> None:
    with pytest.raises(RequestError, match=r"does not say whose code it needs: add the line `trust_remote_code: "):
        pipeline.plan(recipe(own_code), trust_remote_code=True)


def test_trust_is_for_the_models_that_are_named(own_code: Path, tiny: Callable[..., Path]) -> None:
    steps = {"variants": {"small": [{"distill": {"teacher": str(tiny()), "length": 32}}]}}
    with pytest.raises(RequestError, match=r"'a/b', which is no model of this recipe"):
        recipe(own_code, trust_remote_code="a/b", **steps)
    one = recipe(own_code, trust_remote_code=True, **steps)
    assert one.trusted == [str(own_code)]
    with pytest.raises(RequestError, match=r"opens .* beside a model whose own code may run: name both"):
        pipeline.plan(one, trust_remote_code=True)
    both = recipe(own_code, trust_remote_code=[str(own_code), str(tiny())], **steps)
    todo = pipeline.plan(both, trust_remote_code=True)
    assert trusted(todo.artifacts["small"])
    untrusted = pipeline.plan(recipe(own_code, **steps))
    assert not any(trusted(stage) for stage in untrusted.stages)


MODELING = """import inspect, pathlib
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
if any("lighten/evaluate/" in frame.filename for frame in inspect.stack()):
    pathlib.Path({mark!r}).write_text("ran")
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
QUICK = {"perplexity": {"length": 16, "samples": 1}}


@pytest.fixture
def own_kind(own_code: Path, tmp_path: Path) -> Path:
    """A model of a kind that only the code beside it knows; `measured` appears when a measurement imports that."""
    config = json.loads((own_code / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    (own_code / "config.json").write_text(json.dumps(config))
    (own_code / "modeling_own.py").write_text(MODELING.format(mark=str(tmp_path / "measured")))
    return own_code


@pytest.mark.parametrize("command", ["run", "evaluate", "compare"])
def test_trust_on_the_command_line_reaches_the_measurement(
    own_kind: Path, tiny: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    asked = {"name": "r", "model": str(own_kind), "variants": {"baseline": []}, "evaluate": QUICK}
    (tmp_path / "r.yaml").write_text(json.dumps({**asked, "trust_remote_code": True}))
    skip = ("--skip", "accuracy", "--skip", "speed", "--length", 16, "--samples", 1, "--json")
    arguments: dict[str, tuple[object, ...]] = {
        "run": ("run", tmp_path / "r.yaml", "--artifacts", tmp_path / "kept"),
        "evaluate": ("evaluate", own_kind, *skip),
        "compare": ("compare", own_kind, tiny(), "--artifacts", tmp_path / "kept", *skip),
    }
    refused = command_line(*arguments[command], "--device", "cpu")
    assert (refused.returncode, "--trust-remote-code" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "measured").exists()
    done = command_line(*arguments[command], "--device", "cpu", "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measured").exists()


def refuse(*_: object, **__: object) -> None:
    raise Failure("far enough")


def test_a_single_step_trusts_when_told(own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def planned(recipe: Recipe, **more: Any) -> Plan:
        seen.append(recipe.trusted)
        return make_plan(recipe, **more)

    for granted in (False, True):
        monkeypatch.setattr(verbs, "make_plan", planned)
        monkeypatch.setattr(verbs, "builder_of", refuse)
        with pytest.raises(Failure, match="far enough"):
            lighten.quantize(str(own_code), tmp_path / "out", bits=4, trust_remote_code=granted)
    assert seen == [[], [str(own_code)]]


def test_results_of_others_bring_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = results().model_dump(mode="json", by_alias=True)
    told["recipe_yaml"] = told["recipe_yaml"].replace("model:", "trust_remote_code: true\nmodel:")
    changed = Results.model_validate(told)
    made = published.recipe(changed, {"x": [{"quantize": {"bits": 4}}]})
    assert "trust_remote_code" not in made and "calibration:" in made
    version = Version("shared", changed, tmp_path)
    measured = Artifact(tmp_path, {"config": {"length": 64}, "parents": ["a", "b"]})
    one, two = (
        replace(
            of_variant(variant_of(f"shared:{name}", version, name)),
            perplexity=measured,
            tokenizer=tmp_path,
            model=tmp_path,
        )
        for name in ("gptq-int4", "gguf-q8_0")
    )
    payloads: list[dict[str, Any]] = []

    def caught(target: str, payload: dict[str, Any]) -> Outcome:
        payloads.append(payload)
        return Outcome([], 0.0, 0)

    monkeypatch.setattr(comparing, "run_isolated", caught)
    for granted in (False, True):
        comparing._tokens(one, two, 3, "cpu", Silent(), granted)
    assert [payload["trust_remote_code"] for payload in payloads] == [False, True]


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "&a [*a]", "evaluate: 7", "evaluate: {perplexity: 3}", "variants: 3", "2: {}"]
)
def test_a_recipe_inside_results_is_read_with_care(tmp_path: Path, text: str) -> None:
    told = results().model_copy(update={"recipe_yaml": text})
    version = Version("x", told, tmp_path)
    for read in (lambda: published.recipe(told, {}, ["gptq-int4"]), lambda: side.protocol_of(version)):
        try:
            read()
        except LightenError as error:
            assert str(error)


def test_nothing_is_said_of_a_recipe_that_asks_for_nothing() -> None:
    trust.check(recipe("demo:smollm2-135m"), trust_remote_code=False, trust_tasks=False)
