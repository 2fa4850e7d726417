"""One measurement, from its request to the files it leaves; runs in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.evaluate import machine
from lighten.evaluate.paired import RESULT, VALUES
from lighten.evaluate.request import Request
from lighten.evaluate.settings import TIMED, Accuracy, Load, Options, Perplexity, Speculative, Speed
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
        payload: that of a `Request`.
        report: called as the work goes on.

    Returns:
        The contents of `result.json`.
    """
    request = Request.from_payload(payload)
    report(0, 1, "loading")
    if request.measurement not in TIMED:
        share_cores()
    result = {"measurement": request.measurement, **WORK[request.measurement](request, report)}
    write_json(request.out / RESULT, result)
    return result


def _perplexity(request: Request, report: Report) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from lighten.evaluate.perplexity import documents, perplexity
    from lighten.evaluate.runtimes.opening import open_tokenizer

    settings = request.settings
    assert isinstance(settings, Perplexity)
    other = _other_vocabulary(request)
    runtime = _for_quality(request)
    reference = None if other else request.reference
    if reference and not (reference.measurement / perplexity.HIDDEN).is_file():
        reference = None  # its own measurement says why
    tokenizer = open_tokenizer(request.model if other else request.tokenizer)
    render = None if settings.data == "builtin" else renderer(request.tokenizer)
    if settings.protocol == "lm-eval":
        measured = documents.measure(runtime, tokenizer, settings, report, render)
    else:
        measured = perplexity.measure(
            runtime,
            tokenizer,
            settings,
            report,
            reference=(reference.measurement, reference.model) if reference else None,
            hidden_of=request.model if request.save_hidden else None,
            render=render,
        )
    save_file(measured.values, request.out / VALUES)
    if measured.hidden is not None:
        save_file({"hidden": measured.hidden}, request.out / perplexity.HIDDEN)
    protocol = measured.result["perplexity"]["protocol"]
    protocol["tokenizer"] = "own" if other or request.own_tokenizer else "the baseline's"
    return measured.result | _vocabulary(other) | _facts(runtime)


def _other_vocabulary(request: Request) -> str | None:
    """Returns where the model's vocabulary differs from that of the model whose tokenizer gives the ids, or None.

    Ids of another vocabulary are other words to a model: it is measured on its own then.
    """
    if request.own_tokenizer:
        return None
    from lighten.model import vocabulary

    return vocabulary.differing(request.tokenizer, request.model)


def _vocabulary(other: str | None) -> dict[str, Any]:
    return {"vocabulary": other} if other else {}


def _for_quality(request: Request) -> Runtime:
    from lighten.evaluate.runtimes.opening import open_runtime

    return open_runtime(
        request.model,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        arithmetic=request.arithmetic,
    )


def _accuracy(request: Request, report: Report) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from lighten.evaluate.accuracy import accuracy
    from lighten.evaluate.runtimes.opening import open_tokenizer

    settings, scorer = request.settings, accuracy.measure
    assert isinstance(settings, Accuracy)
    if settings.harness:
        from lighten.evaluate.accuracy.harness import measure as harness

        scorer = harness.measure
    other = _other_vocabulary(request)
    runtime = _for_quality(request)
    tokenizer = open_tokenizer(request.model if other else request.tokenizer)
    measured = scorer(runtime, tokenizer, settings, report)
    save_file(measured.values, request.out / VALUES)
    return measured.result | _vocabulary(other) | _facts(runtime)


def served(
    model: Path, device: str, *, trusted: bool, options: Options | None = None, dtype: str | None = None
) -> Runtime:
    """Opens a model in `dtype`, or in the arithmetic that it is served in."""
    from lighten.evaluate.runtimes.opening import open_runtime

    return open_runtime(
        model, device=device, dtype=dtype or _served(model, device), trust_remote_code=trusted, options=options
    )


def _speed(request: Request, report: Report) -> dict[str, Any]:
    from lighten.evaluate.speed import speed

    settings, model, device = request.settings, request.model, request.device
    assert isinstance(settings, Speed)

    def opened(dtype: str | None = None) -> Runtime:
        return served(model, device, trusted=request.trust_remote_code, options=settings, dtype=dtype)

    if device != "cpu" or _served(model, "cpu") != "float32":
        runtime = opened()
        return speed.measure(runtime, settings, report) | _facts(runtime)
    # bfloat16 without units for it reads half the bytes and multiplies slowly: which one wins depends on the phase
    found, used = speed.measure_better(opened, ("bfloat16", "float32"), settings, report)
    return found | _facts(used)


def _speculative(request: Request, report: Report) -> dict[str, Any]:
    from lighten.errors import Failure
    from lighten.evaluate.speed import speculative
    from lighten.model import vocabulary

    settings, model, draft = request.settings, request.model, request.draft
    assert isinstance(settings, Speculative) and draft
    if other := vocabulary.differing(model, draft):
        raise Failure(f"target and draft have different vocabularies ({other}): take a draft with the same tokenizer")
    target, helper = (
        served(path, request.device, trusted=request.trust_remote_code, dtype=settings.dtype) for path in (model, draft)
    )
    return speculative.measure(target, helper, settings, report, renderer(model)) | _facts(target)


def _load(request: Request, report: Report) -> dict[str, Any]:
    from lighten.evaluate.speed import load

    settings, device = request.settings, request.device
    assert isinstance(settings, Load)
    dtype = _served(request.model, device)
    return load.measure(request.model, settings, device, dtype, report, trusted=request.trust_remote_code)


WORK = {
    "perplexity": _perplexity,
    "accuracy": _accuracy,
    "speed": _speed,
    "speculative": _speculative,
    "load": _load,
}


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
