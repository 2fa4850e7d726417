"""Transformers models: Hugging Face directories, and the quantized formats that transformers loads."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lighten.errors import Failure
from lighten.evaluate.runtimes import device_rows
from lighten.evaluate.runtimes.batches import Layout, attended, by_length, longest_first, read_scores, to_write
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.runtime import Capability, Choose, Decoding, Floats, Ids, Question, Score, Text, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.evaluate.runtimes.torch_loading import (
    BATCH_TOKENS,
    arithmetic_for_quality,
    describe_quantizer,
    kernels_of,
    load_model,
    repack,
    unpack_linears,
    why_assembled,
)
from lighten.evaluate.runtimes.torch_writing import CACHE_BYTES, PROMPT_TOKENS, write_batch
from lighten.evaluate.speed.options import ATTENTION, Caches, compiled, lacking
from lighten.evaluate.speed.settings import Options
from lighten.model import accelerator
from lighten.model.checkpoint import Checkpoint
from lighten.model.writing import side_by_side
from lighten.step import Report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchRuntime(Defaults):
    """A causal language model of transformers. See `Runtime` for the methods."""

    name = "torch"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes", "rewinds"})

    def __init__(
        self,
        path: Path,
        device: str,
        dtype: str | None,
        trust_remote_code: bool = False,
        options: Options | None = None,
        arithmetic: str | None = None,
    ) -> None:
        """Loads the model; with no `dtype` as it is best for measuring quality, else as it would be served.

        Quality is measured in `arithmetic`; if nobody says which, in float32 where the model fits, else in bfloat16.

        Raises:
            RequestError: no model that transformers reads from safetensors, or a missing extra.
            Failure: damaged weights, or options that this machine has not the means for.
        """
        options = options or Options()
        if lack := lacking(options, device):
            raise Failure(lack)
        checkpoint = Checkpoint(path)
        checkpoint.weight_map  # noqa: B018  refuses pickles and names missing shards before anything is loaded
        method = (checkpoint.quantization or {}).get("quant_method")
        for_quality = dtype is None
        self.device = device
        self.dtype = dtype or arithmetic or arithmetic_for_quality(checkpoint, device)
        # a kernel's rounding is no part of a checkpoint's quality, and its prefill can be slow: take the weights
        unpack = for_quality and self.dtype == "float32"
        assembled = why_assembled(path, method, trust_remote_code, unpack=unpack)
        self.model = load_model(
            path,
            device,
            DTYPES[self.dtype],
            method,
            unpack,
            trust_remote_code,
            options.attention,
            assembled=assembled is not None,
        )
        kernels = kernels_of(self.model)
        unpacked = unpack and unpack_linears(self.model)
        if unpack and device == "cpu":
            repack(self.model)
        elif unpack:
            nn.Module.to(self.model, device)
        accelerator.reset_peak(device)
        self.detail = " + ".join(
            [f"transformers {version('transformers')}", *describe_quantizer(checkpoint, kernels, unpacked, assembled)]
        )
        settings = self.model.config.get_text_config()
        self.vocab = int(settings.vocab_size)
        self.context: int | None = getattr(settings, "max_position_embeddings", None)
        self._tokenizer_path = path
        self._tokenizer: HfTokenizer | None = None
        self._rows: Tensor | None = None
        self._packing: bool | None = None
        self._padding: bool | None = None
        self._hidden: Tensor | None = None
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._before_head)
        self._caches = Caches(self.model.config, options.cache)
        self._step = self.model
        if options.compile != "off":
            hook.remove()
            self._step = compiled(self.model, options.compile)
        attention = str(self.model.config._attn_implementation)
        self.options: Mapping[str, str] = {
            "attention": "flash" if attention == ATTENTION["flash"] else attention,
            "compile": options.compile,
            "cache": options.cache,
        }

    def _before_head(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Keeps the inputs of the head, and passes on only the rows whose logits are wanted."""
        self._hidden = inputs[0]
        return None if self._rows is None else (inputs[0].flatten(0, -2)[self._rows][None],)

    @torch.inference_mode()
    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        return _to_numpy(self.device_logits(ids[None])[0])

    @torch.inference_mode()
    def device_logits(self, ids: Ids) -> Tensor:
        """Returns the logits `[n, length, vocab]` of several texts `[n, length]`, on the model's device."""
        logits: Tensor = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        return logits

    def hidden_of_all(self) -> Floats | None:
        """Returns the inputs of the head in the last `device_logits`, `[n, length, hidden]`."""
        return None if self._hidden is None else _to_numpy(self._hidden)

    def hidden(self) -> Floats | None:
        """See `Runtime`."""
        return None if self._hidden is None else _to_numpy(self._hidden[0])

    @torch.inference_mode()
    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`. Where the model can, a question is one sequence; an ending sees the context and itself."""
        scores: list[list[Score]] = [[] for _ in questions]
        start, done, tokens = time.monotonic(), 0, 0
        report(0, len(questions), "")
        for batch in by_length(questions, BATCH_TOKENS[accelerator.device_type(self.device)], padded=True):
            asked = [questions[index] for index in batch]
            found = self._score(list(map(Layout, asked))) if self._packs(asked) else self._score_apart(asked)
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
            done += len(batch)
            tokens += sum(question.packed for question in asked)
            report(done, len(questions), f"{tokens / (time.monotonic() - start):.0f} tok/s")
        return scores

    def _packs(self, questions: Sequence[Question]) -> bool:
        """Returns whether a question can be one sequence, in which an ending does not see the others.

        Models that carry a state from token to token know no such masks, and a mask of one's own takes the place of a
        sliding window.
        """
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window and max(question.packed for question in questions) > window:
            return False
        if self._packing is None:
            ids = [int(each) for each in np.linspace(3, self.vocab - 1, 14)]
            probe = [Question(ids[:6], [ids[6:10], ids[10:]])]
            try:
                packed = self._score(list(map(Layout, probe)))[0]
            except (TypeError, ValueError, RuntimeError):
                packed = []
            apart = self._score_apart(probe)[0]
            allowed = 1e-3 if self.dtype == "float32" else 0.3
            self._packing = bool(packed) and all(
                abs(one.logprob - other.logprob) < allowed * max(1.0, abs(other.logprob))
                for one, other in zip(packed, apart, strict=True)
            )
        return self._packing

    def _score_apart(self, questions: Sequence[Question]) -> list[list[Score]]:
        """Returns the scores of endings, each in a sequence of its own."""
        layouts = [Layout(Question(each.context, [ending])) for each in questions for ending in each.endings]
        found: list[Score] = []
        size = max(1, BATCH_TOKENS[accelerator.device_type(self.device)] // max(len(each.ids) for each in layouts))
        for start in range(0, len(layouts), size):
            part = layouts[start : start + size]
            width = max(len(each.ids) for each in part)
            ids = np.stack([np.pad(each.ids, (0, width - len(each.ids))) for each in part])
            wanted = [number * width + each.wanted for number, each in enumerate(part)]
            self._rows = torch.from_numpy(np.concatenate(wanted)).to(self.device)
            try:
                output = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False)
            finally:
                self._rows = None
            found += [score for (score,) in self._read(output.logits[0], part)]
        scores = iter(found)
        return [[next(scores) for _ in question.endings] for question in questions]

    def _score(self, layouts: list[Layout]) -> list[list[Score]]:
        width = max(len(layout.ids) for layout in layouts)

        def padded(parts: list[Ids], filler: int) -> Ids:
            return np.stack([np.pad(part, (0, width - len(part)), constant_values=filler) for part in parts])

        ids = padded([layout.ids for layout in layouts], 0)
        positions = padded([layout.positions for layout in layouts], 0)
        segments = padded([layout.segments for layout in layouts], -1)
        sees = attended(segments)
        mask = torch.zeros(sees.shape, dtype=DTYPES[self.dtype], device=self.device)
        mask.masked_fill_(torch.from_numpy(~sees).to(self.device), torch.finfo(mask.dtype).min)
        wanted = [number * width + layout.wanted for number, layout in enumerate(layouts)]
        self._rows = torch.from_numpy(np.concatenate(wanted)).to(self.device)
        try:
            output = self.model(
                input_ids=torch.from_numpy(ids).to(self.device),
                position_ids=torch.from_numpy(positions).to(self.device),
                attention_mask=mask[:, None],
                use_cache=False,
            )
        finally:
            self._rows = None
        return self._read(output.logits[0], layouts)

    def _read(self, logits: Tensor, layouts: Sequence[Layout]) -> list[list[Score]]:
        """Returns the scores from the logits of the wanted places, which stay on their device."""
        if self.device == "cpu":
            return read_scores(_to_numpy(logits), layouts)
        return read_scores(logits, layouts, device_rows.token_logprobs)

    @torch.inference_mode()
    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`."""
        ids = torch.from_numpy(prompt).to(self.device)
        cache = self._caches.empty(len(prompt), prompt.shape[1] + steps)
        forward, written = self.model, []
        times = [self._now()]
        for _ in range(steps):
            output = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            times.append(self._now())
            written.append(ids)
            forward = self._step
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]], torch.cat(written, 1).cpu().numpy())

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        ids, cache = prompt, None
        for _ in range(most):
            with torch.inference_mode():
                batch = torch.tensor([ids], device=self.device)
                output = self.model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = [(yield _to_numpy(output.logits[0, -1]))]

    def decode_many(self, prompts: Sequence[list[int]], most: Sequence[int], choose: Choose) -> None:
        """See `Runtime`. Prompts of similar length are padded on the left, where the model bears that."""
        if len(longest_first(prompts, most)) < 2 or not self._pads():
            super().decode_many(prompts, most, choose)
            return
        kind, free = accelerator.device_type(self.device), accelerator.free_bytes(self.device)
        budget = CACHE_BYTES[kind] if free is None else min(CACHE_BYTES[kind], free // 2)

        def room(length: int) -> int:
            return side_by_side(self.model.config, length, budget)

        for batch in to_write(prompts, most, together=PROMPT_TOKENS[kind], room=room):
            write_batch(self.model, {number: prompts[number] for number in batch}, most, choose)

    def _pads(self) -> bool:
        """Returns whether texts of several lengths get the logits in a batch that they get alone.

        Models that carry a state from token to token, or count positions in their own way, may not.
        """
        if self._padding is None:
            ids = [int(each) for each in np.linspace(3, self.vocab - 1, 14)]
            prompts, written = [ids[:3], ids[3:10]], ids[10:13]
            alone, together = _Followed(written), _Followed(written)
            super().decode_many(prompts, [len(written)] * 2, alone)
            try:
                write_batch(self.model, dict(enumerate(prompts)), [len(written)] * 2, together)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                together.seen.clear()
            allowed = 1e-3 if self.dtype == "float32" else 0.1
            self._padding = together.seen.keys() == alone.seen.keys() and all(
                np.abs(together.seen[each] - alone.seen[each]).max() < allowed * np.abs(alone.seen[each]).max()
                for each in alone.seen
            )
        return self._padding

    def text(self, most: int) -> Text:
        """See `Runtime`."""
        return _Text(self)

    def _now(self) -> float:
        accelerator.synchronize(self.device)
        return time.perf_counter()

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._tokenizer is None:
            self._tokenizer = HfTokenizer(self._tokenizer_path)
        return self._tokenizer.encode(text)

    def peak_vram_bytes(self) -> int | None:
        """See `Runtime`."""
        return accelerator.peak_bytes(self.device)

    def close(self) -> None:
        """See `Runtime`."""
        del self.model, self._step
        self._hidden = None
        gc.collect()  # hooks and modules refer to each other


class _Followed:
    """A choice of given tokens. It keeps the logits by number and place of the token."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._places = [0, 0]
        self.seen: dict[tuple[int, int], Floats] = {}

    def __call__(self, number: int, logits: Floats) -> int:
        """See `Choose`."""
        place = self._places[number]
        self.seen[number, place] = logits.copy()
        self._places[number] += 1
        return self._tokens[place]


class _Text:
    """See `Text`."""

    def __init__(self, runtime: TorchRuntime) -> None:
        from transformers import DynamicCache

        self._runtime = runtime
        self._cache = DynamicCache(config=runtime.model.config)
        if hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()  # a sliding window forgets what may be needed again otherwise
        self.length = 0

    @torch.inference_mode()
    def extend(self, ids: list[int], wanted: int) -> list[int]:
        """See `Text`."""
        batch = torch.tensor([ids], device=self._runtime.device)
        output = self._runtime.model(
            input_ids=batch, past_key_values=self._cache, use_cache=True, logits_to_keep=wanted
        )
        self.length += len(ids)
        found: list[int] = output.logits[0].argmax(-1).tolist()
        return found

    def cut(self, length: int) -> None:
        """See `Text`."""
        self._cache.crop(length - self.length)
        self.length = length


def _to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
