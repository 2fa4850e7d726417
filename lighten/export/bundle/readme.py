"""The README of a bundle: how to use it, what it takes, and what was measured where it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.export.bundle.bundle import MEASURED, Model, Need, read_bytes
from lighten.export.bundle.targets import Target

_USE = """# {name} for {title}

{model}{licence}, as a GGUF file of type {type} for llama.cpp, with a context of {context:,} tokens.

## Use

```
sh run.sh                 chat: a line is a message
sh serve.sh               OpenAI-compatible server on http://127.0.0.1:8080/v1 (HOST and PORT change that)
sh bench.sh               measure it here: writes results.json, which `lighten report NAME --merge` reads
sha256sum -c SHA256SUMS   check the copy
```

They use `python3`, or what PYTHON names, if it has llama-cpp-python. If it has not, they make `venv/` beside themselves
and fill it from `requirements.txt` with your pip's own settings. Where pip finds no wheel for the device it compiles
llama-cpp-python: that takes a C++ compiler and some minutes (Debian: `apt install python3-venv build-essential`).
The server takes Python 3.11 or later, the others 3.10.{gpu}

As a service: unpack to `/opt/{folder}`, run `sh serve.sh` once so that `venv/` is there, then
`cp model.service /etc/systemd/system/ && systemctl enable --now model`.

## Does it fit

| | |
|---|---:|
| weights | {weights:.1f} MB |
| keys and values of {context:,} tokens, 16 bits | {cache:.1f} MB |
| Python, llama.cpp and its buffers | {runtime:.1f} MB |
| together | {total:.1f} MB |
| memory of the {title} | {memory:.1f} MB |
| of which left to the system (our assumption) | {system:.1f} MB |

## Speed
"""
_GPU = """
For the GPU, set `CMAKE_ARGS=-DGGML_CUDA=on` when it is installed; otherwise the model runs on the processor."""


def readme(
    bundle: Mapping[str, Any], model: Model, need: Need, target: Target, measured: Mapping[str, Any] | None, why: str
) -> str:
    """Returns README.md.

    Args:
        bundle: bundle.json.
        model: what the file's header says.
        need: memory it takes.
        target: the device.
        measured: measured.json, or None.
        why: the reason if there is none.
    """
    text = _USE.format(
        **{key: bundle[key] for key in ("name", "model", "type", "context")},
        title=target.title,
        licence=f" (licence {bundle['licence']})" if bundle["licence"] else "",
        gpu=_GPU if target.gpu else "",
        folder=f"bundle-{target.name}",
        weights=need.weights / 1e6,
        cache=need.cache / 1e6,
        runtime=need.runtime / 1e6,
        total=need.total / 1e6,
        memory=target.memory_bytes / 1e6,
        system=target.system_bytes / 1e6,
    )
    each = read_bytes(model)
    ceiling = target.bandwidth / each
    text += (
        f"\nA token reads {each / 1e6:.1f} MB. The memory of the {target.title} gives "
        f"{target.bandwidth / 1e9:.1f} GB/s at most ({target.source}), so "
        f"no more than {ceiling:.1f} tokens/s can be decoded there.\n"
    )
    return text + ("\n" + _numbers(measured, target) if measured else f"\nNot measured: {why}.\n")


def _numbers(measured: Mapping[str, Any], target: Target) -> str:
    results, predicted = measured["results"], measured["prediction"]
    row = results["variants"][0]
    speed, facts, perplexity = row["speed"][0], row["facts"], row["perplexity"]
    machine = results["machine"]
    lines = [
        "| | measured where this was made | predicted for the target |",
        "|---|---:|---:|",
        f"| machine | {machine['name']}, {facts['threads']} threads | {target.title} |",
        f"| decode, tokens/s | {speed['decode_tok_s']:.1f} | **{predicted['decode_tok_s']:.1f}** |",
        f"| prefill, tokens/s | {speed['prefill_tok_s']:.1f} | |",
        f"| first token after {speed['prompt']} | {speed['ttft_ms']['p50']:.0f} ms | |",
        f"| a token, p50 / p95 | {speed['token_ms']['p50']:.1f} / {speed['token_ms']['p95']:.1f} ms | |",
        f"| load | {facts['load_seconds']:.2f} s | |",
        f"| peak memory of the process | {row['memory']['peak_rss_bytes'] / 1e6:.0f} MB | |",
        f"| memory read | {facts['read_bandwidth'] / 1e9:.1f} GB/s | {target.bandwidth / 1e9:.1f} GB/s (published) |",
        f"| perplexity of perplexity.txt | {perplexity['value']:.2f} on {perplexity['tokens']} tokens | |",
    ]
    share = predicted["share_of_bandwidth_here"]
    counted = ", counted as 100 %" if share > 1 else ""
    return (
        "\n".join(lines) + "\n\nThe prediction is not a measurement. It takes the share of the memory's bandwidth that "
        f"the median token reached where this was made ({100 * share:.0f} %{counted}) for that of the target, whose "
        "processor may be slower; and a model that fits into a processor's cache reads faster than memory. "
        f"`sh bench.sh` measures it. {' and '.join(MEASURED)} differ each time a bundle is made, no other file does.\n"
    )
