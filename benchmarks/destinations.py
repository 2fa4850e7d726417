"""One model on every runtime that lighten exports to, and its decoding beside what the format's own tool makes.

    python benchmarks/destinations.py --nncf PYTHON

Runs the recipe `destinations`, then lets each format's own tool write the same model, and decodes with both in turn.
Writes benchmarks/results/destinations.json after every pair; the artifacts stay, so a run that was stopped goes on.
--nncf is the Python of an environment with nncf and openvino, which makes OpenVINO's 4 bits. What a format has no tool
of its own for is told in words.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx_export import build_alone
from quantizers import HERE, earlier
from turns import PROMPT, STEPS, decode_in_turn

import lighten
from lighten.cli.progress import watching
from lighten.evaluate import machine
from lighten.model.ctranslate2_source import COMPUTE_TYPE
from lighten.store.store import write_json

RESULTS = HERE / "results" / "destinations.json"
KEPT = ("name", "status", "error", "format", "runtime", "size_bytes", "perplexity", "divergence", "parity")
GROUP = 32
"""Weights that share a scale, as in the recipe."""
CONTEXT = 2048
"""Positions of an ExecuTorch program, as ours has."""
TURN, FEWEST = 10, 8
"""Seconds of a turn, and the fewest tokens of one."""
Make = Callable[["Bench", Path, Path], Path]


class Lacking(Exception):
    """A tool that was not given."""


class Bench:
    """What the tools are given."""

    def __init__(self, variants: Path, nncf: str | None, tools: Path | None) -> None:
        self.variants, self.nncf, self.tools = variants, nncf, tools
        self.source, self.gptq = variants / "baseline", variants / "gptq"


def builder(precision: str) -> Make:
    """Returns how onnxruntime-genai's builder makes a graph on its own."""

    def make(bench: Bench, _ours: Path, out: Path) -> Path:
        if precision == "int4":
            build_alone(bench.gptq, out, {})
        else:
            from lighten.export.onnx.genai import build

            build(bench.source, out, precision, "cpu", {"hf_token": "false"})
        return out

    return make


def mlx(**settings: Any) -> Make:
    """Returns how mlx_lm.convert makes a directory."""

    def make(bench: Bench, _ours: Path, out: Path) -> Path:
        import mlx_lm

        mlx_lm.convert(str(bench.source), str(out), **settings)
        return out

    return make


def ctranslate2(quantization: str, compute_type: str | None = None) -> Make:
    """Returns how CTranslate2's converter makes a directory, which is opened with a type of the products."""

    def make(bench: Bench, _ours: Path, out: Path) -> Path:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(bench.source)).convert(str(out), quantization=quantization)
        if compute_type:
            file = out / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), COMPUTE_TYPE: compute_type}))
        return _with_tokenizer(bench.source, out)

    return make


def llama_quantize(bench: Bench, _ours: Path, out: Path) -> Path:
    """Lets llama-quantize round our F16 file to Q4_0."""
    from llama_tools import build

    if bench.tools is None:
        raise Lacking("needs --tools, where llama.cpp's tools are built")
    (program,) = build(bench.tools, "llama-quantize")
    out.mkdir()
    plain = next((bench.variants / "gguf").glob("*.gguf"))
    subprocess.run([str(program), str(plain), str(out / "model-Q4_0.gguf"), "Q4_0"], check=True, capture_output=True)
    return out / "model-Q4_0.gguf"


def openvino_plain(bench: Bench, _ours: Path, out: Path) -> Path:
    """Lets transformers' own exporter and openvino write the graph in float16."""
    import openvino
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    from lighten.export.openvino.convert import _inputs

    model = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs, axes = _inputs(model)
        settings = OpenVINOConfig(dynamic=True, dynamic_shapes=axes)
        graph, _ = OpenVINOExporter().export_program(model, inputs, settings)
    out.mkdir()
    openvino.save_model(graph, out / "openvino_model.xml", compress_to_fp16=True)
    return _with_tokenizer(bench.source, out)


NNCF = """
import sys, nncf, openvino
model = openvino.Core().read_model(sys.argv[1] + "/openvino_model.xml")
asked = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": int(sys.argv[3]), "ratio": 1.0}
openvino.save_model(nncf.compress_weights(model, **asked), sys.argv[2] + "/openvino_model.xml")
"""


def openvino_nncf(bench: Bench, _ours: Path, out: Path) -> Path:
    """Lets nncf round the graph of float16 to 4 bits: embedding and head to 8, as it does by itself."""
    if bench.nncf is None:
        raise Lacking("needs --nncf, the Python of an environment with nncf")
    command = [bench.nncf, "-c", NNCF, str(bench.variants / "openvino"), str(out), str(GROUP)]
    out.mkdir()
    subprocess.run(command, check=True, capture_output=True)
    return _with_tokenizer(bench.source, out)


LLAMA_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Names of executorch's own model for those of transformers."""


