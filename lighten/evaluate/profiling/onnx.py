"""An ONNX graph under onnxruntime's own profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lighten.evaluate.profiling import PHASES, clock, drive
from lighten.evaluate.profiling.verdict import Kind, Phase, collected
from lighten.evaluate.runtimes.onnx import OnnxRuntime
from lighten.store.store import write_file

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulInteger"), "products"),
    "DynamicQuantizeMatMul": "products",
    **dict.fromkeys(("GroupQueryAttention", "MultiHeadAttention", "Attention", "Softmax"), "attention"),
    **dict.fromkeys(("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"), "dequantization"),
    **dict.fromkeys(("Gather", "GatherBlockQuantized"), "head"),
    **dict.fromkeys(("Cast", "Concat", "Transpose", "Expand", "Identity", "Split", "Slice"), "copies"),
}


def phases(runtime: OnnxRuntime, ids: list[int], steps: int, trace: Path) -> list[Phase]:
    """Returns prefill and decoding, and writes onnxruntime's trace of them.

    onnxruntime itself decodes and passes keys and values through the caller, even if onnxruntime-genai would serve the
    graph.
    """
    runtime.close()
    runtime.profile = trace.parent / "onnxruntime"
    seconds: dict[str, float] = {}
    try:
        drive(runtime, ids, 2, lambda name: clock(name, {}))
        drive(runtime, ids, steps, lambda name: clock(name, seconds))
        file = Path(runtime.end_profile())
    finally:
        runtime.profile = None
        runtime.close()
    text = file.read_bytes()
    write_file(trace, gzip.compress(text))
    file.unlink()
    events = json.loads(text)
    runs = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"][-steps - 1 :]
    spans = {"prefill": runs[:1], "decode": runs[1:]}
    return [Phase(name, seconds[name], _operators(events, spans[name])) for name in PHASES]


def _operators(events: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Any:
    parts: dict[tuple[str, Kind], list[float]] = {}
    begin, end = runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and begin <= event["ts"] < end:
            operator = str(event["args"].get("op_name"))
            kind: Kind = "head" if "lm_head" in event["name"] else KINDS.get(operator, "other")
            parts.setdefault((operator, kind), []).append(event["dur"] / 1e6)
    return collected(parts)
