"""The model of a request, opened: to measure its quality, or as it is served."""

from __future__ import annotations

from typing import Any, Protocol

from lighten.data.text import Render
from lighten.evaluate import machine
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.choose import files_of, open_runtime, served_in
from lighten.evaluate.runtimes.opener import Target
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.runtimes.unavailable import Unavailable
from lighten.evaluate.speed.settings import Options
from lighten.model import vocabulary
from lighten.model.template import renderer


class Described(Protocol):
    """What ran a model: a runtime, or the facts about a closed one."""

    @property
    def name(self) -> str:
        """Name of the runtime."""

    @property
    def device(self) -> str:
        """Device that it ran on."""

    @property
    def detail(self) -> str:
        """Versions and kernels."""

    @property
    def dtype(self) -> str:
        """Arithmetic of the weights."""


LACKS = {
    "logits": "does not give the logits of a text",
    "scores": "does not score texts",
    "decodes": "does not write token after token",
    "rewinds": "does not take tokens back",
    "translates": "does not write a text for a text",
    "encodes": "does not show the states of a text",
    "fills": "does not fill the gaps of a text",
}
"""What a runtime without a capability does not do, in words."""


def _unavailable(runtime: Runtime, needed: frozenset[str]) -> Unavailable:
    """Returns the error for an opened runtime that has none of the necessary capabilities."""
    reasons = dict.fromkeys(runtime.lacks.get(each) or LACKS.get(each, each) for each in sorted(needed))
    return Unavailable(f"{runtime.name} {' and '.join(reasons)}", facts(runtime))


def _able(runtime: Runtime, settings: Measurement) -> Runtime:
    """Returns the runtime.

    Raises:
        Unavailable: it has none of the necessary capabilities. The model is closed.
    """
    if settings.needed and not settings.needed & runtime.capabilities:
        runtime.close()
        raise _unavailable(runtime, settings.needed)
    return runtime


def for_quality(request: Request[Measurement]) -> Runtime:
    """Opens the model in the arithmetic that quality is measured in.

    Raises:
        Unavailable: its runtime cannot do what is measured.
    """
    runtime = open_runtime(
        request.model,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        arithmetic=request.arithmetic,
    )
    return _able(runtime, request.settings)


def for_speed(
    request: Request[Measurement],
    model: Target | None = None,
    *,
    options: Options | None = None,
    dtype: str | None = None,
) -> Runtime:
    """Opens the model, or another one that is measured with it, as it is served.

    Raises:
        Unavailable: its runtime cannot do what is measured.
    """
    trusted = request.trust_remote_code
    runtime = as_served(model or request.model, request.device, trusted=trusted, options=options, dtype=dtype)
    return _able(runtime, request.settings)


def as_served(
    model: Target, device: str, *, trusted: bool, options: Options | None = None, dtype: str | None = None
) -> Runtime:
    """Opens a model in `dtype`, or in the arithmetic that it is served in."""
    return open_runtime(
        model, device=device, dtype=dtype or served_in(model, device), trust_remote_code=trusted, options=options
    )


def other_vocabulary(request: Request[Measurement]) -> str | None:
    """Returns where the model's vocabulary differs from that of the tokenizer's model, or None.

    Ids of another vocabulary are other words to a model. Such a model is measured on its own ids. A model on a server
    compares its tokenizer itself, where no file here has it.
    """
    if request.own_tokenizer:
        return None
    theirs, own = files_of(request.tokenizer), files_of(request.model)
    return vocabulary.differing(theirs, own) if theirs and own else None


def renderer_of(target: Target) -> Render | None:
    """Returns the function that writes turns for a model; None without a chat template in a file here."""
    path = files_of(target)
    return renderer(path) if path else None


def facts(runtime: Described) -> dict[str, Any]:
    """Returns the facts in every result about what ran the model."""
    return {
        "runtime": runtime.name,
        "device": runtime.device,
        "detail": runtime.detail,
        "dtype": runtime.dtype,
        "packages": machine.packages(),
    }
