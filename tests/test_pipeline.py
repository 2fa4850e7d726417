"""A whole recipe on a tiny random model: caching, sharing, failure of one variant, and kill -9 at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lighten
from lighten.errors import RequestError
from lighten.plan import Stage, make_plan
from lighten.recipe import parse
from lighten.store import Store, find_damage


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


def command_line(value: dict[str, Any], folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(json.dumps(value))
    return [sys.executable, "-m", "lighten", "run", str(folder / "recipe.yaml"), "--artifacts", str(folder / "a")]


def test_two_runs_side_by_side(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = command_line(recipe(model, evaluate={}), tmp_path)
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    same = contents(tmp_path / "a")
    assert same == {name: content for name, content in contents(undisturbed).items() if name in same}
    assert all(find_damage(Store(tmp_path / "a").find(key)) == [] for key in Store(tmp_path / "a").finished())


def test_kill_9_at_any_moment_then_the_same_bytes(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = command_line(recipe(model), tmp_path)
    moments = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moments.uniform(2, 9))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    ours, theirs = contents(tmp_path / "a"), contents(undisturbed)
    assert ours.keys() <= theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours)
    assert [path.name for path in (tmp_path / "a" / "objects").iterdir() if path.name.startswith(".")] == []
