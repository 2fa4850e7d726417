"""Directories in MLX's form, through mlx_lm's model classes and caches."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lighten.errors import Failure, RequestError, missing_extra
from lighten.evaluate.runtimes.batches import Layout, read_scores
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Floats, Ids, Question, Runtime, Score, Text, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.model.checkpoint import facts_of, read_config
from lighten.model.mlx_source import is_mlx, quantization
from lighten.step import Report

STORED = "as stored"
"""Arithmetic that a model is served in: that of the numbers in its files."""
PREFILL = 2048
"""Maximum number of tokens of a prompt that are computed together, as in mlx_lm."""


class MlxOpener(Opener[Path]):
    """Model directories in MLX's form, whoever made them."""

    name: ClassVar[str] = "mlx"
    packages: ClassVar[tuple[str, ...]] = ("mlx", "mlx-lm")
    modules: ClassVar[tuple[str, ...]] = ("mlx", "mlx_lm")
    extra: ClassVar[str | None] = "mlx"
    weights: ClassVar[tuple[str, ...]] = (".safetensors",)
    together: ClassVar[int | None] = PREFILL

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`."""
        return target if isinstance(target, Path) and is_mlx(target) else None

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`."""
        return MlxRuntime(place, conditions.device, exact=conditions.dtype is None)

    def served_in(self, device: str) -> str:
        """See `Opener`."""
        return STORED

    def multiplies_in(self, dtype: str, device: str) -> str:
        """See `Opener`: in the type of all that is not quantized; packed weights are unpacked to it."""
        return dtype


class MlxRuntime(Defaults):
    """A causal language model of mlx_lm. See `Runtime` for the methods."""

    name = "mlx"

    def __init__(self, path: Path, device: str, *, exact: bool) -> None:
        """Loads the model; `exact` computes in float32, which holds every number of its files.

        MLX runs on Apple's GPU where there is one, else on the asked device if it was built for that, else on the CPU.

        Raises:
            RequestError: a package is missing, mlx_lm has no such family, or code of the directory would run.
            Failure: the weights are damaged or not those of the family.
        """
        try:
            import mlx.core as mx
            from mlx_lm.models import cache
        except ImportError as error:
            raise missing_extra("mlx", (error.name or "mlx_lm").partition(".")[0], "running an MLX model") from error
        self._mx, self._caches = mx, cache
        self.path = path
        config = read_config(path)
        facts = facts_of(config, str(path))
        self.vocab, self.context = facts.vocab, facts.context
        self.device = _use(mx, device)
        self._compiles = _compiles(mx)
        self.model = _load(path, config)
        if exact:
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())
        self.dtype = _type(mx, self.model)
        self.detail = f"mlx {version('mlx')} + mlx-lm {version('mlx-lm')} ({', '.join(self._described(config))})"
        can: list[Capability] = ["logits", "scores", "decodes"]
        self.capabilities: frozenset[Capability] = frozenset([*can, *self._rewinding()])
        self._tokenizer: HfTokenizer | None = None

    def _described(self, config: dict[str, Any]) -> list[str]:
        settings = quantization(config)
        weights = (
            f"{settings.get('mode', 'affine')} {settings['bits']} bits in groups of {settings['group_size']}"
            if settings
            else "plain weights"
        )
        others = {
            (each["bits"], each.get("group_size")) for each in (settings or {}).values() if isinstance(each, dict)
        }
        mixed = [f"and {len(others)} other widths"] if others else []
        return [weights, *mixed, *([] if self._compiles else ["not compiled: no C++ compiler here"])]

    def _rewinding(self) -> list[Capability]:
        return ["rewinds"] if self._caches.can_trim_prompt_cache(self._empty()) else []

    def _empty(self) -> list[Any]:
        found: list[Any] = self._caches.make_prompt_cache(self.model)
        return found

    def _logits(self, ids: Ids, past: list[Any] | None) -> Any:
        """Returns the logits of `ids [batch, n]` after a cache, on the device; `[batch, n, vocab]`."""
        try:
            return self.model(self._mx.array(ids.astype(np.int32)), cache=past)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:  # of the model class
            raise Failure(f"mlx_lm failed on {ids.shape[1]} tokens of {self.path}: {_reason(error)}") from error

    def _last(self, ids: Ids, past: list[Any]) -> Any:
        """Returns the logits of the last of `ids [batch, n]` after a cache, `[batch, vocab]`, pieces at a time."""
        while ids.shape[1] > PREFILL:
            self._logits(ids[:, :PREFILL], past)
            self._mx.eval([each.state for each in past])
            ids = ids[:, PREFILL:]
        return self._logits(ids, past)[:, -1]

    def _floats(self, values: Any) -> Floats:
        found: Floats = np.array(values.astype(self._mx.float32))
        return found

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        return self._floats(self._logits(ids[None], None)[0])

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`: one question after the other, its context once."""
        scores: list[list[Score]] = []
        start, tokens = time.monotonic(), 0
        report(0, len(questions), "")
        for question in questions:
            scores.append(self._score(question))
            tokens += question.packed
            report(len(scores), len(questions), f"{tokens / (time.monotonic() - start):.0f} tok/s")
        return scores

    def _score(self, question: Question) -> list[Score]:
        past = self._empty()
        rows = [self._floats(self._last(np.array(question.context)[None], past))]
        for ending in question.endings:
            if len(ending) > 1:
                own = copy.deepcopy(past)  # a window or a state takes nothing back
                rows.append(self._floats(self._logits(np.array(ending[:-1])[None], own)[0]))
        return read_scores(np.concatenate(rows), [Layout(question)])[0]

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`. As in mlx_lm, a step is begun before the token of the step before it is read."""
        mx, past, times, written = self._mx, self._empty(), [time.perf_counter()], []
        ids = self._last(prompt, past).argmax(-1)
        mx.async_eval(ids)
        for step in range(steps):
            if step + 1 < steps:
                following = self.model(ids[:, None], cache=past)[:, -1].argmax(-1)
                mx.async_eval(following)
            written.append(np.array(ids, dtype=np.int64))
            times.append(time.perf_counter())
            ids = following if step + 1 < steps else ids
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]], np.stack(written, 1))

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        ids, past = prompt, self._empty()
        for _ in range(most):
            ids = [(yield self._floats(self._last(np.array(ids)[None], past)[0]))]

    def text(self, most: int) -> Text:
        """See `Runtime`."""
        if "rewinds" not in self.capabilities:
            return super().text(most)
        return _Text(self)

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._tokenizer is None:
            self._tokenizer = HfTokenizer(self.path)
        return self._tokenizer.encode(text)

    def peak_vram_bytes(self) -> int | None:
        """See `Runtime`."""
        return None if self.device == "cpu" else int(self._mx.get_peak_memory())

    def close(self) -> None:
        """See `Runtime`."""
        del self.model
        self._mx.clear_cache()


class _Text:
    """See `Text`."""

    def __init__(self, runtime: MlxRuntime) -> None:
        self._runtime = runtime
        self._past = runtime._empty()
        self.length = 0

    def extend(self, ids: list[int], wanted: int) -> list[int]:
        """See `Text`."""
        logits = self._runtime._logits(np.array(ids)[None], self._past)
        self.length += len(ids)
        found: list[int] = logits[0, -wanted:].argmax(-1).tolist()
        return found

    def cut(self, length: int) -> None:
        """See `Text`."""
        asked = self.length - length
        if asked and self._runtime._caches.trim_prompt_cache(self._past, asked) != asked:
            raise Failure("the cache of this model gives no tokens back once its window is full: take a shorter text")
        self.length = length


def _use(mx: Any, asked: str) -> str:
    """Chooses the device that MLX computes on; returns its name."""
    apple = mx.metal.is_available()
    gpu = mx.default_device() == mx.Device(mx.gpu)
    if gpu and (apple or asked != "cpu"):
        return "metal" if apple else asked
    mx.set_default_device(mx.cpu)
    return "cpu"


def _compiles(mx: Any) -> bool:
    """Returns whether MLX can compile here; on a CPU that takes a C++ compiler. Without one it is told not to."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * x + 1)(mx.ones(4)))
    except RuntimeError:
        mx.disable_compile()
        return False
    return True


def _load(path: Path, config: dict[str, Any]) -> Any:
    """Returns the model of a directory. Nothing of its own code runs."""
    from mlx_lm.utils import load_model

    if config.get("model_file") is not None:
        raise RequestError(
            f"{path} names code of its own in config.json (model_file), which is not run: take a model that mlx_lm has "
            "a class for"
        )
    try:
        model, _ = load_model(path, lazy=True, strict=True)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise Failure(f"mlx_lm {version('mlx-lm')} cannot load {path}: {_reason(error)}") from error
    return model


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _type(mx: Any, model: Any) -> str:
    """Returns the type of the numbers that are not packed: what most of them have."""
    from mlx.utils import tree_flatten

    sizes: dict[str, int] = {}
    for _, values in tree_flatten(model.parameters()):
        if mx.issubdtype(values.dtype, mx.floating):
            name = str(values.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + values.size
    return max(sizes, key=lambda name: sizes[name])
