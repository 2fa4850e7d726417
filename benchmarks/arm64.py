"""Runs a GGUF file on the other processor: llama.cpp for aarch64 under emulation, and llama-cpp-python here.

The llama.cpp is the one inside llama-cpp-python's source package, in the version that the edge bundle names. It is
cross-compiled for the Cortex-A76 of a Raspberry Pi 5 and run by user-mode QEMU; both choose the next token
after the same prompt and the same tokens: up to the first choice that differs, that is greedy decoding on both.

The kernels of two processors sum in different orders, so a choice between two tokens that are all but equally likely
may fall differently. To tell that apart from a fault, llama.cpp is also built for both processors from its plain C
kernels, which sum in one order: those two must choose the same tokens with the same logits, to the last digit.

    python benchmarks/arm64.py --model model.gguf [--model other.gguf] [--work DIR] [--steps 32] [--out FILE]

Without --model it exports the demo model in the types of TYPES. Needs, on Debian:
apt install qemu-user-static g++-aarch64-linux-gnu cmake
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_tools import VERSION, fetch

from lighten.evaluate import machine
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime

HERE = Path(__file__).resolve().parent
TOOLS = {
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "cmake": "cmake",
}
TYPES = ("Q8_0", "F16", "F32")
ARCH = "armv8.2-a+dotprod"
PROMPTS = {
    "chat": "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "story": "The old lighthouse keeper climbed the stairs one last time, and",
    "code": "def fibonacci(n):\n    ",
}

AARCH64 = {"CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc", "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++"}
VECTORS = ("__ARM_NEON", "__ARM_NEON__", "__ARM_FEATURE_FMA", "__SSE__", "__SSE2__")
"""Macros of the compilers by which llama.cpp finds out that a processor has vectors."""

PAUSE = ["-D_mm_pause=__builtin_ia32_pause"]  # lies in a header that llama.cpp leaves out without vectors


def plain() -> dict[str, str]:
    """Returns the settings with which llama.cpp computes the same sums in the same order on every processor."""
    flags = " ".join(["-ffp-contract=off", "-fsigned-char", *(f"-U{name}" for name in VECTORS), *PAUSE])
    given = {"CMAKE_C_FLAGS": flags, "CMAKE_CXX_FLAGS": flags, "CMAKE_SYSTEM_PROCESSOR": "generic"}
    return {**given, "GGML_LLAMAFILE": "OFF", "GGML_CPU_REPACK": "OFF"}


def build(work: Path, source: Path, name: str, special: dict[str, str], jobs: int) -> Path:
    """Returns `greedy` built with the settings of `special`, linked statically."""
    settings = {
        "LLAMA_SOURCE": source,
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "OFF",
        "GGML_OPENMP": "OFF",
        "GGML_CCACHE": "OFF",
        **special,
    }
    folder = work / f"build-{name}"
    given = [f"-D{name}={value}" for name, value in settings.items()]
    nice = ["nice", "-n", "10", "cmake"]
    subprocess.run([*nice, "-S", str(HERE / "arm64"), "-B", str(folder), *given], check=True, stdout=sys.stderr)
    command = [*nice, "--build", str(folder), "--target", "greedy", "-j", str(jobs)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "greedy"


def choices(program: list[str], model: Path, ids: list[int], said: list[int]) -> dict[str, Any]:
    """Returns what `program` finds most likely after `ids` and after each token of `said`, and how clearly.

    -1 in `said` stands for what it said itself.
    """
    start = time.monotonic()
    command = ["nice", "-n", "10", *program, str(model), *(",".join(map(str, each)) for each in (ids, said))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(program)} failed: {done.stderr[-2000:]}")
    rows = [line.split() for line in done.stdout.splitlines()]
    return {
        "tokens": [int(row[0]) for row in rows],
        "second": [int(row[2]) for row in rows],
        "gaps": [float(row[1]) - float(row[3]) for row in rows],
        "sums": [row[4] for row in rows],
        "seconds": round(time.monotonic() - start, 1),
        "system": next((line.strip() for line in done.stderr.splitlines() if "NEON" in line), ""),
    }


def here(runtime: LlamaCppRuntime, ids: list[int], steps: int) -> dict[str, Any]:
    """Returns the same of llama-cpp-python in this process."""
    from lighten.evaluate.runtimes.llama_binding import Batch

    context = runtime._open_context(len(ids) + steps, 1, False)
    given, start = list(ids), 0
    tokens, second, gaps = [], [], []
    for _ in range(steps):
        places = np.arange(start, start + len(given))
        last = places == places[-1]
        batch = Batch(runtime._library, np.array(given), places, [[0]] * len(given), last)
        logits = runtime._decode(context, batch)[0]
        best = np.argsort(-logits, kind="stable")[:2]
        tokens.append(int(best[0]))
        second.append(int(best[1]))
        gaps.append(float(logits[best[0]] - logits[best[1]]))
        start, given = start + len(given), [tokens[-1]]
    return {"tokens": tokens, "second": second, "gaps": gaps}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns whether the tokens are the same, and if not where they part and how close the choice was on each side."""
    differ = [one != other for one, other in zip(ours["tokens"], theirs["tokens"], strict=True)]
    first = differ.index(True) if any(differ) else None
    changes = [abs(a - b) for a, b, other in zip(ours["gaps"], theirs["gaps"], differ, strict=True) if not other]
    found: dict[str, Any] = {
        "equal": first is None,
        "greedy_tokens_alike": len(differ) if first is None else first,
        "same_choice": differ.count(False),
        "of": len(differ),
        "largest_gap_where_choices_differ": round(
            max((gap for gap, other in zip(ours["gaps"], differ, strict=True) if other), default=0.0), 4
        ),
        "median_change_of_a_gap": round(float(np.median(changes)), 4) if changes else None,
    }
    if first is not None:
        found["parts_at"] = {
            "position": first,
            "here": {"token": ours["tokens"][first], "gap": round(ours["gaps"][first], 4)},
            "aarch64": {"token": theirs["tokens"][first], "gap": round(theirs["gaps"][first], 4)},
            "each_is_the_others_second": ours["second"][first] == theirs["tokens"][first]
            and theirs["second"][first] == ours["tokens"][first],
        }
    return found


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, int]:
    """Returns at how many places two builds choose the same token, and at how many all logits are the same numbers."""
    return {
        name: sum(a == b for a, b in zip(ours[key], theirs[key], strict=True))
        for name, key in {"same_choice": "tokens", "same_logits": "sums"}.items()
    }


