"""Polishing in a recipe and as a command: whose codes are polished, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.compress.polish.settings import Polish
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.pipeline.checks import check_memory
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse
from lighten.pipeline.run import run
from lighten.pipeline.stage import Plan
from lighten.pipeline.verbs import one_step
from lighten.store.artifact import Artifact, find_damage, read_artifact

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CALIBRATION = {"data": "builtin", "samples": 32, "length": 32}
QUICK = {"batch_tokens": 128, "steps": 8, "lr": 3e-3, "validation": 0.2}
GPTQ = {"method": "gptq", "bits": 2, "sym": False, "desc_act": True, "group_size": 32}
AWQ = {"method": "awq", "group_size": 32}
GGUF = {"format": "gguf", "type": "Q4_0", "parity": {"tokens": 256}}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("polish")


@pytest.fixture(scope="module")
def awq(model: Path, work: Path) -> Path:
    one_step("quantize", str(model), work / "awq", AWQ, calibration=CALIBRATION, artifacts=work / "a", device="cpu")
    return work / "awq"


def planned(model: Path, *steps: dict[str, Any]) -> Plan:
    value = {"name": "r", "model": str(model), "calibration": CALIBRATION, "variants": {"v": [*steps]}}
    return make_plan(parse(value))


def polished(directory: Path, out: Path, work: Path) -> Artifact:
    return one_step("polish", str(directory), out, QUICK, calibration=CALIBRATION, artifacts=work / "a", device="cpu")


def test_a_recipe_polishes_what_it_quantized(model: Path, work: Path) -> None:
    value = {
        "name": "r",
        "model": str(model),
        "calibration": CALIBRATION,
        "variants": {"plain": [{"quantize": GPTQ}], "polished": [{"quantize": GPTQ}, {"polish": QUICK}]},
        "evaluate": {},
    }
    folder = run(parse(value), artifacts=work / "a", device="cpu")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    assert rows["plain"]["size_bytes"] * 0.9 < rows["polished"]["size_bytes"] <= rows["plain"]["size_bytes"]
    assert rows["polished"]["format"] == "gptq" and rows["polished"]["facts"]["desc_act"] is True
    told = rows["polished"]["facts"]["polish"]
    assert told["kl_after"] < told["kl_before"] and told["steps"] == 8
    assert rows["polished"]["training"]["validation"][0] == {"step": 0, "kl": told["kl_before"]}
    assert "held-out KL" in (folder / "report.md").read_text()
    one, other = (Checkpoint(folder / "variants" / name) for name in ("plain", "polished"))
    same = [name for name in one.weight_map if torch.equal(one.tensor(name), other.tensor(name))]
    assert {name for name in one.weight_map if name not in same} == {
        name for name in one.weight_map if name.endswith(".scales")
    }


def test_a_directory_of_ours_is_polished_twice_into_the_same_bytes(awq: Path, work: Path) -> None:
    first = polished(awq, work / "one", work)
    assert first.format == "awq" and first.facts["polish"]["kl_after"] < first.facts["polish"]["kl_before"]
    second = polished(awq, work / "two", work / "another store")
    assert (work / "one/model.safetensors").read_bytes() == (work / "two/model.safetensors").read_bytes()
    assert first.key == second.key and find_damage(read_artifact(work / "one")) == []
    with pytest.raises(RequestError, match="not what quantize or export wrote"):
        polished(work / "one", work / "three", work)


def test_a_recipe_polishes_what_it_exported(model: Path, work: Path) -> None:
    value = {
        "name": "g",
        "model": str(model),
        "calibration": CALIBRATION,
        "variants": {"plain": [{"export": GGUF}], "polished": [{"export": GGUF}, {"polish": QUICK}]},
        "evaluate": {},
    }
    folder = run(parse(value), artifacts=work / "a", device="cpu")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    one, other = rows["plain"], rows["polished"]
    assert (one["status"], other["status"], other["error"]) == ("ok", "ok", None)
    assert other["size_bytes"] == one["size_bytes"] and other["format"] == "gguf"
    assert other["facts"]["polish"]["kl_after"] < other["facts"]["polish"]["kl_before"]
    assert other["facts"]["parity"]["kl_mean"] < one["facts"]["parity"]["kl_mean"]  # compared anew, by llama.cpp


def test_a_file_of_ours_is_polished_twice_into_the_same_bytes(model: Path, work: Path, tmp_path: Path) -> None:
    def exported(type: str) -> Path:
        settings = {"format": "gguf", "type": type, "parity": {"tokens": 0}}
        one_step("export", str(model), tmp_path / type, settings, artifacts=work / "a", device="cpu")
        return tmp_path / type / f"model-{type}.gguf"

    file = exported("Q4_0")
    first = polished(file, tmp_path / "one", work)
    assert first.format == "gguf" and first.facts["type"] == "Q4_0" and "parity" not in first.facts
    assert first.facts["polish"]["kl_after"] < first.facts["polish"]["kl_before"]
    second = polished(file.parent, tmp_path / "two", tmp_path)
    one, two = (tmp_path / name / file.name for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes() != file.read_bytes()
    kept = [read_artifact(path) for path in (tmp_path / "a/objects").iterdir()]
    names = {each.manifest["step"]["kind"]: each.manifest["source"]["id"] for each in kept}
    assert (names["file"], names["source"]) == (str(file.parent), str(model))
    assert first.key == second.key and find_damage(read_artifact(tmp_path / "one")) == []
    with pytest.raises(RequestError, match=r"not what quantize or export wrote \(it is of polish"):
        polished(one, tmp_path / "out", work)
    with pytest.raises(RequestError, match="was quantized with F16, which has no scales"):
        polished(exported("F16"), tmp_path / "out", work)
    (tmp_path / "alone").mkdir()
    strange = shutil.copy(file, tmp_path / "alone")
    with pytest.raises(RequestError, match=r"no artifact\.json beside it: nothing says which model"):
        polished(Path(strange), tmp_path / "out", work)
    assert not (tmp_path / "out").exists()


def test_codes_of_others_are_refused(awq: Path, model: Path, work: Path, tmp_path: Path) -> None:
    strange = Path(shutil.copytree(awq, tmp_path / "strange"))
    (strange / "artifact.json").unlink()
    with pytest.raises(RequestError, match="its awq codes are not lighten's"):
        polished(strange, tmp_path / "out", work)
    edited = Path(shutil.copytree(awq, tmp_path / "edited"))
    (edited / "generation_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"not as lighten wrote it .*generation_config"):
        polished(edited, tmp_path / "out", work)
    told = json.loads((awq / "artifact.json").read_text())
    told["source"]["id"] = str(tmp_path / "nowhere")
    told.pop("sha256", None)
    moved = Path(shutil.copytree(awq, tmp_path / "moved"))
    (moved / "artifact.json").write_text(json.dumps(told))
    with pytest.raises(RequestError, match="nowhere: no such model here"):
        polished(moved, tmp_path / "out", work)
    told["source"]["id"] = str(Path(shutil.copytree(model, tmp_path / "other")))
    (tmp_path / "other/generation_config.json").write_text("{}")
    (moved / "artifact.json").write_text(json.dumps(told))
    with pytest.raises(RequestError, match="as it is now: it has changed"):
        polished(moved, tmp_path / "out", work)
    assert not (tmp_path / "out").exists()


def test_what_has_no_codes_is_refused_by_the_plan(model: Path) -> None:
    for steps, said in [
        ([], "not quantized"),
        ([{"prune": {"what": "layers", "count": 1}}], "not quantized"),
        ([{"quantize": {"method": "fp8"}}], "which fp8 has not"),
        ([{"quantize": AWQ}, {"polish": {}}], "polished already"),
        ([{"export": GGUF}, {"polish": {}}], "polished already"),
        ([{"export": {"format": "gguf", "type": "F16"}}], "which gguf of type F16 has not"),
    ]:
        with pytest.raises(RequestError, match=said):
            planned(model, *steps, {"polish": QUICK})


def test_the_source_of_pruned_weights_is_the_pruned_model(model: Path) -> None:
    plan = planned(model, {"prune": {"what": "layers", "count": 1}}, {"quantize": {"group_size": 32}}, {"polish": {}})
    stage = plan.artifacts["v"]
    by = dict(zip(stage.roles, stage.parents, strict=True))
    assert (by["source"].kind, by["teacher"].kind, by["lessons"].kind) == ("quantize", "prune", "teacher")
    assert by["lessons"].step is not None and by["lessons"].step.dump()["samples"] == CALIBRATION["samples"]
    exported = planned(model, {"quantize": AWQ}, {"polish": {}}, {"export": {"format": "gguf", "type": "Q8_0"}})
    assert exported.artifacts["v"].parents[0].kind == "polish"
    codes = planned(model, {"quantize": AWQ}, {"export": {"format": "gguf", "type": "Q4_1"}}, {"polish": {}})
    stage = codes.artifacts["v"]
    by = dict(zip(stage.roles, stage.parents, strict=True))
    assert (by["source"].kind, by["teacher"].kind) == ("export", "source")
    assert stage.shaped.step and stage.shaped.step.runtime == "llama.cpp"  # which serves what is polished
    packed = planned(model, {"export": GGUF}, {"polish": {}}, {"export": {"format": "bundle", "target": "rpi5"}})
    step = packed.artifacts["v"].step
    assert step and step.dump().get("type") is None  # the file is taken as it is


def test_too_large_a_model_is_refused_with_the_memory_that_it_takes(model: Path) -> None:
    plan = planned(model, {"quantize": {"group_size": 32}}, {"polish": {}})
    check_memory(plan)
    large = ModelFacts("LlamaForCausalLM", 126, 16384, 53248, 128, 8, 128, 128256, False)
    estimate = Polish().predict(large, 32768)
    assert estimate.peak_bytes > 1.1e12
    stages = [replace(each, estimate=estimate) if each.kind == "polish" else each for each in plan.stages]
    with pytest.raises(RequestError, match=r"polish needs about 1\d\d\d GB, for it holds the whole model"):
        check_memory(replace(plan, stages=stages))
