import configparser
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from pydantic import ValidationError

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.export.bundle import bundle, targets
from lighten.export.bundle.settings import Bundle
from lighten.export.gguf.settings import Gguf
from lighten.facts import ModelFacts
from lighten.process.isolate import environment, interpreter
from lighten.results.file import load
from lighten.step import Context
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
EIGHT_BILLION = ModelFacts("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128, 128256, False)
MODEL = "model-Q4_K_M.gguf"


def build(source: Path, out: Path, format: str = "hf", **settings: Any) -> tuple[Path, dict[str, Any]]:
    out.mkdir(parents=True)
    origin = {"id": "demo:tiny", "licence": "apache-2.0"}
    step = Bundle.model_validate({"format": "bundle", "target": "rpi5", **settings})
    return out, step.run(Artifact(source, {"format": format, "source": origin}), out, Context())


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return build(tiny("llama"), tmp_path_factory.mktemp("bundle") / "made", context=256)


@pytest.fixture
def unpacked(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    with (made[0] / "bundle-rpi5-8gb.tar.zst").open("rb") as file:
        plain = zstandard.ZstdDecompressor().stream_reader(file)
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            # Python 3.11 has filters from 3.11.4 on; the archive is ours
            tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path / "bundle-rpi5-8gb"


def clean(command: list[str], cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, **more)


def fake_python(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python3").chmod(0o755)
    return folder


def test_settings() -> None:
    assert Bundle.model_validate({"format": "bundle", "target": "rpi5"}).target == "rpi5-8gb"
    for wrong in ({"target": "rpi3"}, {"target": "rpi5", "type": "budget"}, {"target": "rpi5", "context": 1}, {}):
        with pytest.raises(ValidationError):
            Bundle.model_validate({"format": "bundle", **wrong})
    with pytest.raises(ValidationError, match=r"IQ2_XXS .*imatrix"):
        Bundle.model_validate({"format": "bundle", "target": "rpi5", "type": "IQ2_XXS"})
    step = Bundle.model_validate({"format": "bundle", "target": "rpi4-1gb", "imatrix": True})
    assert step.needs_sweep()
    assert {extra for _, extra in step.requires()} == {"bundle"}


def test_every_target_says_where_its_figures_were_published() -> None:
    for target in targets.TARGETS.values():
        assert target.source and target.bandwidth > 1e9 and 0 < target.free_bytes < target.memory_bytes
    assert set(targets.SHORT.values()) < set(targets.TARGETS)


def test_the_table_of_targets_in_the_docs() -> None:
    short = {name: other for other, name in targets.SHORT.items()}
    rows = []
    for target in targets.TARGETS.values():
        names = f"`{target.name}`" + (f", `{short[target.name]}`" if target.name in short else "")
        memory, system = f"{target.memory_bytes / 2**30:.0f} GiB", f"{target.system_bytes / 1e9:.1f} GB"
        rows.append(f"| {names} | {memory} | {system} | {target.bandwidth / 1e9:.1f} GB/s | {target.source} |")
    docs = (Path(__file__).parents[3] / "docs/edge.md").read_text(encoding="utf-8")
    assert docs.split("<!-- targets")[1].split("<!-- end of targets")[0].strip().splitlines()[3:] == rows


def test_a_type_that_does_not_fit_is_refused_before_anything_runs_and_the_largest_that_does_is_named() -> None:
    def step(type: str) -> Bundle:
        return Bundle.model_validate({"format": "bundle", "target": "rpi5", "type": type, "context": 4096})

    with pytest.raises(RequestError, match="the largest type that would fit is") as found:
        step("Q8_0").check(EIGHT_BILLION)
    named = str(found.value).split("would fit is ")[1].split()[0]
    step(named).check(EIGHT_BILLION)
    larger = {"F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M"}
    assert named == "Q2_K" or named in larger
    sizes = {type: Gguf.model_validate({"format": "gguf", "type": type}).predict(EIGHT_BILLION, 0) for type in larger}
    own = Gguf.model_validate({"format": "gguf", "type": named}).predict(EIGHT_BILLION, 0).disk_bytes
    for type, estimate in sizes.items():
        if estimate.disk_bytes > own:
            with pytest.raises(RequestError, match="does not fit"):
                step(type).check(EIGHT_BILLION)
    with pytest.raises(RequestError, match="no type would fit"):
        Bundle.model_validate({"format": "bundle", "target": "rpi4-1gb", "type": "Q4_0"}).check(EIGHT_BILLION)
    cache = 32 * 2 * 8 * 128 * 2 * 4096
    assert bundle.need_of(EIGHT_BILLION, 0, 4096).cache == cache


def test_without_a_type_a_model_is_planned_as_the_type_that_it_becomes() -> None:
    step = Bundle.model_validate({"format": "bundle", "target": "rpi4-1gb"})
    with pytest.raises(RequestError, match="does not fit: Q4_K_M"):
        step.after(None).check(EIGHT_BILLION)
    after_file = step.after(Gguf.model_validate({"format": "gguf", "type": "Q8_0"}))
    assert after_file.type is None
    after_file.check(EIGHT_BILLION)


def test_a_file_that_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(targets.TARGETS["rpi4-1gb"], memory_bytes=400_900_000)  # 100.9 MB beside the system
    monkeypatch.setitem(targets.TARGETS, "rpi4-1gb", small)
    with pytest.raises(Failure, match=r"does not fit: F32 .* no type would fit, not even"):
        build(tiny("llama"), tmp_path / "out", target="rpi4-1gb", type="F32", measure=False)


def test_figures_of_the_file(made: tuple[Path, dict[str, Any]]) -> None:
    out, facts = made
    model = bundle.read_model([out / MODEL])
    assert model.cache_per_token == 2 * 2 * 2 * 64 * 2
    assert facts["need_bytes"]["cache"] == 256 * model.cache_per_token
    assert facts["context"] == 256 and facts["size_bytes"] > model.size_bytes
    assert 0 < model.read_per_token < model.size_bytes
    measured = json.loads((out / "measured.json").read_text())
    predicted = measured["prediction"]
    assert predicted["decode_tok_s"] <= predicted["ceiling_tok_s"] == pytest.approx(facts["ceiling_tok_s"], abs=0.01)
    assert predicted["ceiling_tok_s"] == pytest.approx(17.068e9 / bundle.read_bytes(model))
    assert f"**{predicted['decode_tok_s']:.1f}**" in (out / "README.md").read_text()


def test_an_untied_embedding_is_not_read(made: tuple[Path, dict[str, Any]]) -> None:
    from lighten.model.gguf_header import read_header

    header = read_header(made[0] / MODEL)
    embedding = header.tensors["token_embd.weight"]
    everything = sum(tensor.size for tensor in header.tensors.values())
    model = bundle.read_model([made[0] / MODEL])
    assert model.read_per_token == pytest.approx(everything - embedding.size * (1 - 1 / embedding.shape[0]), abs=1)


def test_the_same_bytes_again(made: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    again, _ = build(tiny("llama"), tmp_path / "again", context=256, measure=False)
    names = set(bundle.contents(again))
    assert names == set(bundle.contents(made[0]))
    differ = {name for name in names if (again / name).read_bytes() != (made[0] / name).read_bytes()}
    assert differ == set(bundle.MEASURED)
    other, _ = build(tiny("llama"), tmp_path / "other", context=256, measure=False)
    os.utime(other / MODEL, (1, 1))
    assert {name.name: name.read_bytes() for name in again.iterdir()} == {
        name.name: name.read_bytes() for name in other.iterdir()
    }


def test_checksums(unpacked: Path) -> None:
    checked = clean(["sha256sum", "-c", "SHA256SUMS"], unpacked)
    assert checked.returncode == 0, checked.stdout
    listed = {line.split()[1] for line in (unpacked / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in unpacked.iterdir()} - {*bundle.MEASURED, "SHA256SUMS"}
    with (unpacked / MODEL).open("r+b") as file:
        file.write(b"x")
    assert clean(["sha256sum", "-c", "SHA256SUMS"], unpacked).returncode == 1


def test_bench_runs_from_the_archive_without_lighten(unpacked: Path) -> None:
    pytest.importorskip("llama_cpp", reason="a device runs llama-cpp-python, which is compiled")
    script = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('lighten', 'torch', 'gguf', 'psutil')));"
        "sys.argv = ['bench.py', '--repeats', '2', '--length', '64', '--chunks', '3', '--threads', '1'];"
        "runpy.run_path('bench.py', run_name='__main__')"
    )
    done = clean([sys.executable, "-I", "-c", script], unpacked)
    assert done.returncode == 0, done.stderr
    results = load(unpacked / "results.json")
    (row,) = results.variants
    assert (row.name, row.format, row.runtime, row.size_bytes) == (
        "tiny-Q4_K_M",
        "gguf",
        "llama.cpp",
        (unpacked / MODEL).stat().st_size,
    )
    assert results.machine["name"] and results.machine["packages"]
    speed = row.speed[0]
    assert speed.token_ms and speed.ttft_ms and row.memory and row.memory.peak_rss_bytes
    assert speed.repeats == 2 and speed.decode_tok_s and speed.token_ms.p50 <= speed.token_ms.p99
    assert 20e6 < row.memory.peak_rss_bytes < 400e6  # not that of the process that started it
    assert row.perplexity and row.perplexity.tokens == 189
    # another build of llama.cpp: whether it takes flash attention moves this model's perplexity by 0.3 %
    assert row.perplexity.value == pytest.approx(perplexity(unpacked, 64, 3), rel=5e-3)


def perplexity(folder: Path, length: int, chunks: int) -> float:
    """Returns what our own runtime says of a bundle's text."""
    runtime = LlamaCppRuntime(folder / MODEL, "cpu")
    ids = runtime.encode((folder / "perplexity.txt").read_text())
    losses = []
    for start in range(0, chunks * length, length):
        chunk = np.array(ids[start : start + length])
        logits = runtime.logits(chunk)[:-1].astype(np.float64)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(length - 1), chunk[1:]])
    runtime.close()
    return float(np.exp(np.mean(losses)))


