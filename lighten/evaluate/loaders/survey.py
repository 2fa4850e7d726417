"""Where an artifact loads: each loader opens it in a process of its own and computes the logits of a few ids."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import Failure, LightenError
from lighten.evaluate.loaders.programs import Opening, installed, loaders
from lighten.evaluate.runtimes.choose import added
from lighten.model.formats import pip_name, recognise
from lighten.process.isolate import run_isolated
from lighten.step import Report, silent

LONGEST = 400
"""Maximum number of characters of an error that are kept."""


def versions() -> dict[str, str | None]:
    """Returns the installed version of every loader; None if it is not installed."""
    return {loader.name: loader.version for loader in loaders()}


def packages() -> dict[str, str]:
    """Returns the versions of all packages that may decide whether something loads."""
    names = [*(name for loader in loaders() for name in loader.packages), "torch", "optimum", "accelerate", "gguf"]
    return {name: found for name in names if (found := installed(name))}


@dataclass(frozen=True)
class Survey:
    """The answers of all loaders, as in results.json, and the largest peak memory of their processes."""

    loads: list[dict[str, Any]]
    peak_rss_bytes: int


def survey(
    path: Path,
    *,
    vocab: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Survey:
    """Opens an artifact with every loader.

    Args:
        path: an artifact, a model directory or a .gguf file.
        vocab: size of the vocabulary that its logits should have; what its config says if left out.
        device: "cpu" or "cuda".
        trust_remote_code: whether code that lies beside the weights may run; only if the person asked for it.
        report: called for every loader.

    Raises:
        RequestError: nothing there that any loader would open.
    """
    there, form, own = _recognise(path)
    programs = loaders()
    if not any(form in loader.formats for loader in programs):
        form = "hf"  # a model directory that an export wrote
    asked = {
        "path": str(there),
        "device": device,
        "vocab": vocab or own,
        "trust_remote_code": trust_remote_code,
    }
    loads, peak = [], 0
    for number, loader in enumerate(programs):
        report(number, len(programs), loader.name)
        found: dict[str, Any] = {"loader": loader.name, "version": loader.version, "seconds": None, "error": None}
        if not loader.opens(form, there):
            found["status"] = "other"
        elif missing := loader.missing(form):
            found |= {"status": "absent", "error": f"needs {missing}: pip install '{pip_name(missing)}'"}
        else:
            try:
                outcome = run_isolated("lighten.evaluate.loaders.survey:load", {**asked, "loader": loader.name})
                found |= outcome.value
                peak = max(peak, outcome.peak_rss_bytes)
            except LightenError as error:
                found |= {"status": "failed", "error": _first_line(error)}
        loads.append(found)
    report(len(programs), len(programs), "")
    return Survey(loads, peak)


def _recognise(path: Path) -> tuple[Path, str, int | None]:
    """Returns what a loader is to open, its format, and its vocabulary if that is told."""
    for runtime in added():
        if (place := runtime.recognises(path)) is not None:
            return place, runtime.name, runtime.facts(place).vocab
    return recognise(path)


def load(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Opens a model with one loader; returns `{status, seconds, error}`. The target of `run_isolated`."""
    import numpy as np

    loader = next(each for each in loaders() if each.name == payload["loader"])
    opening = Opening(Path(payload["path"]), payload["device"], payload["vocab"], payload["trust_remote_code"])
    start = time.monotonic()
    try:
        values, language = loader.ask(opening)
        if not values.size or not np.isfinite(values.astype(np.float32)).all():
            raise Failure("it opens, but what it computes is not finite")
        if language and opening.vocab and values.shape[-1] != opening.vocab:
            raise Failure(f"it opens, but gives logits of {values.shape[-1]:,} tokens instead of {opening.vocab:,}")
    except Exception as error:
        return {"status": "failed", "seconds": time.monotonic() - start, "error": _first_line(error)}
    return {"status": "ok", "seconds": time.monotonic() - start}


def _first_line(error: Exception) -> str:
    """Returns the first line of an error, with its type if it is not one of ours."""
    text = str(error).removeprefix("lighten.evaluate.loaders.survey:load ")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = line.removesuffix(" The end of what it printed:")
    if not isinstance(error, LightenError):
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