def export(work: Path) -> list[Path]:
    """Returns the demo model as GGUF files, the first one the file of its bundle for a Raspberry Pi 5."""
    bundle = ["--format", "bundle", "--target", "rpi5", "--no-measure"]
    kinds = {"rpi5": bundle, **{type: ["--format", "gguf", "--type", type] for type in TYPES}}
    made = []
    for name, flags in kinds.items():
        out = work / f"demo-{name}"
        if not out.exists():
            command = [sys.executable, "-m", "lighten", "export", "demo:smollm2-135m", *flags]
            subprocess.run([*command, "-o", str(out), "--artifacts", str(work / "artifacts")], check=True)
        made += sorted(out.glob("*.gguf"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="a .gguf file; may be repeated")
    parser.add_argument("--work", type=Path, default=Path("arm64-work"), help="sources and builds; kept")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode after every prompt")
    parser.add_argument("--cpu", default="cortex-a76", help="the processor that QEMU plays")
    parser.add_argument("--arch", default=ARCH, help="what the compiler may use; +fp16 lets it sum in 16 bits")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "arm64.json")
    arguments = parser.parse_args()
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; on Debian: apt install {' '.join(missing)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = fetch(work)
    own = {**AARCH64, "CMAKE_SYSTEM_PROCESSOR": "aarch64", "GGML_CPU_ARM_ARCH": arguments.arch}
    kinds = {"own": own, "plain": {**AARCH64, **plain()}, "plain-here": plain()}
    made = {name: str(build(work, source, name, special, arguments.jobs)) for name, special in kinds.items()}
    emulator = ["qemu-aarch64-static", "-cpu", arguments.cpu]
    rows = []
    system = ""
    for model in arguments.model or export(work):
        runtime = LlamaCppRuntime(model, "cpu")
        for name, prompt in PROMPTS.items():
            ids = runtime.encode(prompt)
            ours = here(runtime, ids, arguments.steps)
            theirs = choices([*emulator, made["own"]], model, ids, ours["tokens"])
            system = theirs["system"]
            found = compare(ours, theirs)
            alone = [-1] * arguments.steps  # each goes on with what it said itself
            plain_here = choices([made["plain-here"]], model, ids, alone)
            alike = same(plain_here, choices([*emulator, made["plain"]], model, ids, alone))
            rows.append(
                {
                    "model": model.name,
                    "type": runtime.dtype,
                    "prompt": name,
                    "prompt_ids": ids,
                    **found,
                    "tokens": ours["tokens"],
                    "choices_aarch64": theirs["tokens"],
                    "seconds_emulated": theirs["seconds"],
                    "plain_kernels": {**alike, "tokens": plain_here["tokens"]},
                }
            )
            agreement = f"{found['same_choice']} of {found['of']} choices the same; plain kernels: {alike}"
            print(f"{model.name} {name}: {agreement}", file=sys.stderr)
        runtime.close()
    command = ["python", "benchmarks/arm64.py", "--steps", str(arguments.steps), "--cpu", arguments.cpu]
    command += ["--arch", arguments.arch]
    command += [f"--model {model.name}" for model in arguments.model or ()]
    results = {
        "command": " ".join(command),
        "created": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.fingerprint(),
        "emulator": _first(["qemu-aarch64-static", "--version"]),
        "compiler": _first(["aarch64-linux-gnu-g++", "--version"]),
        "architecture": arguments.arch,
        "processor": arguments.cpu,
        "features": system,
        "llama_cpp_python": VERSION,
        "rows": rows,
        "same_choice": sum(row["same_choice"] for row in rows),
        "choices": sum(row["of"] for row in rows),
        "plain_kernels": {
            key: sum(row["plain_kernels"][key] for row in rows) for key in ("same_choice", "same_logits")
        },
        "equal": sum(row["equal"] for row in rows),
        "of": len(rows),
    }
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, arguments.out)
    print(f"{results['equal']} of {results['of']} the same to the last token; written to {arguments.out}")


def _first(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    main()
