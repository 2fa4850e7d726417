"""The opener of a runtime: what is known before a model is opened. Each runtime derives its own from `Opener`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from lighten.evaluate.speed.settings import Options
from lighten.facts import ModelFacts

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.runtime import Runtime, Server, Tokenizer
    from lighten.evaluate.runtimes.words import Words

Target = Path | str
"""The name that a person gives: a path, or a URL as text."""
Place = TypeVar("Place", Path, str)
"""What a runtime opens: the file or directory that it found at a path, or a URL."""


@dataclass(frozen=True)
class Conditions:
    """The way in which a model is opened."""

    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    dtype: str | None = None
    """Arithmetic that a model is served in, if its file leaves a choice; None to measure its quality."""
    arithmetic: str | None = None
    """Arithmetic of quality, if compared models must have the same."""
    trust_remote_code: bool = False
    """Whether code beside the weights may run; only if the person allowed it."""
    options: Options = field(default_factory=Options)
    """Options for runtimes that take them."""


class Opener(Generic[Place]):
    """Recognises what its runtime serves, and opens it.

    It is imported whenever a model is opened. So its module and its methods import nothing heavy, except `open`,
    `open_exact` and `words`. The defaults of most runtimes are here. A runtime with files of its own, and the tokenizer
    of Hugging Face beside them, implements only `recognises` and `open`.
    """

    name: ClassVar[str]
    """Name of the runtime, the one of its row in the table."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages, as pip names them, whose versions belong to every measurement."""
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules that must be installed before anything is opened."""
    extra: ClassVar[str | None] = None
    """Extra of lighten that brings the modules."""
    weights: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of files with weights."""
    compressible: ClassVar[bool] = False
    """Whether `lighten.model.source` reads what the runtime serves, so that it can be compressed too."""
    remote: ClassVar[bool] = False
    """Whether it opens models on servers, by their addresses, and no files."""
    together: ClassVar[int | None] = None
    """Maximum number of prompt tokens that are computed together. More tokens read the weights again; None for all."""
    every_head: ClassVar[bool] = False
    """Whether the head is computed for every token of a prompt, instead of the last one only."""
    takes_options: ClassVar[bool] = False
    """Whether attention, compile and cache (`Options`) can be chosen."""
    profiler: ClassVar[str | None] = None
    """Name of the function that profiles a model, "module:function"; see `lighten.evaluate.profiling`."""
    tracer: ClassVar[str | None] = None
    """Name of the function that shows the states between the layers, "module:function"; see `trace`."""

    def recognises(self, target: Target) -> Place | None:
        """Returns what would be opened for a target; None if this runtime does not serve it.

        Raises:
            RequestError: it serves such targets, but several are possible.
        """
        raise NotImplementedError

    def facts(self, place: Place) -> ModelFacts:
        """Returns the sizes of the model: those of the config.json in the directory or beside the file.

        Raises:
            Failure: there is none.
        """
        from lighten.model.checkpoint import facts_of, read_config

        folder = folder_of(place)
        return facts_of(read_config(folder), str(folder))

    def open(self, place: Place, conditions: Conditions) -> Runtime:
        """Loads the result of `recognises`.

        Raises:
            RequestError: there is nothing that can be run, or an extra is missing.
            Failure: the model is damaged, or this machine lacks what the conditions ask for.
        """
        raise NotImplementedError

    def open_exact(self, place: Place, trust_remote_code: bool) -> Runtime:
        """Loads it on the processor in the most exact arithmetic, as the reference of comparisons."""
        return self.open(place, Conditions(trust_remote_code=trust_remote_code))

    def tokenizer(self, place: Place) -> Tokenizer:
        """Opens the tokenizer without the weights: that of Hugging Face, in the directory or beside the file."""
        from lighten.evaluate.runtimes.tokenizer import HfTokenizer

        return HfTokenizer(folder_of(place))

    def words(self, place: Place) -> Words:
        """Opens everything that turns text into ids, chats too: that of Hugging Face, as above."""
        from lighten.evaluate.runtimes.words import hf_words

        return hf_words(folder_of(place))

    def files(self, place: Place) -> Path | None:
        """Returns the directory or file with the tokenizer and the chat template; None if no file here has them."""
        return place if isinstance(place, Path) else None

    def served_in(self, device: str) -> str | None:
        """Returns the arithmetic that models are served in on a device; None if the file decides."""
        return None

    def multiplies_in(self, dtype: str, device: str) -> str:
        """Returns the type of number of its products, by the `dtype` that the runtime gives its weights.

        The default is that of onnxruntime. On a CPU, the inputs of quantized weights are rounded to 8 bits, and half
        precision becomes float32. On a GPU, half precision is multiplied as it is, and weights are unpacked to float16.
        """
        name = {"f32": "float32", "all f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(
            dtype.lower(), dtype.lower()
        )
        if name in ("float32", "bfloat16") or (name == "float16" and device != "cpu"):
            return name
        if name == "float16":
            return "float32"
        return "int8" if device == "cpu" else "float16"

    def predicts_tokens(self, place: Place) -> bool:
        """Returns whether it is a causal language model."""
        return True

    def server(self, place: Place, context: int, device: str) -> AbstractContextManager[Server] | None:
        """Returns the usual server for texts of at most `context` tokens; None without one."""
        return None


def folder_of(place: Path | str) -> Path:
    """Returns the directory that a path is or lies in.

    Raises:
        TypeError: it is a URL, whose runtime has to answer for itself.
    """
    if not isinstance(place, Path):
        raise TypeError(f"{place} lies in no directory")
    return place if place.is_dir() else place.parent
