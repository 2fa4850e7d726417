"""What fits into a memory: weights in every format, keys and values of a context and batch, and the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.pipeline.steps import open_step
from lighten.settings import as_spelled, parse_size

GGUF_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
TORCH_BYTES = 700_000_000
"""Bytes of Python with torch and transformers, and of one layer of a short batch, as seen with small models."""
CACHE_BITS = {"f16": 16.0, "q8_0": 8.5}
"""Bits of a key or a value: 16, or llama.cpp's blocks of 32 with a scale."""


@dataclass(frozen=True)
class Fit:
    """One format: bytes of its weights, its cache and its runtime, and the longest context that would fit."""

    name: str
    runtime: str
    weights: int
    cache: int
    overhead: int
    room: int
    longest: int

    @property
    def total(self) -> int:
        """Bytes of weights, cache and runtime together."""
        return self.weights + self.cache + self.overhead

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total <= self.room

    def as_json(self) -> dict[str, Any]:
        """Returns the form that `--json` prints."""
        sizes = {"weights_bytes": self.weights, "cache_bytes": self.cache, "runtime_bytes": self.overhead}
        answer = {"total_bytes": self.total, "fits": self.fits, "longest_context": self.longest}
        return {"format": self.name, "runtime": self.runtime, **sizes, **answer}


@dataclass(frozen=True)
class Model:
    """A model's name and its sizes."""

    name: str
    facts: ModelFacts

    @property
    def attention(self) -> str:
        """The way in which its heads share keys and values."""
        heads, kv = self.facts.heads, self.facts.kv_heads
        if kv == heads:
            return f"MHA: each of {heads} heads has keys and values of its own"
        if kv == 1:
            return f"MQA: {heads} heads share one set of keys and values"
        return f"GQA: {heads} heads share {kv} sets of keys and values, {heads / kv:.3g}× less than one for each"


def open_model(name: str) -> Model:
    """Reads the sizes of a model from its headers.

    Raises:
        RequestError: the model does not exist, or is no causal language model.
    """
    from lighten.model.source import find

    found = find(name, weights=False)
    if found.facts.family != "causal":
        raise RequestError(f"{name} is no causal language model: it has no cache that grows with a text")
    return Model(name, found.facts)


def room(memory: str | None, target: str | None) -> tuple[int, str]:
    """Returns the bytes that a model may take, and the name of the memory.

    Raises:
        RequestError: neither is given, or one cannot be read.
    """
    from lighten.export.bundle.targets import find_target

    if bool(memory) == bool(target):
        raise RequestError("say how much memory there is: --memory 8GB, or --target rpi5")
    if target:
        device = find_target(target)
        return device.free_bytes, f"the {device.title} beside its system"
    try:
        return parse_size(str(memory)), "memory"
    except ValueError as error:
        raise RequestError(f"--memory {error}") from error


def fits(model: Model, space: int, context: int, batch: int = 1, cache: str = "f16") -> list[Fit]:
    """Returns the memory that every format takes, the largest weights first.

    Raises:
        RequestError: the context is longer than the model's, or a number is out of range.
    """
    if context < 1 or batch < 1:
        raise RequestError("context and batch are numbers of at least 1")
    cache = as_spelled(cache, list(CACHE_BITS))
    if cache not in CACHE_BITS:
        raise RequestError(f"--cache {cache}: there is {', '.join(CACHE_BITS)}")
    facts, trained = model.facts, model.facts.context
    if trained and context > trained:
        raise RequestError(
            f"a context of {context:,} tokens is longer than the {trained:,} that {model.name} was trained for: "
            "ask for that many at most"
        )
    found = []
    for name, runtime, weights, overhead in _formats(facts):
        bits = CACHE_BITS[cache] if runtime == "llama.cpp" else CACHE_BITS["f16"]
        longest = max(0, int((space - weights - overhead) / facts.cache_bytes(batch, bits)))
        longest = min(longest, trained) if trained else longest
        found.append(Fit(name, runtime, weights, facts.cache_bytes(context * batch, bits), overhead, space, longest))
    return sorted(found, key=lambda fit: -fit.weights)


def _formats(facts: ModelFacts) -> Iterator[tuple[str, str, int, int]]:
    """Yields every format: name, runtime, bytes of weights, bytes of the runtime."""
    from lighten.export.bundle.bundle import need_of
    from lighten.export.gguf.settings import Gguf

    yield "bf16", "torch", 2 * facts.params, TORCH_BYTES
    quantized: dict[str, dict[str, Any]] = {
        "LLM.int8()": {"method": "int8"},
        "NF4": {"method": "nf4"},
        "GPTQ, AWQ g128": {"method": "gptq", "bits": 4, "group_size": 128},
    }
    for name, settings in quantized.items():
        step = open_step("quantize", settings)
        yield name, "torch", step.predict(facts, 0).disk_bytes, TORCH_BYTES
    for type in GGUF_TYPES:
        try:
            step_ = Gguf.model_validate({"format": "gguf", "type": type})
            step_.check(facts)
        except (RequestError, ValidationError):
            continue  # an architecture or rows that llama.cpp has nothing for
        yield f"GGUF {type}", "llama.cpp", step_.predict(facts, 0).disk_bytes, need_of(facts, 0, 0).runtime


def sentence(model: Model, found: list[Fit], where: str, context: int, batch: int) -> str:
    """Returns the answer in words."""
    asked = f"a context of {context:,} tokens" + (f" for {batch} at once" if batch > 1 else "")
    best = next((fit for fit in found if fit.fits), None)
    if best is None:
        least = min(found, key=lambda fit: fit.total)
        if least.longest >= 16:
            return f"Nothing fits with {asked}; {least.name} would with {least.longest:,}."
        return f"Nothing fits: {least.name} alone takes {least.total / 1e9:.2f} GB of {least.room / 1e9:.2f} GB."
    runtime = f" ({best.runtime})"
    return (
        f"{best.name}{runtime} is the largest that fits into {best.room / 1e9:.2f} GB ({where}) with {asked}: "
        f"{best.total / 1e9:.2f} GB, and up to {best.longest:,} tokens each."
    )


def show(name: str, space: int, where: str, context: int, batch: int, cache: str) -> tuple[Any, dict[str, Any]]:
    """Returns the answer as a table to print, and for a program."""
    from rich.console import Group
    from rich.table import Table

    model = open_model(name)
    found = fits(model, space, context, batch, cache)
    answer = sentence(model, found, where, context, batch)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("Format")
    for title in ("Weights", "Cache", "Runtime", "Together", "Longest context"):
        grid.add_column(title, justify="right")
    grid.add_column("")
    for fit in found:
        sizes = [f"{size / 1e9:.2f} GB" for size in (fit.weights, fit.cache, fit.overhead, fit.total)]
        longest = f"{fit.longest:,}" if fit.longest else "–"
        grid.add_row(
            f"{fit.name}, {fit.runtime}", *sizes, longest, "fits" if fit.fits else "", style="" if fit.fits else "dim"
        )
    notes = (
        f"{model.attention}. Weights are estimated from the sizes of the model, runtimes by what they take on a CPU."
    )
    value = {
        "model": name,
        "params": model.facts.params,
        "memory_bytes": space,
        "context": context,
        "batch": batch,
        "trained_context": model.facts.context,
        "attention": model.attention,
        "cache_bytes_per_token": model.facts.cache_bytes(1, CACHE_BITS[cache]),
        "answer": answer,
        "formats": [fit.as_json() for fit in found],
    }
    return Group(grid, "", answer, notes), value
