"""The choice of the runtime for a model, by what each opener recognises; and the model, opened with that runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.evaluate.runtimes import FALLBACK, RUNTIMES
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Runtime, Tokenizer
from lighten.evaluate.speed.settings import Options

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.words import Words


def opener(name: str) -> Opener[Any]:
    """Returns the opener of the runtime of a name."""
    made: Opener[Any] = RUNTIMES.load(name)()
    return made


def openers() -> dict[str, Opener[Any]]:
    """Returns the openers of all runtimes, without those of installed packages that cannot be used."""
    return {name: found() for name, found in RUNTIMES.usable().items()}


def added() -> list[Opener[Any]]:
    """Returns the openers of added runtimes, whose files can be measured and not compressed."""
    return [runtime for runtime in openers().values() if not (runtime.compressible or runtime.remote)]


def extras_of_runtimes() -> dict[str, tuple[str, ...]]:
    """Returns the modules that each extra brings for the runtimes."""
    return {runtime.extra: runtime.modules for runtime in openers().values() if runtime.extra}


@cache
def weight_endings() -> tuple[str, ...]:
    """Returns the endings of the names of files with weights, on any runtime."""
    return tuple(ending for runtime in openers().values() for ending in runtime.weights)


def find_opener(target: Target) -> tuple[Opener[Any], Any]:
    """Returns the opener of the runtime that serves a target, and what it would open.

    Raises:
        RequestError: there is nothing that can be run.
    """
    known = openers()
    with naming_broken():
        for name in sorted(known, key=FALLBACK.__eq__):
            if (place := known[name].recognises(target)) is not None:
                return known[name], place
        raise RequestError(f"cannot measure {target}: no runtime serves it")


@contextmanager
def naming_broken() -> Iterator[None]:
    """Adds to the message that nothing serves a model the packages that cannot be used: it may be theirs."""
    try:
        yield
    except RequestError as error:
        if not RUNTIMES.broken:
            raise
        raise RequestError("; ".join([str(error), *RUNTIMES.broken.values()])) from error


def open_runtime(
    target: Target,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    options: Options | None = None,
    arithmetic: str | None = None,
) -> Runtime:
    """Loads a model on the runtime that serves it.

    Args:
        target: a .gguf or .onnx file, a directory that holds one, a Hugging Face model directory, or whatever else a
            runtime recognises.
        device: "cpu", "cuda" or "cuda:N".
        dtype: arithmetic for a Hugging Face model. None is for measuring quality: float32 (so that the noise of
            arithmetic is not taken for a loss by compression), but bfloat16 on a GPU that float32 does not fit.
        trust_remote_code: whether code that lies beside the weights may run; only if the person asked for it.
        options: how transformers is to run it; other runtimes have no such choice.
        arithmetic: what transformers measures quality in, where models that are compared shall have the same.

    Raises:
        RequestError: nothing there that can be run, or an extra is missing.
        Failure: the model is damaged, or this machine has not what the options ask for.
    """
    found, place = find_opener(target)
    return found.open(place, Conditions(device, dtype, arithmetic, trust_remote_code, options or Options()))


def open_tokenizer(target: Target) -> Tokenizer:
    """Opens the tokenizer of a model directory, a .gguf or an .onnx file, without the weights."""
    found, place = find_opener(target)
    return found.tokenizer(place)


def words_of(target: Target) -> Words:
    """Opens everything that turns text into ids for a model, chats too."""
    found, place = find_opener(target)
    return found.words(place)


def files_of(target: Target) -> Path | None:
    """Returns the directory or file with a model's tokenizer and chat template; None if no file here has them."""
    found, place = find_opener(target)
    return found.files(place)


def served_in(target: Target, device: str) -> str | None:
    """Returns the arithmetic that a model is served in on a device; None for a file with its own arithmetic."""
    return find_opener(target)[0].served_in(device)
