"""A whole recipe on a tiny random model: caching, sharing, failure of one variant, and kill -9 at any moment."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lighten
from lighten.compress.distill.settings import Distill
from lighten.errors import RequestError
from lighten.evaluate.machine import this_machine
from lighten.model.accelerator import Device
from lighten.pipeline.checks import check_memory
from lighten.pipeline.plan import make_plan
from lighten.pipeline.predict import Predictor, cost_class, nominal_flops
from lighten.pipeline.recipe import parse
from lighten.pipeline.stage import Stage
from lighten.pipeline.verbs import one_step
from lighten.store.artifact import find_damage
from lighten.store.gc import check, collect
from lighten.store.store import Store


def recipe(model: Path, **changes: object) -> dict:
    return {
        "name": "tiny",
        "model": str(model),
        "calibration": {"samples": 4, "length": 32},
        "variants": {
            "int4": [{"quantize": {"bits": 4, "group_size": 32}}],
            "int8": [{"quantize": {"bits": 8, "group_size": 32}}],
            "q8": [{"export": {"format": "gguf", "type": "Q8_0", "imatrix": True}}],
        },
        "evaluate": {
            "perplexity": {"length": 64, "samples": 4},
            "accuracy": {"task": "builtin", "limit": 6},
            "speed": {"prompt": 16, "generate": 4, "repeats": 2},
        },
        **changes,
    }


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


class Listener:
    def __init__(self) -> None:
        self.built: list[str] = []
        self.cached: list[str] = []
        self.failed: list[str] = []

    def planned(self, plan, predicted) -> None:
        pass

    def started(self, stage: Stage):
        return lambda done, total, note: None

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        (self.failed if error else self.cached if seconds is None else self.built).append(stage.name)

    def say(self, message: str) -> None:
        pass


def run(value: dict, folder: Path) -> tuple[Path, Listener, dict]:
    listener = Listener()
    version = lighten.run(parse(value), artifacts=folder, watcher=listener)
    return version, listener, json.loads((version / "results.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of every object that is the same in every run (measured times are not)."""
    store = Store(folder)
    keys = [key for key in store.finished() if store.find(key).format != "measurement"]
    return {
        f"{key}/{path.relative_to(store.objects / key)}": path.read_bytes()
        for key in keys
        for path in sorted((store.objects / key).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(recipe(model), folder)
    return folder


def test_stages_are_shared(model: Path) -> None:
    plan = make_plan(parse(recipe(model)))
    names = [stage.name for stage in plan.stages if not stage.measure]
    assert sorted(names) == ["export Q8_0", "quantize gptq", "quantize gptq", "source", "sweep"]
    sweep = next(stage for stage in plan.stages if stage.kind == "sweep")
    assert sorted(sweep.variants) == ["int4", "int8", "q8"]
    assert len(plan.measurements["int4"]) == 3


def test_results_are_complete(undisturbed: Path) -> None:
    version = undisturbed / "tiny" / "v1"
    results = json.loads((version / "results.json").read_text())
    assert [row["name"] for row in results["variants"]] == ["baseline", "int4", "int8", "q8"]
    for row in results["variants"]:
        assert row["status"] == "ok", row["error"]
        assert row["perplexity"]["tokens"] == 4 * 63
        assert row["accuracy"][0]["n"] == 6
        assert row["speed"][0]["decode_tok_s"] > 0
        assert row["memory"]["peak_rss_bytes"] > 0
        assert (version / row["path"] / "artifact.json").is_file()
        if row["name"] != "baseline":
            assert row["divergence"]["kl_mean"] >= 0
            assert row["delta"]["perplexity"]["ci95"][0] <= row["delta"]["perplexity"]["relative"]
    by_name = {row["name"]: row for row in results["variants"]}
    assert by_name["int8"]["divergence"]["kl_mean"] < by_name["int4"]["divergence"]["kl_mean"]
    assert by_name["q8"]["runtime"] == "llama.cpp"
    assert by_name["q8"]["facts"]["imatrix"] is True
    assert (version / "report.html").stat().st_size > 10_000
    assert (undisturbed / "tiny" / "latest").resolve().name == "v1"


def test_again_makes_nothing_new(model: Path, undisturbed: Path) -> None:
    keys = Store(undisturbed).finished()
    version, listener, _ = run(recipe(model), undisturbed)
    assert (version.name, listener.built) == ("v1", [])
    assert Store(undisturbed).finished() == keys


@pytest.mark.usefixtures("warm_timings")
def test_a_change_runs_that_variant_and_its_measurements_only(model: Path, undisturbed: Path) -> None:
    changed = recipe(model)
    changed["variants"]["int4"][0]["quantize"]["bits"] = 3
    version, listener, results = run(changed, undisturbed)
    assert version.name == "v2"
    assert sorted(listener.built) == ["accuracy of int4", "perplexity of int4", "quantize gptq", "speed of int4"]
    assert results["variants"][1]["facts"]["bits"] == 3


def test_a_failed_variant_is_one_row_and_is_not_cached(model: Path, tmp_path: Path) -> None:
    """A weight that float16 cannot hold: bfloat16 can."""
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e38
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    value = recipe(broken, evaluate={})
    step = {"format": "gguf", "parity": {"tokens": 0}}  # the model computes nothing finite to compare
    value["variants"] = {kind: [{"export": {**step, "type": kind.upper()}}] for kind in ("f16", "bf16")}
    _, listener, results = run(value, tmp_path / "a")
    rows = {row["name"]: row for row in results["variants"]}
    assert rows["bf16"]["status"] == "ok"
    assert rows["f16"]["status"] == "failed"
    assert "down_proj" in rows["f16"]["error"] or "ffn_down" in rows["f16"]["error"]
    assert listener.failed == ["export F16"]
    assert run(value, tmp_path / "a")[1].failed == ["export F16"]


def test_a_step_that_cannot_follow_another_is_refused(model: Path, tmp_path: Path) -> None:
    value = recipe(model, evaluate={})
    value["variants"]["int4"].append({"quantize": {"method": "rtn", "group_size": 32}})
    with pytest.raises(RequestError, match="this model is gptq already"):
        run(value, tmp_path)


class Collector(Listener):
    """Calls gc after each stage, while nothing is published yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        super().ended(stage, seconds, error)
        assert [name for name, _ in collect(Store(self.folder)) if len(name) == 64] == []


def test_gc_beside_a_run_takes_nothing_from_it(model: Path, tmp_path: Path) -> None:
    collector = Collector(tmp_path)
    lighten.run(parse(recipe(model, evaluate={})), artifacts=tmp_path, watcher=collector)
    store = Store(tmp_path)
    assert len(collector.built) == len(store.finished()) == 5
    assert not any(each.damage for each in check(store))
    assert list((tmp_path / "leases").iterdir()) == []


def test_gc_beside_one_step_takes_nothing_from_it(model: Path, tmp_path: Path) -> None:
    settings = {"method": "rtn", "bits": 8, "group_size": 32}
    store = tmp_path / "a"
    made = one_step("quantize", str(model), tmp_path / "out", settings, artifacts=store, watcher=Collector(store))
    assert find_damage(made) == []
    assert len(collect(Store(store))) == 2  # nobody needs them when it has ended


def test_names_of_the_stores_own_directories_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    for name in ("objects", "leases"):
        with pytest.raises(RequestError, match="the store uses that name"):
            lighten.run(parse(recipe(model, name=name)), artifacts=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_damaged_manifest_is_made_anew_and_said(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "a", symlinks=True)
    store = Store(tmp_path / "a")
    sweep = next(stage for stage in make_plan(parse(recipe(model))).stages if stage.kind == "sweep")
    manifest = store.objects / sweep.key / "artifact.json"
    os.chmod(manifest, 0o644)
    manifest.write_text("[]")
    said: list[str] = []
    listener = Listener()
    listener.say = said.append  # type: ignore[method-assign]
    value = recipe(model, evaluate={}, name="again")
    lighten.run(parse(value), artifacts=tmp_path / "a", watcher=listener)
    assert listener.built == ["sweep"]
    assert any("sweep" in line and "damaged" in line and "made anew" in line for line in said)
    assert contents(tmp_path / "a") == contents(undisturbed)


def test_a_full_disk_ends_the_run_and_publishes_nothing(model: Path, tmp_path: Path) -> None:
    """A limit on the length of files stands for the disk: the run says it once, and goes on when there is room."""
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(model, evaluate={})))
    run_on_a_full_disk(tmp_path, (model / "model.safetensors").stat().st_size // 3)
    assert Store(tmp_path / "a").versions() == []


def run_on_a_full_disk(folder: Path, limit: int) -> None:
    command = [sys.executable, "-m", "lighten", "run", "recipe.yaml", "--artifacts", "a"]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.count("lighten: ") == 1 and "free some space" in done.stderr and "Traceback" not in done.stderr
    assert [path for path in (folder / "a" / "objects").iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_loses_nothing(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    value, folder = recipe(model, evaluate={}), tmp_path / "a"
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    lighten.run(parse(value), artifacts=folder, only=["q8"])
    before = contents(folder)
    run_on_a_full_disk(tmp_path, 800_000)  # room for a report, and not for the weights
    assert contents(folder) == before
    assert [version.name for version in Store(folder).versions()] == ["v1"]
    version, listener, _ = run(value, folder)
    assert (version.name, listener.built) == ("v2", ["quantize gptq", "quantize gptq"])
    assert contents(folder).items() <= contents(undisturbed).items()


def test_what_a_gpu_computes_has_keys_of_its_own(model: Path) -> None:
    here = make_plan(parse(recipe(model)))
    there = make_plan(parse(recipe(model)), device=Device("cuda", "A", 10**12))
    both = dict(zip([stage.name for stage in here.stages], zip(here.stages, there.stages, strict=True), strict=True))
    for name, (ours, theirs) in both.items():
        same = ours.kind in ("source", "export") and not any(parent.kind == "sweep" for parent in ours.parents)
        assert (ours.key == theirs.key) == same, name
    quality = [stage for stage in there.stages if stage.measure in ("perplexity", "accuracy")]
    assert {stage.arithmetic for stage in quality} == {"float32"}
    small = make_plan(parse(recipe(model)), device=Device("cuda", "A", 10**6))
    assert {stage.arithmetic for stage in small.stages if stage.measure == "perplexity"} == {"bfloat16"}
    assert not {stage.key for stage in quality} & {stage.key for stage in small.stages}
    assert all(stage.arithmetic is None for stage in here.stages)


def test_a_gpu_without_the_memory_is_refused_before_any_work(model: Path) -> None:
    with pytest.raises(RequestError, match=r"needs about .* and cuda \(A\) has"):
        check_memory(make_plan(parse(recipe(model)), device=Device("cuda", "A", 10**6)))
    check_memory(make_plan(parse(recipe(model))))


def test_what_a_processor_took_says_nothing_of_a_gpu(model: Path, tmp_path: Path) -> None:
    gpu = Device("cuda", "A", 10**12)
    assert min(nominal_flops(gpu)) > max(nominal_flops())
    stage = next(stage for stage in make_plan(parse(recipe(model))).stages if stage.kind == "sweep")
    store = Store(tmp_path)
    nominal = Predictor(store).nominal_seconds(stage)
    took = {"what": cost_class(stage), "machine": this_machine(), "seconds": 3 * nominal, "nominal_seconds": nominal}
    store.record_cost("k", took)
    assert Predictor(store).predict(stage).seconds == pytest.approx(3 * nominal)
    assert Predictor(store, gpu).predict(stage).seconds <= nominal


def test_training_every_weight_is_planned_with_what_adam_keeps(model: Path) -> None:
    """Weights, their derivatives and two moments, four bytes each."""
    facts = make_plan(parse(recipe(model))).source.facts
    large = replace(facts, hidden=4096, intermediate=14336, layers=32)
    assert Distill().predict(large, 0).peak_bytes > 16 * large.params > 80e9
