"""A GGUF model, timed node by node. llama.cpp has no profiler, but it reports which node it computes."""

from __future__ import annotations

import ctypes
import gzip
import json
import time
from pathlib import Path
from typing import Any

from lighten.evaluate.profiling import PHASES, clock, drive
from lighten.evaluate.profiling.verdict import Kind, Phase, collected
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.model.llama_library import load
from lighten.store.store import write_file

HEAD = ("result_output", "inp_embd")
"""Names of the nodes of the head and of the embedding."""
KINDS: dict[str, Kind] = {
    "MUL_MAT": "products",
    "FLASH_ATTN_EXT": "attention",
    "SOFT_MAX": "attention",
    "CPY": "copies",
    "CONT": "copies",
    "SET_ROWS": "copies",
    "DUP": "copies",
    "GET_ROWS": "head",
}


def phases(runtime: LlamaCppRuntime, ids: list[int], steps: int, trace: Path) -> list[Phase]:
    """Returns prefill and decoding, and writes a trace of every node.

    Each node is computed by itself, so that it can be timed. Nodes that llama.cpp would run one after the other without
    a stop wait for each other here.
    """
    library = load("watching a GGUF file").ggml
    for name in ("ggml_get_name", "ggml_op_desc"):
        getattr(library, name).restype, getattr(library, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    nodes: list[tuple[str, str, float, float]] = []
    started = 0.0

    def callback(tensor: int, asking: bool, _data: Any) -> bool:
        nonlocal started
        if asking:
            started = time.perf_counter()
        else:
            ended = time.perf_counter()
            named = library.ggml_op_desc(tensor).decode(), library.ggml_get_name(tensor).decode()
            nodes.append((*named, started, ended))
        return True

    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    runtime.watch(callback)
    try:
        drive(runtime, ids, 2, lambda name: clock(name, {}))
        nodes.clear()
        drive(runtime, ids, steps, lambda name: clock(name, seconds))
    finally:
        runtime.watch(None)
    tokens = [at for at, node in enumerate(nodes) if node[1] == "result_output"]
    counts = {"prefill": tokens[0] + 1, "decode": len(nodes)}
    _write(trace, nodes)
    cuts = {"prefill": nodes[: counts["prefill"]], "decode": nodes[counts["prefill"] :]}
    return [Phase(name, seconds[name], _operators(cuts[name])) for name in PHASES]


def _operators(nodes: list[tuple[str, str, float, float]]) -> Any:
    parts: dict[tuple[str, Kind], list[float]] = {}
    for operator, name, begin, end in nodes:
        kind: Kind = "head" if name.startswith(HEAD) else KINDS.get(operator, "other")
        if operator == "MUL_MAT" and name.startswith(("kq-", "kqv-")):
            kind = "attention"
        parts.setdefault((operator, kind), []).append(end - begin)
    return collected(parts)


def _write(trace: Path, nodes: list[tuple[str, str, float, float]]) -> None:
    """Writes the nodes as Chrome's trace events, in microseconds from the first."""
    zero = nodes[0][2] if nodes else 0.0
    events = [
        {
            "name": operator,
            "cat": "node",
            "ph": "X",
            "pid": 0,
            "tid": 0,
            "ts": (begin - zero) * 1e6,
            "dur": (end - begin) * 1e6,
            "args": {"tensor": name},
        }
        for operator, name, begin, end in nodes
    ]
    write_file(trace, gzip.compress(json.dumps({"traceEvents": events}).encode()))
