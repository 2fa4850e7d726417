"""The quickstart on the real 135M model, and what its artifacts are worth to other loaders.

It is the ready recipe but for how much is measured, which is the longest part: `make demo` runs all of it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lighten.evaluate.parity.check import check
from lighten.evaluate.runtimes.gguf_tokenizer import GgufTokenizer
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.evaluate.speed.server import LlamaServer
from lighten.process.isolate import run_isolated
from lighten.step import silent
from lighten.store.artifact import find_damage
from lighten.store.store import Store

pytestmark = pytest.mark.real
CHUNKS, TASKS = 6, 20
"""How much is measured. Variants are compared on the same tokens, so the order of their perplexities needs few."""

SPEED = {"prompt": 32, "generate": 8, "repeats": 2, "batch": [1]}
"""What is measured of speed: its columns, which are filled, and no number."""

VARIANTS = ["baseline", "gptq-int4", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]


def lighten(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lighten", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1500)


def quickstart() -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "recipes/quickstart.yaml").read_text())
    return recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = quickstart()
    recipe["evaluate"]["perplexity"] = {"length": 512, "samples": CHUNKS}
    recipe["evaluate"]["accuracy"] = [{"task": "builtin", "limit": TASKS}]
    recipe["evaluate"]["speed"] = SPEED
    recipe["evaluate"]["loaders"] = True
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = lighten("run", "quickstart.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(home: Path) -> dict[str, Any]:
    return json.loads((home / "artifacts/quickstart/v1/results.json").read_text())


@pytest.fixture(scope="module")
def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["variants"]}


def artifact(home: Path, name: str) -> Path:
    return (home / "artifacts/quickstart/v1/variants" / name).resolve()


def test_every_field_of_the_contract_is_filled(results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == VARIANTS
    assert results["source"]["params"] == 134_515_008
    for name, row in rows.items():
        assert (row["status"], row["error"]) == ("ok", None)
        filled = ["path", "key", "format", "runtime", "device", "size_bytes", "bits_per_weight", "perplexity"]
        filled += ["accuracy", "speed", "memory", "energy", *(["divergence", "delta"] if name != "baseline" else [])]
        assert all(row[field] for field in filled), name
        for percentiles in (row["speed"][0]["ttft_ms"], row["speed"][0]["token_ms"]):
            assert 0 < percentiles["p50"] <= percentiles["p95"] <= percentiles["p99"]
        assert row["accuracy"][0]["ci95"][0] < row["accuracy"][0]["acc"] < row["accuracy"][0]["ci95"][1]


def test_where_the_variants_load(rows: dict[str, dict[str, Any]]) -> None:
    """By really opening each: what they were made for opens them, and nothing was left out."""
    loaded = {name: {load["loader"] for load in row["loads"] if load["status"] == "ok"} for name, row in rows.items()}
    assert loaded == {
        "baseline": {"transformers"},
        "gptq-int4": {"transformers", "GPTQModel"},
        **{name: {"transformers", "llama.cpp"} for name in VARIANTS[2:]},
    }
    assert {load["status"] for row in rows.values() for load in row["loads"]} == {"ok", "other"}


def test_quality_is_in_the_expected_order(rows: dict[str, dict[str, Any]]) -> None:
    perplexity = {name: row["perplexity"]["value"] for name, row in rows.items()}
    assert perplexity["gguf-f16"] == pytest.approx(perplexity["baseline"], rel=5e-4)
    assert rows["gguf-f16"]["divergence"]["top1_agreement"] > 0.995
    assert perplexity["baseline"] < perplexity["gguf-q8_0"] < perplexity["gguf-q4_k_m"] < 1.06 * perplexity["baseline"]
    assert perplexity["gptq-int4"] < 1.25 * perplexity["baseline"]
    assert rows["gguf-q4_k_m"]["facts"]["imatrix"] is True
    assert rows["gguf-q4_k_m"]["facts"]["fallbacks"]["count"] == 180


def test_the_reference_is_exact(home: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The baseline's perplexity is what transformers alone gives, in float32, on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lighten.data.text import builtin_text

    path = artifact(home, "baseline")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(builtin_text("perplexity"), return_tensors="pt")["input_ids"][0]
    chunks = ids[: CHUNKS * 512].view(-1, 512)
    total = 0.0
    with torch.inference_mode():
        for chunk in chunks:
            logits = model(chunk[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum").item()
    assert math.exp(total / (len(chunks) * 511)) == pytest.approx(rows["baseline"]["perplexity"]["value"], rel=1e-5)


def through_gptqmodel(path: Path) -> float:
    """Returns the perplexity through AutoModelForCausalLM and GPTQModel's own kernels, in a process of its own."""
    script = """
import math, os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "3"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lighten.data.text import builtin_text
path, count = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(path)
kernel = type(model.model.layers[0].mlp.down_proj).__module__
assert kernel.startswith("gptqmodel"), kernel
ids = AutoTokenizer.from_pretrained(path)(builtin_text("perplexity"), return_tensors="pt")["input_ids"][0]
chunks = ids[: count * 512].view(-1, 512)
total = 0.0
with torch.inference_mode():
    for chunk in chunks:
        logits = model(chunk[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum").item()
print("perplexity", math.exp(total / (len(chunks) * 511)))
"""
    command = [sys.executable, "-c", script, str(path), str(CHUNKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split("perplexity ")[1].split()[0])


def test_gptq_loads_in_transformers_and_scores_the_same(home: Path, rows: dict[str, dict[str, Any]]) -> None:
    theirs = through_gptqmodel(artifact(home, "gptq-int4"))
    assert theirs == pytest.approx(rows["gptq-int4"]["perplexity"]["value"], rel=5e-3)


@pytest.fixture(scope="module")
def more(home: Path) -> Path:
    """More variants from the same sweep: AWQ, and a fifth of the MLP gone."""
    recipe = yaml.safe_load((home / "quickstart.yaml").read_text())  # with its sweep
    thin = {"prune": {"what": "mlp", "ratio": 0.2}}
    recipe["name"] = "more"
    recipe["variants"] = {
        "awq-int4": [{"quantize": {"method": "awq", "group_size": 64}}],
        "thin": [thin],
        "thin-unrepaired": [{"prune": {**thin["prune"], "repair": False}}],
        "thin-f16": [thin, {"export": {"format": "gguf", "type": "F16"}}],
    }
    recipe["evaluate"] = {"perplexity": {"length": 512, "samples": CHUNKS}}
    (home / "more.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = lighten("run", "more.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "artifacts/more/v1"


def test_awq_loads_in_transformers_and_scores_the_same(more: Path) -> None:
    rows = {row["name"]: row for row in json.loads((more / "results.json").read_text())["variants"]}
    theirs = through_gptqmodel((more / "variants/awq-int4").resolve())
    assert theirs == pytest.approx(rows["awq-int4"]["perplexity"]["value"], rel=5e-3)


def test_least_squares_give_back_a_quarter_of_what_pruning_costs(more: Path) -> None:
    results = json.loads((more / "results.json").read_text())
    rows = {row["name"]: row for row in results["variants"]}
    value = {name: math.log(row["perplexity"]["value"]) for name, row in rows.items()}
    damage, repaired = (value[name] - value["baseline"] for name in ("thin-unrepaired", "thin"))
    assert 0 < repaired < 0.75 * damage
    assert rows["thin"]["params"] < 0.9 * rows["baseline"]["params"]
    assert math.exp(value["thin-f16"] - value["thin"]) == pytest.approx(1, abs=5e-4)
    assert rows["thin-f16"]["params"] == rows["thin"]["params"]


def test_gguf_f16_is_read_by_gguf_and_llama_cpp(home: Path) -> None:
    import gguf

    file = artifact(home, "gguf-f16") / "model-F16.gguf"
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == 272
    assert str(file.parent) not in str(reader.fields["general.name"].contents())
    runtime = LlamaCppRuntime(file, "cpu")
    ids = runtime.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    answer, said = runtime.decode(ids, 12), []
    for _ in range(12):
        said.append(int(answer.send(said[-1] if said else None).argmax()))  # type: ignore[arg-type]
    assert "Paris" in GgufTokenizer(file).decode(said)


def test_every_file_is_served(home: Path) -> None:
    for name in VARIANTS[2:]:
        (file,) = artifact(home, name).glob("*.gguf")
        with LlamaServer(file, 64, "cpu") as server:
            assert server.stream("The capital of France", 4, []), name


def libraries(payload: dict[str, Any], report: Callable[..., None]) -> dict[str, Any]:
    """Imports what parity imports, and computes one product, as it does."""
    import onnxruntime  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.ones(600, 600) @ torch.ones(600, 600)
    return {}


def test_parity_takes_little_memory(home: Path, tmp_path: Path) -> None:
    """Less than the source in float32 and what it runs on: one model at a time, and of the source a layer."""
    source = artifact(home, "baseline")
    assert (
        lighten(
            "export", source, "--format", "onnx", "--parity", "tokens=0", "-o", tmp_path / "onnx", cwd=home
        ).returncode
        == 0
    )
    # that rows of logits do not add up shows in 1,024 positions; the smaller files differ in their weights only
    files = dict.fromkeys(VARIANTS[3:], 256) | {"gguf-f16": 1024, "onnx": 1024}
    peaks = {}
    for name, tokens in files.items():
        made = tmp_path / name
        if not made.exists():  # beside it, parity needs room for the logits, and a store is not to be written to
            made = tmp_path / f"{name}.gguf"
            made.symlink_to(next(artifact(home, name).glob("*.gguf")))
        found = check({"source": str(source), "made": str(made), "limits": {}, "tokens": tokens}, silent)
        assert found.value["parity"]["tokens"] == tokens
        peaks[name] = found.peak_rss_bytes
    # What importing takes is not parity's: 150 MB more with torch's build for GPUs. A process that was forked before
    # the libraries were there counts fewer of their pages, so it is measured last, and twice.
    imported = max(run_isolated("tests.real.test_quickstart:libraries", {}).peak_rss_bytes for _ in range(2))
    assert max(peaks.values()) - imported < 250e6, (peaks, imported)


def test_again_makes_no_new_objects_and_a_change_runs_one_variant(home: Path) -> None:
    store = Store(home / "artifacts")
    before = store.finished()
    assert lighten("run", "quickstart.yaml", cwd=home).returncode == 0
    assert store.finished() == before
    assert [version.name for version in store.versions("quickstart")] == ["v1"]

    recipe = (home / "artifacts/quickstart/v1/recipe.yaml").read_text()
    (home / "changed.yaml").write_text(recipe.replace("bits: 4", "bits: 8"))
    planned = json.loads(lighten("plan", "changed.yaml", "--json", cwd=home).stdout)["stages"]
    missing = [stage["name"] for stage in planned if not stage["cached"]]
    measured = [f"{measure} of gptq-int4" for measure in ("perplexity", "accuracy", "speed", "loaders")]
    wanted = ["quantize gptq", *measured]
    assert sorted(missing) == sorted(wanted)


ONLY = ("run", "quickstart.yaml", "--only", "gguf-q4_k_m")
KILLED = ["sweep", "export", "perplexity"]


def files_of(folder: Path, *, killed: bool = False) -> dict[str, Any]:
    store = Store(folder)
    kept = [store.find(key) for key in store.finished()]
    assert all(find_damage(each) == [] for each in kept)
    assert killed or not [path for path in os.listdir(store.objects) if path.startswith(".")]
    return {each.key: each.manifest["files"] for each in kept if each.format != "measurement"}


@pytest.fixture(scope="module")
def undisturbed(home: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What the run in peace made for the variant that the killed run makes."""
    needed = {stage["key"] for stage in results["stages"] if "gguf-q4_k_m" in stage["variants"]}
    return {key: files for key, files in files_of(home / "artifacts").items() if key in needed}


@pytest.fixture(scope="module")
def disturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is finished after each kill, and at the end: one run, killed in a stage, begun again, killed in the next."""
    folder = tmp_path_factory.mktemp("disturbed")
    recipe = yaml.safe_load((home / "quickstart.yaml").read_text())
    recipe["evaluate"] = {"perplexity": {"length": 512, "samples": 4}}
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(recipe))
    found = {}
    for stage in KILLED:
        kill_in(stage, folder)
        found[stage] = files_of(folder / "artifacts", killed=True)
    assert lighten(*ONLY, cwd=folder).returncode == 0
    return found | {"end": files_of(folder / "artifacts")}


def kill_in(stage: str, folder: Path) -> None:
    command = [sys.executable, "-m", "lighten", *ONLY]
    child = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    for line in child.stderr:
        if line.startswith(stage):  # "sweep … (about 20 s)"
            break
    time.sleep(1.5)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()


@pytest.mark.parametrize("stage", KILLED)
def test_kill_9_then_the_same_bytes(
    undisturbed: dict[str, Any], disturbed: dict[str, dict[str, Any]], stage: str
) -> None:
    """What was finished before the kill is whole and is kept; what comes after makes the same bytes."""
    kept = disturbed[stage]
    assert kept.items() < undisturbed.items() or stage == KILLED[-1]
    assert kept.items() <= disturbed["end"].items()
    assert disturbed["end"] == undisturbed
