"""Results as a run over SmolLM2-135M leaves them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from lighten.results.results import Results

PROTOCOL = {"data": "builtin", "sha256": "9f2c51d07a64", "length": 512, "stride": 512, "windows": 40, "bos": False}

RECIPE = """\
name: quickstart
model: demo:smollm2-135m
calibration: {data: builtin, samples: 64, length: 512}
variants:
  gptq-int4:   [{quantize: {method: gptq, bits: 4, group_size: 64}}]
  gguf-f16:    [{export: {format: gguf, type: F16}}]
  gguf-q8_0:   [{export: {format: gguf, type: Q8_0}}]
  gguf-q4_k_m: [{export: {format: gguf, type: Q4_K_M, imatrix: true}}]
evaluate:
  perplexity: {data: builtin, length: 512}
  accuracy: {task: builtin}
  speed: {prompt: 128, generate: 64, batch: [1, 4]}
"""


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def speed(batch: int, prefill: float, decode: float, ttft: float, dtype: str) -> dict[str, Any]:
    token = 1000 * batch / decode
    return {
        "batch": batch,
        "prompt": 128,
        "generate": 64,
        "prefill_tok_s": prefill,
        "decode_tok_s": decode,
        "ttft_ms": {"p50": ttft, "p95": ttft * 1.13, "p99": ttft * 1.31},
        "token_ms": {"p50": token, "p95": token * 1.09, "p99": token * 1.42},
        "repeats": 5,
        "spread": 0.031,
        "error": 0.012,
        "drift": 0.0,
        "dtype": dtype,
        "prefill_dtype": None,
        "attention": None,
        "compile": None,
        "cache": None,
    }


def loads(form: str) -> list[dict[str, Any]]:
    """What each loader made of a format: GPTQModel is not installed, and transformers cannot read the GGUF files."""
    said: dict[str, tuple[str, float | None, str | None]] = {"transformers": ("ok", 2.31, None)}
    if form == "gguf":
        said = {"llama.cpp": ("ok", 0.42, None), "transformers": ("failed", 3.1, "ValueError: <no> | such type")}
    if form == "gptq":
        said["GPTQModel"] = ("absent", None, "needs gptqmodel: pip install 'lighten[gptq]'")
    versions = {"transformers": "5.23.0", "GPTQModel": None, "llama.cpp": "0.3.36", "onnxruntime": "1.32.0"}
    rows = [(name, version, *said.get(name, ("other", None, None))) for name, version in versions.items()]
    return [dict(zip(("loader", "version", "status", "seconds", "error"), row, strict=True)) for row in rows]


def variant(
    name: str,
    *,
    form: str,
    runtime: str,
    size: int,
    bits: float,
    ppl: float,
    rise: tuple[float, float, float] | None,
    kl: tuple[float, float, float] | None,
    acc: tuple[int, int, int, int],
    rates: tuple[float, float, float],
    rss: int,
    dtype: str,
    facts: dict[str, Any],
    steps: list[dict[str, Any]],
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """`acc` is (right, right when normalised, gained, lost) of 120 tasks; `rates` prefill, decode, ttft at batch 1."""
    n = 120

    def ci(right: int) -> list[float]:
        half = 1.96 * math.sqrt(right / n * (1 - right / n) / n)
        return [round(right / n - half, 4), round(right / n + half, 4)]

    made: dict[str, Any] = {
        "name": name,
        "path": f"variants/{name}",
        "key": key(name),
        "status": "ok",
        "error": None,
        "format": form,
        "runtime": runtime,
        "device": "cpu",
        "size_bytes": size,
        "bits_per_weight": bits,
        "params": 134_515_008,
        "training": None,
        "perplexity": {
            "value": ppl,
            "stderr": ppl * 0.0171,
            "tokens": 20440,
            "levels": None,
            "bits_per_byte": None,
            "protocol": PROTOCOL,
        },
        "other_perplexity": [],
        "vocabulary": None,
        "divergence": None,
        "accuracy": [
            {
                "task": "builtin",
                "acc": acc[0] / n,
                "acc_norm": acc[1] / n,
                "n": n,
                "ci95": ci(acc[0]),
                "ci95_norm": ci(acc[1]),
                "scorer": "lighten",
                "version": None,
                "metric": None,
                "metrics": [],
                "truncated": None,
                "chat": False,
                "system": None,
            }
        ],
        "speed": [
            speed(1, *rates, dtype),
            speed(4, rates[0] * 1.16, rates[1] * 2.7, rates[2] * 3.5, dtype),
        ],
        "load": [],
        "speculative": None,
        "memory": {"peak_rss_bytes": rss, "peak_vram_bytes": None, "dtype": dtype},
        "energy": {"joules_per_token": None, "note": "this machine has no energy counter that can be read"},
        "roofline": None,
        "unavailable": [],
        **dict.fromkeys(("translation", "similarity", "masked")),
        "sentences": [],
        "cost": None,
        "delta": None,
        "loads": loads(form),
        "facts": facts,
        "steps": steps,
        "notes": list(notes),
    }
    if kl:
        made["divergence"] = {"kl_mean": kl[0], "kl_p99": kl[1], "top1_agreement": kl[2]}
    if rise:
        made["delta"] = {
            "perplexity": {
                "protocol": None,
                "relative": rise[0],
                "ci95": [rise[1], rise[2]],
                "absolute": round(25.6033 * rise[0], 4),
            },
            "other_perplexity": [],
            "accuracy": [
                {
                    "task": "builtin",
                    "acc": (acc[2] - acc[3]) / n,
                    "acc_ci95": [(acc[2] - acc[3] - 5) / n, (acc[2] - acc[3] + 5) / n],
                    "acc_norm": (acc[2] - acc[3]) / n,
                    "acc_norm_ci95": [(acc[2] - acc[3] - 5) / n, (acc[2] - acc[3] + 5) / n],
                    "gained": acc[2],
                    "lost": acc[3],
                }
            ],
            "decode_speed_ratio": rates[1] / 31.42,
            "size_ratio": size / 269060552,
        }
    return made


def allocation() -> dict[str, Any]:
    """More bits for the first and last layers, for v and down, and for the embedding."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    made = {"model.embed_tokens": {"type": "Q8_0", "bits": 8.5}}
    for layer in range(30):
        for module in attention + mlp:
            rich = layer in (0, 1, 28, 29) or (module.endswith(("v_proj", "down_proj")) and layer % 3 == 0)
            best = layer == 0 and module == "mlp.down_proj"
            made[f"model.layers.{layer}.{module}"] = (
                {"type": "Q8_0", "bits": 8.5}
                if best
                else {"type": "Q5_0", "bits": 5.5}
                if rich
                else {"type": "Q4_K", "bits": 4.5}
            )
    return made


