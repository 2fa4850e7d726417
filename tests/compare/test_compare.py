"""`lighten compare` as a person uses it, on what a tiny random model left in a store."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lighten.cli import evaluate as cli
from tests.cli.test_main import refused
from tests.command import lighten, process

RECIPE = """name: {name}
model: {model}
calibration: {{data: builtin, samples: 4, length: 32}}
variants:
  int4: [{{quantize: {{bits: 4, group_size: {group}}}}}]
  {other}
evaluate:
  perplexity: {{data: builtin, length: {length}, samples: 8}}
"""
ALL = (
    RECIPE
    + """  accuracy: {{task: builtin, limit: 30}}
  speed: {{prompt: 8, generate: 4, batch: [1], repeats: 2}}
"""
)
Q8 = "q8: [{export: {format: gguf, type: Q8_0}}]"
INT2 = "int2: [{quantize: {bits: 2, group_size: 32}}]"


@pytest.fixture(scope="module")
def home(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of `mine`, one of `other` with shorter chunks, and a model beside them."""
    folder = tmp_path_factory.mktemp("compare")
    model = tiny(dtype=torch.bfloat16)
    shutil.copytree(tiny(dtype=torch.bfloat16, initializer_range=0.12), folder / "wide")
    settings = [(ALL, "mine", 32, Q8, 64), (ALL, "mine", 64, INT2, 64), (RECIPE, "other", 32, "", 32)]
    for recipe, name, group, other, length in settings:
        text = recipe.format(name=name, model=model, group=group, other=other, length=length)
        (folder / f"{name}.yaml").write_text(text)
        done = lighten("run", f"{name}.yaml", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def compared(home: Path, *arguments: object) -> dict[str, Any]:
    done = lighten("compare", *arguments, "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def values(home: Path, version: str, variant: str, kind: str) -> dict[str, np.ndarray]:
    """The values of a measurement, found without lighten."""
    folder = home / "artifacts/mine" / version
    results = json.loads((folder / "results.json").read_text())
    for stage in results["stages"]:
        if stage["kind"] == kind and stage["name"].endswith(f" of {variant}"):
            return load_file(home / "artifacts/objects" / stage["key"] / "values.safetensors")
    raise AssertionError(f"no {kind} of {variant}")


def test_two_variants_are_paired_chunk_by_chunk_and_task_by_task(home: Path) -> None:
    (found,) = compared(home, "mine@v1:baseline", "mine@v1:int4")["differences"]
    base, nll = (values(home, "v1", name, "perplexity")["nll"].astype(float) for name in ("baseline", "int4"))
    assert found["perplexity"]["units"] == len(nll) == 8
    ratio = found["perplexity"]["ratio"]
    assert ratio["value"] == pytest.approx(np.exp(nll.mean() - base.mean()))
    assert ratio["ci95"][0] < ratio["value"] < ratio["ci95"][1]

    before, after = (values(home, "v1", name, "accuracy") for name in ("baseline", "int4"))
    was, now = (each["choice_norm"] == each["label"] for each in (before, after))
    (task,) = found["accuracy"]
    assert (task["acc_norm"]["gained"], task["acc_norm"]["lost"]) == ((~was & now).sum(), (was & ~now).sum())
    assert {flip["number"] for flip in task["flips"]} == set(np.flatnonzero(was != now))
    for flip in task["flips"]:
        wrong = flip["chosen_b" if flip["way"] == "lost" else "chosen_a"]
        right = flip["chosen_a" if flip["way"] == "lost" else "chosen_b"]
        assert flip["right"] == right != wrong
        assert flip["context"]
    assert found["size"]["ratio"]["value"] < 1
    if decode := found["decode"]:
        assert decode["ratio"]["value"] == pytest.approx(decode["b"] / decode["a"])
    else:  # the machine was busy
        assert any("decode speeds are not compared: the repeats of" in note for note in found["notes"])


def test_the_largest_divergences_are_named_with_their_text(home: Path) -> None:
    """Stored against the baseline, and computed by both runtimes between two variants."""
    kl = values(home, "v1", "int4", "perplexity")["kl"]
    stored = compared(home, "mine@v1:baseline", "mine@v1:int4", "--tokens", 3)["tokens"]
    assert [place["kl"] for place in stored] == pytest.approx(sorted(kl.ravel())[:-4:-1])
    for place in stored:
        assert kl[place["chunk"], place["position"] - 1] == pytest.approx(place["kl"])
        text = Path("lighten/data/builtin/perplexity")
        whole = " ".join(
            "".join(file.read_text() for file in Path(__file__).parents[2].joinpath(text).glob("*")).split()
        )
        assert " ".join((place["before"] + place["token"] + place["after"]).split()) in whole
    ran = compared(home, "mine@v1:int4", "mine@v1:q8", "--tokens", 2)["tokens"]
    assert len(ran) == 2 and ran[0]["kl"] >= ran[1]["kl"] > 0
    assert all(0 <= place[side]["p_actual"] <= place[side]["p"] <= 1 for place in ran for side in ("first", "second"))


def test_the_computed_divergence_is_the_stored_one(home: Path) -> None:
    """From a model's file, which the store has not measured against: the same numbers by another way."""
    model = home / "artifacts/mine/v1/variants/int4"
    copy = home / "copy"
    if not copy.exists():
        shutil.copytree(model.resolve(), copy, copy_function=shutil.copyfile)
        copy.chmod(0o755)
    stored = compared(home, "mine@v1:baseline", "mine@v1:int4", "--tokens", 3)["tokens"]
    ran = compared(home, "mine@v1:baseline", "copy", "--tokens", 3)["tokens"]
    assert [place["kl"] for place in ran] == pytest.approx([place["kl"] for place in stored], rel=1e-3)
    assert [place["before"] for place in ran] == [place["before"] for place in stored]
    (found,) = compared(home, "mine@v1:int4", "copy")["differences"]
    assert found["perplexity"]["ratio"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert found["accuracy"][0]["flips"] == []


def test_fail_if_exits_1_on_a_worse_variant_and_0_on_an_equal_one(home: Path) -> None:
    (found,) = compared(home, "mine@v1:baseline", "mine@v2:int2")["differences"]
    ratio = found["perplexity"]["ratio"]["value"]
    worse, better = ("mine@v1:baseline", "mine@v2:int2")[:: 1 if ratio > 1 else -1][::-1]
    rise = 100 * (max(ratio, 1 / ratio) - 1)
    assert rise > 0.1
    done = process("compare", better, worse, "--fail-if", f"ppl > +{rise / 2:.4f}%", cwd=home)
    assert done.returncode == 1
    assert "FAILED: ppl >" in done.stdout and "95 % interval [" in done.stdout
    assert lighten("compare", better, worse, "--fail-if", f"ppl > +{2 * rise:.4f}%", cwd=home).returncode == 0
    assert lighten("compare", worse, better, "--fail-if", "ppl > +0%", cwd=home).returncode == 0
    limits = [word for limit in ("ppl > +0%", "acc < -0pp", "size > +0%") for word in ("--fail-if", limit)]
    same = lighten("compare", "mine@v1:baseline", "mine@v2:baseline", *limits, cwd=home)
    assert same.returncode == 0, same.stdout
    bigger = lighten("compare", "mine@v1:int4", "mine@v1:baseline", "--fail-if", "size > +0%", cwd=home)
    assert bigger.returncode == 1


def test_two_versions_are_compared_variant_by_variant(home: Path) -> None:
    found = compared(home, "mine@v1", "artifacts/mine/latest")
    assert [each["a"] for each in found["differences"]] == ["mine@v1:baseline", "mine@v1:int4"]
    assert found["alone"] == ["q8 is not in artifacts/mine/latest", "int2 is not in mine@v1"]
    assert found["differences"][0]["perplexity"]["ratio"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    done = lighten("compare", "mine@v1", "mine", "--fail-if", "size > +0%", cwd=home)
    assert done.returncode == 0  # groups of 64 take less than groups of 32
    assert lighten("compare", "mine", "mine@v1", "--fail-if", "size > +0%", cwd=home).returncode == 1


def test_a_model_beside_a_variant_is_measured_as_its_version_was_and_once(home: Path) -> None:
    (found,) = compared(home, "mine@v1:baseline", "wide")["differences"]
    assert found["perplexity"]["units"] == 8
    assert found["accuracy"][0]["n"] == 30
    again = lighten("compare", "mine@v1:baseline", home / "wide", cwd=home)
    assert again.returncode == 0
    assert "perplexity of" not in again.stderr
    small = ("--length", 32, "--samples", 4, "--limit", 5, "--skip", "speed")
    both = compared(home, "wide", "artifacts/mine/v1/variants/../../../../wide", *small)["differences"][0]
    assert both["perplexity"]["ratio"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert both["decode"] is None


def test_results_without_their_store_are_compared_without_intervals(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "artifacts/mine/v1/results.json", tmp_path / "before.json")
    arguments = ("compare", tmp_path / "before.json", "mine@v2", "--fail-if", "ppl > +1000%", "--json")
    done = lighten(*arguments, cwd=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["differences"][1]
    assert found["perplexity"]["ratio"]["ci95"] is None
    assert any("not in the store" in note for note in found["notes"])
    missing = lighten("compare", f"{tmp_path / 'before.json'}:int4", "mine:int4", "--tokens", 2, cwd=home)
    assert "no tokens are named" in missing.stdout


def test_results_that_do_not_name_their_text_have_no_tokens_to_show(home: Path, tmp_path: Path) -> None:
    version = tmp_path / "artifacts/mine/v1"
    shutil.copytree(home / "artifacts", tmp_path / "artifacts", symlinks=True)
    value = json.loads((version / "results.json").read_text())
    for row in value["variants"]:
        del row["perplexity"]["protocol"]["data"]
    (version / "results.json").write_text(json.dumps(value))
    done = lighten("compare", "mine@v1:baseline", "mine@v1:int4", "--tokens", 2, cwd=tmp_path)
    assert done.returncode == 0 and "do not name the text" in done.stdout, done.stderr


def test_wrong_requests(home: Path, tmp_path: Path) -> None:
    def refuse(*arguments: object, words: tuple[str, ...]) -> None:
        refused(lighten("compare", *arguments, cwd=home), 2, *words)

    refuse("mine", "mine", "--fail-if", "ppl two", words=("cannot read --fail-if 'ppl two'", "acc < -1pp"))
    refuse("mine@v1", "other", words=("not measured alike", "length is 64 in A and 32 in B"))
    refuse("mine:int4", "other:int4", words=("not measured alike", "length is 64 in A and 32 in B"))
    refuse("mien", "mine", words=("no version and no model 'mien'", "did you mean 'mine'?"))
    refuse("mine@v9", "mine", words=("mine has no version 'v9'; there is v1",))
    refuse("mine:int5", "mine:int4", words=("no variant 'int5'", "did you mean"))
    refuse("mine", "mine:int4", words=("mine is a version and mine:int4 is not", "name a variant"))
    refuse("mine", "mine", "--tokens", 3, words=("--tokens is for two variants",))
    refuse("mine:int4", "wide", "--length", 32, words=("--length is for two models",))
    results = json.loads((home / "artifacts/mine/v1/results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "schema": 2}))
    refuse(tmp_path, "mine", words=("has schema 2", "reads schema 1"))


def test_evaluate_finds_a_variant_by_its_name(home: Path) -> None:
    there = home / "artifacts/mine/v1/variants/int4"
    assert Path(cli._path_of("mine@v1:int4", home / "artifacts")).samefile(there)
    assert cli._path_of(str(there), home / "artifacts") == str(there)