def _llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _plain_weights(bench: Bench) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights = {_llama_name(name): each.float() for name, each in load_file(bench.source / "model.safetensors").items()}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return weights


def _codes(bench: Bench) -> dict[str, Any]:
    """Returns the codes of the GPTQ checkpoint in groups, and head and embedding in 8 bits, as our program has them."""
    from lighten.export.executorch.linears import keep, rounded
    from lighten.export.onnx.weights import Quantized
    from lighten.model.checkpoint import Checkpoint

    kept, found, stored = Quantized(Checkpoint(bench.gptq)), {}, {}
    for name, tensor in _plain_weights(bench).items():
        if name.startswith(("output", "tok_embeddings")):
            stored[name] = rounded(tensor, 8, None)
        elif "norm" in name:
            found[name] = tensor
    for name in kept.names:
        stored[f"{_llama_name(name)}.weight"] = each = keep(kept.codes(name), name)
        if each.offsets is not None or each.order is not None:
            raise Lacking(f"{name} has scales below zero, zero points or an order of its own: export_llm has none")
    for name, each in stored.items():
        found[name] = each.codes
        found[name.replace(".weight", ".scales")] = each.scales[:, 0] if each.bits == 8 else each.scales
    return found


def export_llm(*flags: str, weights: Callable[[Bench], dict[str, Any]] = _plain_weights) -> Make:
    """Returns how executorch's export_llm makes a program, from weights with the names that it knows."""

    def make(bench: Bench, _ours: Path, out: Path) -> Path:
        import torch

        config = json.loads((bench.source / "config.json").read_text())
        out.mkdir()
        torch.save(weights(bench), out / "weights.pth")
        rope = config.get("rope_parameters") or config
        params = {
            "dim": config["hidden_size"],
            "hidden_dim": config["intermediate_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"],
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": rope["rope_theta"],
            "vocab_size": config["vocab_size"],
            "use_scaled_rope": False,
            "use_hf_rope": True,
            "quantization_args": {"group_size": GROUP},
        }
        (out / "params.json").write_text(json.dumps(params))
        told = [
            "base.model_class=smollm2",
            f"base.checkpoint={out / 'weights.pth'}",
            f"base.params={out / 'params.json'}",
            'base.metadata=\'{"get_bos_id":0,"get_eos_ids":[0]}\'',
            "model.use_kv_cache=True",
            "model.use_sdpa_with_kv_cache=True",
            "backend.xnnpack.enabled=True",
            "backend.xnnpack.extended_ops=True",
            f"export.max_seq_length={CONTEXT}",
            f"export.max_context_length={CONTEXT}",
            f"export.output_dir={out}",
            "export.output_name=model.pte",
            *flags,
        ]
        command = [sys.executable, "-m", "executorch.extension.llm.export.export_llm", *told]
        # the package imports its models as `examples.models`
        import executorch.examples

        (out / "own").mkdir()
        (out / "own" / "examples").symlink_to(executorch.examples.__path__[0])
        env = {**os.environ, "PYTHONPATH": str(out / "own")}
        subprocess.run(command, check=True, capture_output=True, cwd=out, env=env)
        shutil.rmtree(out / "own")
        (out / "weights.pth").unlink()
        return _with_tokenizer(bench.source, out)

    return make


def _with_tokenizer(source: Path, out: Path) -> Path:
    for file in (*source.glob("tokenizer*"), source / "config.json"):
        if not (out / file.name).exists():
            shutil.copy(file, out)
    return out


