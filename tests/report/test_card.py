"""The model cards: what the hub reads in them, and that what they tell to do works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from lighten.pipeline.run import run
from lighten.report.card import card, cards
from lighten.report.loading import loading
from lighten.results.file import load
from lighten.results.results import Results
from lighten.store.artifact import Artifact, find_damage
from lighten.store.gc import check
from lighten.store.store import Store

from .sample import raw, results

RECIPE = """name: tiny
model: {model}
calibration: {{data: builtin, samples: 4, length: 32}}
variants:
  f16: [{{export: {{format: gguf, type: F16}}}}]
  slim: [{{prune: {{what: mlp, ratio: 0.25}}}}]
evaluate:
  perplexity: {{data: builtin, length: 64, samples: 4}}
  accuracy: {{task: builtin, limit: 4}}
"""


@pytest.fixture(scope="module")
def version(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=tiny(dtype=torch.bfloat16)))
    return run(str(recipe), artifacts=folder / "artifacts")


def artifact(name: str, files: tuple[str, ...] = ("model-Q8_0.gguf",)) -> Artifact:
    listed = [{"path": file, "size": 144_811_904, "sha256": "ab" * 32} for file in files]
    return Artifact(Path(name), {"format": "gguf", "files": listed})


def made(value: dict[str, Any] | None = None, name: str = "gguf-q8_0", repo: str | None = "me/small") -> str:
    read = Results.model_validate(value) if value else results()
    variant = next(each for each in read.variants if each.name == name)
    return card(read, variant, artifact(name), repo)


def test_every_variant_of_a_run_has_a_card_and_the_artifacts_stay_sound(version: Path) -> None:
    assert sorted(path.parent.name for path in version.glob("cards/*/README.md")) == ["baseline", "f16", "slim"]
    store = Store(version.parents[1])
    assert not any(each.damage for each in check(store))
    assert all(find_damage(found) == [] for key in store.finished() if (found := store.find(key)))
    assert not list((version / "variants").glob("*/README.md"))
    read = load(version)
    assert cards(read, version).keys() == {variant.name for variant in read.measured}


@pytest.mark.parametrize("name", ["baseline", "slim", "f16"])
def test_the_lines_that_load_it_run(version: Path, name: str) -> None:
    if name == "f16":
        pytest.importorskip("llama_cpp")
    text = (version / "cards" / name / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=version, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "it says something"


def test_the_lines_that_load_onnx_run(to_onnx: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = to_onnx(tiny(dtype=torch.float32), precision="fp32")
    files = [path.name for path in folder.iterdir()]
    (code,) = re.findall(r"```python\n(.*?)```", loading("onnx", files, repr(str(folder))), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_hub_reads_the_front_matter(version: Path) -> None:
    text = made()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "gguf",
    )
    assert data.pipeline_tag == "text-generation"
    assert {"lighten", "gguf", "export", "q8_0"} <= set(data.tags or [])
    assert data.to_dict()["base_model_relation"] == "quantized"
    found = {each.metric_type: each.metric_value for each in data.eval_results or []}
    assert found["perplexity"] == 25.6161 and found["kl_mean"] == 0.00118
    assert found["acc_norm"] == pytest.approx(58 / 120)
    real = ModelCard((version / "cards" / "slim" / "README.md").read_text()).data
    row = next(each for each in load(version).variants if each.name == "slim")
    assert row.perplexity
    assert {each.metric_value for each in real.eval_results or []} >= {row.perplexity.value}
    assert real.to_dict().get("base_model") is None, "a directory of one's own is no model of the hub"


def test_what_a_card_tells() -> None:
    text = made()
    for words in (
        "145 MB, 54 % of the source's size",
        'snapshot_download("me/small")',
        '"{folder}/model-Q8_0.gguf"'.replace('"{', 'f"{'),
        "| Perplexity | 25.62 ± 0.44 | 25.60 ± 0.44 |",
        "+0.05 % [−0.03, +0.13]",
        "Perplexity by the protocol lighten: data builtin",
        "AMD EPYC 9B14, 2 cores",
        "builtin: 35 of 64 samples of 512",
        "name: quickstart",
        "abab",
    ):
        assert words in text, words


def test_a_source_without_name_or_licence() -> None:
    value = raw()
    value["source"] = {"model": "/home/somebody/secret/model"}
    value["variants"][3]["notes"] = ["/home/somebody/texts/a.txt is short"]
    value["variants"][3]["steps"][0]["export"]["template"] = "/home/somebody/chat.jinja"
    text = made(value)
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front and "base_model_relation" not in front and front["license"] == "other"
    assert "/home/somebody" not in text and "- a.txt is short" in text and "names no licence" in text


def test_text_of_others_stays_text() -> None:
    value = raw()
    value["variants"][3]["notes"] = ["<b>|x"]
    value["variants"][3]["perplexity"]["protocol"]["data"] = "a: [b\n---"
    text = made(value)
    assert "<b>" not in text
    assert ModelCard(text).data.eval_results


def test_formats_ask_for_their_packages() -> None:
    assert "pip install transformers gptqmodel optimum" in loading("gptq", ["model.safetensors"], '"x"')
    assert "pip install transformers compressed-tensors\n" in loading(
        "compressed-tensors", ["model.safetensors"], '"x"'
    )
    assert "pip install onnxruntime\n" in loading("onnx", ["model.onnx"], '"x"')
    assert "archive" in loading("bundle", ["a.tar.zst"], '"x"')
    assert json.dumps("x") in loading("hf", [], '"x"')
