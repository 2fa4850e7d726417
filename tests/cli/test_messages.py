"""What a person is told when something fails: once, in a line, about what they named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.cli import main as cli
from lighten.data.text import read
from lighten.errors import Failure, RequestError, check_names, unexpected
from lighten.model.source import find
from lighten.pipeline.build import Builder
from lighten.pipeline.plan import make_plan
from lighten.pipeline.predict import Predictor
from lighten.pipeline.recipe import parse
from lighten.pipeline.stage import Stage
from lighten.pipeline.watcher import Silent
from lighten.store.store import Store


class Listening(Silent):
    """Remembers the errors that a run told of."""

    def __init__(self) -> None:
        self.errors: list[str | None] = []

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        self.errors.append(error)


def broken(model: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(model, folder / "model"))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
    return copy


def test_a_failure_that_ends_the_run_is_raised_and_not_told_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, heard = broken(tiny(), tmp_path), Listening()
    recipe = parse({"name": "n", "model": str(model), "variants": {"v": [{"prune": {"what": "mlp", "ratio": 0.5}}]}})
    with pytest.raises(Failure) as run:
        lighten.run(recipe, artifacts=tmp_path / "a", watcher=heard)
    assert set(heard.errors) <= {None, "failed"}
    assert "objects" not in str(run.value)


def test_messages_name_the_model_and_the_stage_and_not_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    builder = Builder(store, Predictor(store), "cpu", Silent(), {"id": "org/model"}, False)
    builder.names = {"0" * 64: "org/model", "1" * 64: "quantize gptq"}
    kept, made = store.objects / ("0" * 64), store.objects / f".tmp-{'1' * 64}-ab_12"
    assert builder.in_words(f"{kept}/x: damaged, {made}/y.gguf too") == "org/model/x: damaged, quantize gptq/y.gguf too"
    assert builder.in_words("nothing of it") == "nothing of it"


def refuses(payload: dict[str, Any], report: Any) -> None:
    raise RequestError(f"{payload['out']}/x.json says nothing")


def fails(payload: dict[str, Any], report: Any) -> None:
    raise Failure(f"{payload['out']}/x.json is damaged")


def warns(payload: dict[str, Any], report: Any) -> dict[str, Any]:
    return {"format": "hf", "warnings": [f"{payload['out']}/x.json is odd"]}


class Strange(Builder):
    """Runs a function of these tests in the place of a step."""

    function: Any = None

    def _task(self, stage: Stage, out: Path) -> tuple[str, dict[str, Any]]:
        return f"{__name__}:{self.function.__name__}", {"out": str(out)}


def test_what_a_stage_refuses_and_warns_of_is_told_in_the_person_s_words(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "a")
    (stage,) = make_plan(
        parse({"name": "n", "model": str(tiny()), "variants": {"baseline": []}, "evaluate": {}})
    ).stages
    builder = Strange(store, Predictor(store), "cpu", Silent(), {})
    builder.function = refuses
    with pytest.raises(RequestError) as refused:
        builder.build(stage)
    assert str(refused.value) == f"{tiny()}/x.json says nothing"
    builder.function = fails
    assert builder.build(stage) is None
    assert builder.failed.pop(stage.key) == f"{tiny()}/x.json is damaged"
    builder.function = warns
    made = builder.build(stage)
    assert made and made.manifest["warnings"] == [f"{tiny()}/x.json is odd"]


def test_what_nobody_foresaw_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        lighten.pipeline.recipe.find(3)  # type: ignore[attr-defined]
    except TypeError as error:
        told = unexpected(error)
        assert "\n" not in told
        assert "TypeError: " in told
        assert "(recipe.py, line " in told
        monkeypatch.setenv("LIGHTEN_TRACEBACK", "1")
        assert "Traceback" in unexpected(error)


def test_names_that_are_no_text() -> None:
    check_names(["Wörter", "河流"])
    for asked in (lambda name: check_names([name]), find, lambda name: read(f"{name}.txt", "calibration")):
        with pytest.raises(RequestError, match=r"a\\xff(\.txt)? is not UTF-8"):
            asked("a\udcff")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [{"quantize": {"method": "rtn", "group_size": 32}}, {"quantize": {"method": "rtn", "bits": 8}}],
            "gptq already",
        ),
        (
            [{"quantize": {"method": "rtn", "group_size": 32}}, {"prune": {"what": "mlp", "ratio": 0.5}}],
            "is gptq: prune",
        ),
        ([{"export": {"format": "gguf", "type": "F16"}}, {"quantize": {"method": "rtn"}}], "is gguf already"),
        ([{"export": {"format": "gguf", "type": "F16"}}, {"export": {"format": "gguf"}}], "reads model directories"),
        (
            [{"quantize": {"method": "rtn", "group_size": 32}}, {"export": {"format": "gguf", "imatrix": True}}],
            "measured on an unquantized model, this one is gptq",
        ),
        ([{"quantize": {"method": "nf4"}}, {"export": {"format": "onnx"}}], "this one is bitsandbytes"),
        (
            [{"quantize": {"method": "rtn", "group_size": 32}}, {"export": {"format": "onnx", "precision": "fp32"}}],
            "kept as they are: leave out precision fp32",
        ),
    ],
)
def test_a_plan_refuses_steps_that_cannot_follow_each_other(
    tiny: Callable[..., Path], steps: list[dict[str, Any]], words: str
) -> None:
    recipe = {"name": "n", "model": str(tiny()), "variants": {"v": steps}}
    with pytest.raises(RequestError, match=words):
        make_plan(parse(recipe))


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file"):
        lighten.quantize(str(tmp_path / "no model"), tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="exists already"):
        lighten.quantize(str(tmp_path / "no model"), tmp_path / "out")


def test_a_plan_refuses_options_that_this_machine_has_not_the_means_for(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {"name": "n", "model": str(tiny()), "evaluate": {"speed": {"prompt": [8], "attention": "flash"}}}
    (tmp_path / "n.yaml").write_text(json.dumps({**recipe, "variants": {"v": [{"quantize": {"method": "nf4"}}]}}))
    with pytest.raises(RequestError, match="flash attention runs on an NVIDIA GPU"):
        cli.plan(str(tmp_path / "n.yaml"), device="cpu", artifacts=tmp_path / "a")
