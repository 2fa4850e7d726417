"""Pruning and distilling from the command line and in a recipe, a kill in the middle included."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lighten.model.checkpoint import Checkpoint
from lighten.store.gc import collect
from lighten.store.store import Store
from tests.cli.test_main import refused
from tests.command import lighten, process

RECIPE = """name: slim
model: {model}
calibration: {{data: builtin, samples: 4, length: 64}}
variants:
  pruned: &pruned
    - prune: {{what: mlp, ratio: 0.25, multiple: 32}}
    - prune: {{what: layers, count: 1}}
  slim:
    - prune: {{what: mlp, ratio: 0.25, multiple: 32}}
    - prune: {{what: layers, count: 1}}
    - distill: &lesson {{length: 32, samples: 40, batch: 4, steps: 40, save_every: 3, precision: fp32}}
  slim-q8:
    - prune: {{what: mlp, ratio: 0.25, multiple: 32}}
    - prune: {{what: layers, count: 1}}
    - distill: *lesson
    - export: {{format: gguf, type: Q8_0}}
  slim-int4:
    - prune: {{what: mlp, ratio: 0.25, multiple: 32}}
    - prune: {{what: layers, count: 1}}
    - distill: *lesson
    - quantize: {{group_size: 32}}
evaluate:
  perplexity: {{data: builtin, samples: 4, length: 64}}
"""


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


def write(folder: Path, model: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "slim.yaml").write_text(RECIPE.format(model=model))


def test_a_recipe_that_prunes_distils_and_exports(tmp_path: Path, model: Path) -> None:
    write(tmp_path, model)
    done = lighten("run", "slim.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    rows = {row["name"]: row for row in results["variants"]}
    assert [row["status"] for row in rows.values()] == ["ok"] * 5
    whole, left = rows["baseline"]["params"], rows["pruned"]["params"]
    assert whole == Checkpoint(model).facts.params > left
    assert [rows[name]["params"] for name in ("slim", "slim-q8", "slim-int4")] == [left] * 3
    # bits per weight are those of the weights that are left
    assert rows["pruned"]["bits_per_weight"] == pytest.approx(16, rel=0.01)
    assert rows["pruned"]["training"] is None
    curves = [rows[name]["training"] for name in ("slim", "slim-q8", "slim-int4")]
    assert curves[0] == curves[1] == curves[2] and len(curves[0]["curve"]) == 40
    kinds = [stage["kind"] for stage in results["stages"]]
    assert kinds.count("distill") == 1 and kinds.count("teacher") == 1 and kinds.count("prune") == 2
    folder = tmp_path / "artifacts/slim/v1"
    report = (folder / "report.html").read_text()
    assert "How training went" in report and "held-out perplexity" in report
    assert "### Training\n\n- slim, slim-q8, slim-int4: 40 steps" in (folder / "report.md").read_text()
    assert (folder / "plots/training-1.png").is_file()
    again = lighten("run", "slim.yaml", cwd=tmp_path)
    assert again.returncode == 0 and "nothing changed" in again.stderr + again.stdout
    assert list((tmp_path / "artifacts/unfinished").iterdir()) == []


def test_kill_9_in_the_middle_of_distillation(tmp_path: Path, model: Path) -> None:
    """The next run goes on from the last checkpoint and ends in the same bytes."""
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        write(folder, model)
        if name == "killed":
            command = [sys.executable, "-m", "lighten", "run", "slim.yaml", "--only", "slim"]
            child = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            unfinished = folder / "artifacts/unfinished"
            while not list(unfinished.glob("*/checkpoint-*[369]")):
                assert time.monotonic() < deadline and child.poll() is None
                time.sleep(0.01)
            child.kill()
            child.wait()
            time.sleep(0.5)  # what it had started is ended by the system
            (left,) = unfinished.glob("*/checkpoint-*")
            assert 0 < int(left.name.rpartition("-")[2]) < 40
        done = lighten("run", "slim.yaml", "--only", "slim", "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        row = next(row for row in json.loads(done.stdout)["variants"] if row["name"] == "slim")
        artifact = (folder / "artifacts/slim/v1/variants/slim").resolve()
        files = json.loads((artifact / "artifact.json").read_text())["files"]
        found.append((row["training"], row["perplexity"], files))
        assert list((folder / "artifacts/unfinished").iterdir()) == []
    assert found[0] == found[1]


def test_the_verbs(tmp_path: Path, model: Path) -> None:
    done = process(
        "prune", model, "--what", "heads", "--count", 1, "--samples", 4, "--length", 64, "-o", "p", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert Checkpoint(tmp_path / "p").facts.kv_heads == 1
    flags = ("--length", 32, "--samples", 24, "--batch", 4, "--steps", 3, "--quantize", "bits=3,group_size=32")
    done = process("distill", "p", "--teacher", model, *flags, "-o", "d", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["facts"]["steps"] == 3
    assert Checkpoint(tmp_path / "d").facts == Checkpoint(tmp_path / "p").facts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "{model}", "-o", "o"), ["say one of the three"]),
        (("prune", "{model}", "--what", "heads", "--ratio", "0.9", "-o", "o"), ["would leave no key/value heads"]),
        (("prune", "{model}", "--method", "wanda", "--pattern", "3:7", "-o", "o"), ["does not divide"]),
        (("prune", "{model}", "--target", "0.3", "-o", "o"), ["ratio=0.2, or params=100M"]),
        (("distill", "{model}", "--teacher", "nobody", "-o", "o"), ["nobody: no such model"]),
        (("distill", "{model}", "--teacher", "{other}", "-o", "o"), ["tokens", "same vocabulary"]),
        (("distill", "{model}", "--batch", "6", "--accumulate", "4", "-o", "o"), ["equal parts"]),
        (("distill", "{model}", "--lora", "4", "-o", "o"), ["pip install 'lighten[lora]'"]),
        (("distill", "{model}", "--samples", "4", "-o", "o"), ["fewer than a batch of 8"]),
    ],
)
def test_wrong_requests(
    tmp_path: Path, tiny: Callable[..., Path], model: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    other = tiny("llama", "spm", dtype=torch.bfloat16)
    hidden = {}
    if "--lora" in arguments:
        (tmp_path / "hide").mkdir()
        (tmp_path / "hide/sitecustomize.py").write_text("import sys; sys.modules['peft'] = None\n")
        hidden = {"PYTHONPATH": str(tmp_path / "hide")}
    places = {"{model}": str(model), "{other}": str(other)}
    given = [places.get(each, each) for each in arguments]
    done = process(*given, cwd=tmp_path, env=hidden) if hidden else lighten(*given, cwd=tmp_path)
    refused(done, 2, *words)
    assert not (tmp_path / "o").exists()


def test_gc_removes_what_a_killed_training_left(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    left = store.scratch("a" * 64) / "checkpoint-00000003"
    left.mkdir(parents=True)
    (left / "state.safetensors").write_bytes(b"x" * 1000)
    store.objects.mkdir(parents=True)
    assert collect(store, dry_run=True) == [("a" * 64, 1000)]
    assert left.is_dir()
    assert collect(store) == [("a" * 64, 1000)]
    assert not left.parent.exists()