def raw_overlapping() -> dict[str, Any]:
    """A run whose calibration text holds part of the text that perplexity was measured on."""
    value = raw()
    value["calibration"]["overlap"][0] |= {
        "with": "perplexity wikitext2_test.txt",
        "share": 0.1234,
        "examples": ["the tower is 324 metres tall and the tallest structure in paris <b>", "*starred* [a](b)"],
    }
    return value


def stage(
    name: str,
    kind: str,
    variants: list[str],
    predicted: tuple[float, int, int],
    actual: tuple[float, int, int],
    *,
    cached: bool = False,
) -> dict[str, Any]:
    names = ("seconds", "peak_bytes", "disk_bytes")
    return {
        "name": name,
        "kind": kind,
        "key": key(name),
        "variants": variants,
        "cached": cached,
        "predicted": dict(zip(names, predicted, strict=True)),
        "actual": dict(zip(names, actual, strict=True)),
    }


def raw() -> dict[str, Any]:
    """Baseline and four variants, all measured."""
    variants = [
        variant(
            "baseline",
            form="hf",
            runtime="torch",
            size=269060552,
            bits=16.0,
            ppl=25.6033,
            rise=None,
            kl=None,
            acc=(52, 58, 0, 0),
            rates=(1184.0, 31.42, 108.3),
            rss=1_213_000_000,
            dtype="float32",
            facts={"dtype": "bfloat16", "architecture": "LlamaForCausalLM"},
            steps=[],
        ),
        variant(
            "gptq-int4",
            form="gptq",
            runtime="torch",
            size=113_954_816,
            bits=6.78,
            ppl=29.3702,
            rise=(0.14713, 0.1388, 0.1556),
            kl=(0.15232, 1.204, 0.8127),
            acc=(50, 56, 3, 5),
            rates=(402.1, 14.87, 318.4),
            rss=1_402_000_000,
            dtype="float32",
            facts={
                "bits": 4,
                "group_size": 64,
                "sym": True,
                "desc_act": False,
                "quantized_tensors": 210,
                "kept": [
                    {"what": "lm_head", "why": "tied to the embedding"},
                    *({"what": f"model.layers.{i}.mlp.down_proj", "why": "ignore"} for i in range(9)),
                    {"what": "norms", "why": "too small to matter"},
                ],
            },
            steps=[{"quantize": {"method": "gptq", "bits": 4, "group_size": 64, "damp_percent": 0.01}}],
            notes=("Runs on CPU through a reference kernel: its speed here says nothing about a GPU.",),
        ),
        variant(
            "gguf-f16",
            form="gguf",
            runtime="llama.cpp",
            size=270_885_632,
            bits=16.1,
            ppl=25.6036,
            rise=(0.0000117, -0.00009, 0.00011),
            kl=(0.0000093, 0.00011, 0.9991),
            acc=(52, 58, 0, 0),
            rates=(742.0, 47.91, 173.1),
            rss=402_100_000,
            dtype="f16",
            facts={"type": "F16", "tensor_types": {"F16": 211, "F32": 61}, "fallbacks": {"count": 0, "of": 272}},
            steps=[{"export": {"format": "gguf", "type": "F16"}}],
        ),
        variant(
            "gguf-q8_0",
            form="gguf",
            runtime="llama.cpp",
            size=144_811_904,
            bits=8.61,
            ppl=25.6161,
            rise=(0.0005, -0.0003, 0.0013),
            kl=(0.00118, 0.0112, 0.9792),
            acc=(52, 58, 1, 1),
            rates=(861.0, 78.4, 149.2),
            rss=276_300_000,
            dtype="q8_0",
            facts={"type": "Q8_0", "tensor_types": {"Q8_0": 211, "F32": 61}, "fallbacks": {"count": 0, "of": 272}},
            steps=[{"export": {"format": "gguf", "type": "Q8_0"}}],
        ),
        variant(
            "gguf-q4_k_m",
            form="gguf",
            runtime="llama.cpp",
            size=105_454_304,
            bits=6.27,
            ppl=26.4427,
            rise=(0.03278, 0.0294, 0.0362),
            kl=(0.03912, 0.3177, 0.9014),
            acc=(51, 57, 2, 3),
            rates=(713.0, 96.2, 180.5),
            rss=233_900_000,
            dtype="q4_k_m",
            facts={
                "type": "Q4_K_M",
                "imatrix": True,
                "tensor_types": {"Q4_K": 31, "Q5_0": 150, "Q6_K": 1, "Q8_0": 29, "F32": 61},
                "fallbacks": {"count": 180, "of": 272},
                "allocation": allocation(),
            },
            steps=[{"export": {"format": "gguf", "type": "Q4_K_M", "imatrix": True}}],
            notes=("Rows of 576 are no multiple of 256: 180 of 272 tensors took a larger type.",),
        ),
    ]
    gguf = ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]
    return {
        "schema": 1,
        "recipe": "quickstart",
        "version": "v3",
        "created": "2026-11-22T02:36:14Z",
        "machine": {
            "cpu": "AMD EPYC 9B14",
            "cores": 2,
            "memory_bytes": 16_764_289_024,
            "gpu": None,
            "os": "Linux 6.1, Debian 12",
            "python": "3.11.2",
            "versions": {"lighten": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "llama_cpp": "0.3.36"},
        },
        "source": {
            "model": "demo:smollm2-135m",
            "params": 134515008,
            "licence": "Apache-2.0",
            "architecture": "LlamaForCausalLM",
            "layers": 30,
            "hidden": 576,
            "vocab": 49152,
            "size_bytes": 269060552,
        },
        "variants": variants,
        "calibration": {
            "data": "builtin",
            "asked": 64,
            "samples": 35,
            "length": 512,
            "tokens": 17920,
            "distinct": 4211,
            "vocabulary": 49152,
            "overlap": [
                {"with": "perplexity builtin", "ngram": 13, "share": 0.0, "runs": 12665, "examples": []},
                {"with": "accuracy builtin", "ngram": 13, "share": 0.0031, "runs": 21000, "examples": ["to be or not"]},
            ],
        },
        "stages": [
            stage(
                "sweep",
                "sweep",
                ["gptq-int4", "gguf-q4_k_m"],
                (61.0, 1_310_000_000, 412_000_000),
                (58.3, 1_288_000_000, 409_772_032),
                cached=True,
            ),
            stage(
                "quantize gptq 4",
                "quantize",
                ["gptq-int4"],
                (42.0, 940_000_000, 114_000_000),
                (37.8, 1_012_000_000, 113_954_816),
            ),
            stage("export F16", "export", gguf, (4.0, 610_000_000, 271_000_000), (3.1, 588_000_000, 270_885_632)),
            stage(
                "export Q8_0", "export", ["gguf-q8_0"], (2.0, 450_000_000, 144_000_000), (1.4, 431_000_000, 144_811_904)
            ),
            stage(
                "export Q4_K_M",
                "export",
                ["gguf-q4_k_m"],
                (6.0, 450_000_000, 102_000_000),
                (8.7, 437_000_000, 105_454_304),
            ),
            stage(
                "evaluate gguf-q4_k_m",
                "evaluate",
                ["gguf-q4_k_m"],
                (150.0, 240_000_000, 0),
                (171.2, 233_900_000, 4_211),
            ),
        ],
        "recipe_yaml": RECIPE,
        "warnings": ["The built-in text and tasks are a smoke test: do not rank models by them."],
    }


def raw_failed() -> dict[str, Any]:
    """The same, and a variant that failed."""
    value = raw()
    value["variants"].insert(
        2,
        {
            "name": "nf4",
            "path": None,
            "key": None,
            "status": "failed",
            "error": "the worker was killed by signal 9 while it quantized layer 17: out of memory (peak 15.9 GB)\n"
            "Use a machine with more memory, or lower calibration.samples.",
            "steps": [{"quantize": {"method": "nf4"}}],
        },
    )
    return value


def results() -> Results:
    return Results.model_validate(raw())


def with_failure() -> Results:
    return Results.model_validate(raw_failed())
