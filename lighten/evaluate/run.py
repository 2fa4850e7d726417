"""One measurement, from its request to the files it leaves; runs in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.evaluate import machine
from lighten.evaluate.paired import RESULT, VALUES
from lighten.evaluate.settings import Accuracy, Load, Options, Perplexity, Speculative, Speed
from lighten.model.template import renderer
from lighten.process.isolate import share_cores
from lighten.step import Report
from lighten.store.store import write_json

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.runtime import Runtime
    from lighten.evaluate.speed.speed import Opened


def measure(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measures a model and writes `result.json`, `values.safetensors` and, if asked, `hidden.safetensors`.

    Args:
        payload: `measurement` ("perplexity", "accuracy", "speed", "load" or "speculative"), `config` (its settings),
            `model` (a path), `draft` (another, if a draft is measured), `tokenizer` (path of the model whose tokenizer
            gives the ids, unless its vocabulary is another than the model's own), `out` (an existing empty directory),
            `device`, `reference` (`{"hidden": the baseline's measurement, "model": the baseline}` or None),
            and `save_hidden` (whether this measurement is to serve as a reference).
        report: called as the work goes on.

    Returns:
        The contents of `result.json`.
    """
    out = Path(payload["out"])
    model = Path(payload["model"])
    kind = payload["measurement"]
    report(0, 1, "loading")
    if timed := TIMED.get(kind):
        result = timed(payload, model, report)
    else:
        share_cores()
        result = (
            _perplexity(payload, model, out, report) if kind == "perplexity" else _accuracy(payload, model, out, report)
        )
    result = {"measurement": kind, **result}
    write_json(out / RESULT, result)
    return result


def _perplexity(payload: dict[str, Any], model: Path, out: Path, report: Report) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from lighten.evaluate.perplexity import documents, perplexity
    from lighten.evaluate.runtimes.opening import open_tokenizer

    settings = Perplexity(**payload["config"])
    other = _other_vocabulary(payload)
    runtime = _for_quality(model, payload)
    reference = None if other else payload.get("reference")
    if reference and not (Path(reference["hidden"]) / perplexity.HIDDEN).is_file():
        reference = None  # its own measurement says why
    tokenizer = open_tokenizer(model if other else Path(payload["tokenizer"]))
    render = None if settings.data == "builtin" else renderer(Path(payload["tokenizer"]))
    if settings.protocol == "lm-eval":
        measured = documents.measure(runtime, tokenizer, settings, report, render)
    else:
        measured = perplexity.measure(
            runtime,
            tokenizer,
            settings,
            report,
            reference=(Path(reference["hidden"]), Path(reference["model"])) if reference else None,
            hidden_of=model if payload.get("save_hidden") else None,
            render=render,
        )
    save_file(measured.values, out / VALUES)
    if measured.hidden is not None:
        save_file({"hidden": measured.hidden}, out / perplexity.HIDDEN)
    protocol = measured.result["perplexity"]["protocol"]
    protocol["tokenizer"] = "own" if other or payload["tokenizer"] == payload["model"] else "the baseline's"
    return measured.result | _vocabulary(other) | _facts(runtime)


def _other_vocabulary(payload: dict[str, Any]) -> str | None:
    """Returns where the model's vocabulary differs from that of the model whose tokenizer gives the ids, or None.

    Ids of another vocabulary are other words to a model: it is measured on its own then.
    """
    if payload["tokenizer"] == payload["model"]:
        return None
    from lighten.model import vocabulary

    return vocabulary.differing(Path(payload["tokenizer"]), Path(payload["model"]))


def _vocabulary(other: str | None) -> dict[str, Any]:
    return {"vocabulary": other} if other else {}


def _for_quality(model: Path, payload: dict[str, Any]) -> Runtime:
    from lighten.evaluate.runtimes.opening import open_runtime

    return open_runtime(
        model,
        device=payload["device"],
        trust_remote_code=payload.get("trust_remote_code", False),
        arithmetic=payload.get("arithmetic"),
    )


def _accuracy(payload: dict[str, Any], model: Path, out: Path, report: Report) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from lighten.evaluate.accuracy import accuracy
    from lighten.evaluate.runtimes.opening import open_tokenizer

    settings, scorer = Accuracy(**payload["config"]), accuracy.measure
    if settings.harness:
        from lighten.evaluate.accuracy.harness import measure as harness

        scorer = harness.measure
    other = _other_vocabulary(payload)
    runtime = _for_quality(model, payload)
    tokenizer = open_tokenizer(model if other else Path(payload["tokenizer"]))
    measured = scorer(runtime, tokenizer, settings, report)
    save_file(measured.values, out / VALUES)
    return measured.result | _vocabulary(other) | _facts(runtime)


def served(payload: dict[str, Any], options: Options | None = None, dtype: str | None = None) -> Runtime:
    """Opens the model of a payload in `dtype`, or in the arithmetic that it is served in."""
    from lighten.evaluate.runtimes.opening import open_runtime

    return open_runtime(
        Path(payload["model"]),
        device=payload["device"],
        dtype=dtype or _served(Path(payload["model"]), payload["device"]),
        trust_remote_code=payload.get("trust_remote_code", False),
        options=options,
    )


def _speed(payload: dict[str, Any], model: Path, report: Report) -> dict[str, Any]:
    from lighten.evaluate.speed import speed

    settings = Speed(**payload["config"])
    if payload["device"] != "cpu" or _served(model, "cpu") != "float32":
        runtime = served(payload, settings)
        return speed.measure(runtime, settings, report) | _facts(runtime)
    # bfloat16 without units for it reads half the bytes and multiplies slowly: which one wins depends on the phase
    found, used = speed.measure_better(
        lambda dtype: served(payload, settings, dtype), ("bfloat16", "float32"), settings, report
    )
    return found | _facts(used)


def _speculative(payload: dict[str, Any], model: Path, report: Report) -> dict[str, Any]:
    from lighten.errors import Failure
    from lighten.evaluate.runtimes.opening import open_runtime
    from lighten.evaluate.speed import speculative
    from lighten.model import vocabulary

    settings = Speculative(**payload["config"])
    if other := vocabulary.differing(model, Path(payload["draft"])):
        raise Failure(f"target and draft have different vocabularies ({other}): take a draft with the same tokenizer")
    device, trusted = payload["device"], payload.get("trust_remote_code", False)
    target, draft = (
        open_runtime(path, device=device, dtype=settings.dtype or _served(path, device), trust_remote_code=trusted)
        for path in (model, Path(payload["draft"]))
    )
    return speculative.measure(target, draft, settings, report, renderer(model)) | _facts(target)


def _load(payload: dict[str, Any], model: Path, report: Report) -> dict[str, Any]:
    from lighten.evaluate.speed import load

    trusted = payload.get("trust_remote_code", False)
    dtype = _served(model, payload["device"])
    return load.measure(model, Load(**payload["config"]), payload["device"], dtype, report, trusted=trusted)


TIMED = {"speed": _speed, "speculative": _speculative, "load": _load}
"""What is measured in a process that has imported nothing, on a machine that does nothing else."""


def _served(model: Path, device: str) -> str | None:
    """Returns the arithmetic that a Hugging Face model is served in; None for a file that has one of its own."""
    from lighten.evaluate.runtimes.opening import served_in

    return served_in(model, device)


def _facts(runtime: Runtime | Opened) -> dict[str, Any]:
    return {
        "runtime": runtime.name,
        "device": runtime.device,
        "detail": runtime.detail,
        "dtype": runtime.dtype,
        "packages": machine.packages(),
    }
