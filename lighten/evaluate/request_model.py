"""The model of a request, opened: to measure its quality, or as it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from lighten.evaluate import machine
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.choose import open_runtime, served_in
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speed.settings import Options
from lighten.model import vocabulary


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


class Unavailable(Exception):
    """The error that the runtime of a model cannot do a measurement. Its text says why."""

    def __init__(self, runtime: Runtime, needed: frozenset[str]) -> None:
        """Takes the opened runtime, and the capabilities: it has none of them."""
        super().__init__(f"{runtime.name} {' and '.join(LACKS.get(each, each) for each in sorted(needed))}")
        self.facts = facts(runtime)


def _able(runtime: Runtime, settings: Measurement) -> Runtime:
    """Returns the runtime.

    Raises:
        Unavailable: it has none of the necessary capabilities. The model is closed.
    """
    if settings.needed and not settings.needed & runtime.capabilities:
        runtime.close()
        raise Unavailable(runtime, settings.needed)
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
    model: Path | None = None,
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
    model: Path, device: str, *, trusted: bool, options: Options | None = None, dtype: str | None = None
) -> Runtime:
    """Opens a model in `dtype`, or in the arithmetic that it is served in."""
    return open_runtime(
        model, device=device, dtype=dtype or served_in(model, device), trust_remote_code=trusted, options=options
    )


def other_vocabulary(request: Request[Measurement]) -> str | None:
    """Returns where the model's vocabulary differs from that of the tokenizer's model, or None.

    Ids of another vocabulary are other words to a model. Such a model is measured on its own ids.
    """
    return None if request.own_tokenizer else vocabulary.differing(request.tokenizer, request.model)


def facts(runtime: Described) -> dict[str, Any]:
    """Returns the facts in every result about what ran the model."""
    return {
        "runtime": runtime.name,
        "device": runtime.device,
        "detail": runtime.detail,
        "dtype": runtime.dtype,
        "packages": machine.packages(),
    }