def test_bench_and_our_runtime_say_the_same_by_one_build(unpacked: Path) -> None:
    script = "import sys; from lighten.model.llama_library import run_script; from pathlib import Path; "
    script += "run_script(Path(sys.argv[1]), sys.argv[2:])"
    asked = ["--repeats", "2", "--length", "64", "--chunks", "3", "--threads", "1"]
    command = [*interpreter(), "-c", script, str(unpacked / "bench.py"), *asked]
    done = subprocess.run(command, cwd=unpacked, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = load(unpacked / "results.json").variants
    assert row.perplexity and row.perplexity.tokens == 189
    assert row.perplexity.value == pytest.approx(perplexity(unpacked, 64, 3), rel=1e-6)


def test_chat_runs_from_the_archive(unpacked: Path) -> None:
    pytest.importorskip("llama_cpp", reason="a device runs llama-cpp-python, which is compiled")
    done = clean(["sh", "run.sh", "--tokens", "6"], unpacked, input="Hello there\n\n", env={"PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stderr == ""
    assert not (unpacked / "venv").exists()


def test_without_llama_cpp_an_environment_is_made_beside_it(unpacked: Path, tmp_path: Path) -> None:
    # a python3 that has nothing; what it makes as a venv has everything once pip ran, and notes how it is called
    inner = 'if [ "$1" = -c ]; then [ -f "$0.pip" ]; exit; fi; if [ "$2" = pip ]; then echo "$@" > "$0.pip"; exit; fi'
    inner += '; echo "ran $@"'
    outer = 'if [ "$1" = -c ]; then exit 1; fi; mkdir -p "$3/bin"; cp "$INNER" "$3/bin/python"'
    folder = fake_python(tmp_path / "bin", outer)
    real = fake_python(tmp_path / "inner", inner) / "python3"
    env = {"PATH": f"{folder}:/usr/bin:/bin", "INNER": str(real)}
    done = clean(["sh", str(unpacked / "run.sh"), "--tokens", "3"], tmp_path, env=env)
    assert done.stdout == f"ran -B {unpacked}/chat.py --tokens 3\n", done.stderr
    asked = (unpacked / "venv/bin/python.pip").read_text()
    assert asked == f"-m pip install -r {unpacked}/requirements.txt\n"
    nothing = clean(["/bin/sh", str(unpacked / "run.sh")], tmp_path, env={"PYTHON": "no-such-python"})
    assert nothing.returncode == 127 and "install Python" in nothing.stderr


def test_an_environment_that_was_not_finished_is_made_again(unpacked: Path, tmp_path: Path) -> None:
    (unpacked / "venv").mkdir()
    half = fake_python(unpacked / "venv" / "bin", "exit 1")  # what is left where ensurepip is missing
    (half / "python3").rename(half / "python")
    folder = fake_python(tmp_path / "bin", 'if [ "$1" = -c ]; then exit 1; fi; echo "made $3"; exit 1')
    done = clean(["sh", str(unpacked / "run.sh")], tmp_path, env={"PATH": f"{folder}:/usr/bin:/bin"})
    assert done.returncode == 1 and f"made {unpacked}/venv" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("install venv (Debian: apt install python3-venv)")


def test_the_server_is_bound_to_loopback(unpacked: Path, tmp_path: Path) -> None:
    folder = fake_python(
        tmp_path / "bin", 'case "$1" in -c) ;; -B) echo 3;; *) echo "$@ HOST=$HOST PORT=$PORT$CONFIG_FILE";; esac'
    )
    env = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "HOST": "",
        "CONFIG_FILE": "x",
    }  # the server listens everywhere if that reaches it
    done = clean(["sh", str(unpacked / "serve.sh")], tmp_path, env=env)
    assert done.stdout.startswith(f"-m llama_cpp.server --model {unpacked}/{MODEL} ")
    assert "--n_ctx 256" in done.stdout and "--n_threads 3 --n_threads_batch 3 --flash_attn true" in done.stdout
    assert done.stdout.endswith("--host 127.0.0.1 --port 8080 HOST=127.0.0.1 PORT=8080\n")
    unit = configparser.RawConfigParser()
    unit.read(unpacked / "model.service")
    assert unit["Service"]["ExecStart"] == "/bin/sh /opt/bundle-rpi5-8gb/serve.sh"


def test_requirements_are_pinned_to_what_is_used_here(unpacked: Path) -> None:
    pytest.importorskip("llama_cpp", reason="a device runs llama-cpp-python, which is compiled")
    from importlib.metadata import version

    lines = (unpacked / "requirements.txt").read_text().splitlines()
    assert f"llama-cpp-python=={version('llama-cpp-python')}" in lines
    assert f"numpy=={version('numpy')}" in lines
    server = (unpacked / "requirements-server.txt").read_text().splitlines()
    assert set(lines[1:]) < set(server) and any(line.startswith("uvicorn==") for line in server)
    assert all("==" in line for line in server[1:]) and not any("://" in line for line in server)


def test_requirements_where_no_llama_cpp_python_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(bundle, "version", nothing)
    assert bundle.pins().keys() == {
        "llama-cpp-python",
        "numpy",
        "jinja2",
        "markupsafe",
        "diskcache",
        "typing-extensions",
    }


def test_a_gguf_artifact_is_taken_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "gguf"
    source.mkdir()
    facts = Gguf.model_validate({"format": "gguf", "type": "Q8_0"}).run(
        Artifact(tiny("llama"), {"format": "hf"}), source, Context()
    )
    held = Artifact(source, {"format": "gguf", "facts": facts})
    out = tmp_path / "out"
    out.mkdir()
    step = Bundle.model_validate({"format": "bundle", "target": "laptop-cpu", "measure": False})
    context = Context()
    made = step.run(held, out, context)
    assert made["type"] == "Q8_0" and made["context"] == 512
    assert context.warnings == ["the model was trained for 512 tokens: the bundle's context is that"]
    assert (out / "model-Q8_0.gguf").read_bytes() == (source / "model-Q8_0.gguf").read_bytes()
    with pytest.raises(RequestError, match="of type Q8_0 already"):
        Bundle.model_validate({"format": "bundle", "target": "rpi5", "type": "Q4_0"}).run(held, out, context)
    with pytest.raises(RequestError, match="this one is gptq"):
        step.run(Artifact(source, {"format": "gptq"}), out, context)


def test_a_bundle_that_does_not_run_here_says_so(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    out, _ = build(tiny("llama"), tmp_path / "out", context=256)
    assert "Not measured: the bundle does not run here" in (out / "README.md").read_text()
    assert json.loads((out / "measured.json").read_text()) is None