OWN: dict[str, tuple[str, Make]] = {
    "gptq-gguf": ("llama-quantize, Q4_0", llama_quantize),
    "onnx": ("onnxruntime-genai's builder, fp32", builder("fp32")),
    "gptq-onnx": ("onnxruntime-genai's builder, of the same GPTQ weights", builder("int4")),
    "openvino": ("transformers' exporter, float16", openvino_plain),
    "gptq-openvino": ("nncf, INT4_SYM", openvino_nncf),
    "mlx": ("mlx_lm.convert, float32", mlx(dtype="float32")),
    "gptq-mlx": ("mlx_lm.convert, 4 bits", mlx(quantize=True, q_bits=4, q_group_size=GROUP, dtype="float32")),
    "ctranslate2": ("CTranslate2's converter, float32", ctranslate2("float32")),
    "gptq-ctranslate2": ("CTranslate2's converter, int8", ctranslate2("int8")),
    "gptq-ctranslate2-float": ("CTranslate2's converter, int8, opened with float32", ctranslate2("int8", "float32")),
    "executorch": ("export_llm, fp32", export_llm()),
    "gptq-executorch": (
        "export_llm, of the same GPTQ weights, head in 8 bits",
        export_llm(
            "quantization.use_qat=True",
            "base.preq_mode=preq_8da4w_out_8da8w",
            f"base.preq_group_size={GROUP}",
            'base.preq_embedding_quantize="8,0"',
            weights=_codes,
        ),
    ),
}
"""The format's own tool for a variant of the recipe."""
ALSO: dict[str, tuple[str, Make]] = {
    "gptq-executorch": (
        "export_llm, 8da4w, head in 4 bits",
        export_llm(
            "quantization.qmode=8da4w", f"quantization.group_size={GROUP}", 'quantization.embedding_quantize="8,0"'
        ),
    ),
}
"""What the tool makes by itself where it rounds more than the variant does: shown beside it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="destinations")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--nncf", help="Python of an environment with nncf")
    parser.add_argument("--tools", type=Path, help="where llama.cpp's tools are built")
    parser.add_argument("--only", action="append", choices=OWN, help="pairs to decode (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="of decoding, of each opening")
    parser.add_argument("--openings", type=int, default=16, help="of each pair")
    parser.add_argument("--seconds", type=float, default=100, help="after which a pair is not opened again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with watching(quiet=False) as watcher:
        version = lighten.run(asked.recipe, artifacts=asked.artifacts, watcher=watcher)
    results = json.loads((version / "results.json").read_text(encoding="utf-8"))
    kept = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else {}
    pairs: dict[str, Any] = kept.get("decode", {})
    also: dict[str, Any] = kept.get("also", {})
    bench = Bench(version / "variants", asked.nncf, asked.tools)
    command = " ".join(["python benchmarks/destinations.py", *_flags(asked)])
    head = {
        "command": command,
        "earlier": earlier(kept, command),
        "machine": machine.fingerprint(),
        "settings": {
            "model": results["source"]["model"],
            "prompt": PROMPT,
            "generate": STEPS,
            "turns": asked.turns,
            "openings": asked.openings,
        },
        "rows": [{key: variant.get(key) for key in KEPT} for variant in results["variants"]],
    }
    write_json(asked.out, {**head, "decode": pairs, "also": also})
    made = {row["name"] for row in head["rows"] if row["status"] == "ok"}
    for found, tools in ((pairs, OWN), (also, ALSO)):
        for name, (tool, make) in tools.items():
            if name not in made or name in found or (asked.only and name not in asked.only):
                continue
            print(name, tool, flush=True)
            found[name] = pair(bench, name, tool, make, asked)
            print(found[name], flush=True)
            write_json(asked.out, {**head, "decode": pairs, "also": also})


def pair(bench: Bench, name: str, tool: str, make: Make, asked: argparse.Namespace) -> dict[str, Any]:
    """Returns the decoding of a variant beside what a tool makes, or why there is none."""
    work = asked.artifacts / "own" / name
    copy = asked.artifacts / "own" / f"{name}-ours"
    for folder in (work, copy):
        shutil.rmtree(folder, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    ours = bench.variants / name
    try:
        theirs = make(bench, ours, work)
        shutil.copytree(ours, copy)  # files of one age: where their pages lie in memory makes a difference
        speed = decode(copy, theirs, asked)
    except Lacking as error:
        return {"tool": tool, "error": str(error)}
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return {"tool": tool, "error": said[-1] if said else str(error)}
    finally:
        for folder in (work, copy):
            shutil.rmtree(folder, ignore_errors=True)
    return {"tool": tool, **speed}


def decode(ours: Path, theirs: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Returns the medians of tokens per second, and the median of the turns' ratios.

    Both are opened many times, for the pages that a model gets make it faster or slower, and less often if that takes
    longer than some seconds: a slow model's turns are long, and tell more each. It writes fewer tokens, too.
    """
    steps = _steps(ours)
    mine: list[float] = []
    others: list[float] = []
    start, opened = time.monotonic(), 0
    while opened < asked.openings and (opened == 0 or time.monotonic() - start < asked.seconds):
        found = decode_in_turn(ours, theirs, asked.turns, steps=steps)
        mine += found["ours"]
        others += found["theirs"]
        opened += 2
    ratio = statistics.median(one / other for one, other in zip(mine, others, strict=True))
    medians = {"ours_tok_s": statistics.median(mine), "theirs_tok_s": statistics.median(others)}
    return {**medians, "ratio": ratio, "openings": opened, "turns": len(mine), "generate": steps}


def _steps(model: Path) -> int:
    """Returns the tokens of a turn: fewer where they would take longer than `TURN` seconds."""
    from lighten.evaluate.runtimes.choose import open_runtime

    runtime = open_runtime(model)
    try:
        passed = runtime.generate(np.random.default_rng(0).integers(0, runtime.vocab, (1, PROMPT)), FEWEST).token_s
    finally:
        runtime.close()
    return int(min(STEPS, max(FEWEST, TURN // statistics.median(passed))))


def _flags(asked: argparse.Namespace) -> list[str]:
    """Returns the flags that were given, without the places of this machine."""
    places = {"--nncf PYTHON": asked.nncf, "--tools DIR": asked.tools}
    only = [f"--only {name}" for name in asked.only or ()]
    numbers = [f"--{name} {getattr(asked, name):g}" for name in ("turns", "openings", "seconds")]
    return [*(flag for flag, given in places.items() if given), *only, *numbers]


if __name__ == "__main__":
    main()
