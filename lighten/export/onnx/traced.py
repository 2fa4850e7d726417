"""What the exporter traces for each family of models: modules, example inputs and the names of the inputs.

A causal language model becomes `model.onnx`, which takes ids, mask, positions and a key-value cache, and gives logits
and the longer cache. An encoder becomes `model.onnx` without a cache. A sequence-to-sequence model becomes
`encoder_model.onnx`, which also gives the keys and values that the decoder's layers attend to, and
`decoder_model.onnx`, which takes them besides its own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lighten.errors import Failure
from lighten.export.onnx import builder
from lighten.model.onnx_source import DECODER, ENCODER

BATCH, LENGTH, PAST, SOURCE = 2, 3, 5, 4
"""Sizes of the inputs that the graphs are traced with: none is 0 or 1, which torch.export takes for constants."""
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Traced:
    """A module to trace, with example inputs, their dynamic axes and the names of all inputs and outputs."""

    file: str
    module: nn.Module
    inputs: tuple[Any, ...]
    axes: tuple[Any, ...]
    entering: list[str]
    leaving: list[str]


def traced(model: Any, family: str) -> list[Traced]:
    """Returns the modules that a model of a family is traced as, one for each file."""
    return {"causal": _causal, "encoder": _encoder, "seq2seq": _seq2seq}[family](model)


def untraced(model: Any, reason: str) -> str:
    """Returns the message about a model that has no plain graph: why, and what can be done instead."""
    name = type(model).__name__
    other = "graph: genai may hold it" if builder.knows(name) else "write it as GGUF, or serve it with transformers"
    return f"torch cannot trace {name} as a plain graph ({reason}): {other}"


class _CausalCell(nn.Module):
    """A causal language model with its cache as pairs of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Pairs) -> Any:
        from transformers.cache_utils import DynamicCache

        cache = _filled(DynamicCache(), past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, _pairs(output.past_key_values)


class _EncoderCell(nn.Module):
    """An encoder with its tensors as a tuple."""

    def __init__(self, model: Any, entering: list[str], leaving: list[str]) -> None:
        super().__init__()
        self.model, self.entering, self.leaving = model, entering, leaving

    def forward(self, *inputs: Tensor) -> Any:
        output = self.model(**dict(zip(self.entering, inputs, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.leaving)


class _SourceCell(nn.Module):
    """The encoder of a sequence-to-sequence model, and the keys and values that its decoder attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # one step of the decoder; only what depends on the source is kept
        step = self.model(
            encoder_outputs=(hidden,),
            attention_mask=attention_mask,
            decoder_input_ids=torch.zeros_like(input_ids[:, :1]),
            use_cache=True,
        )
        return hidden, _pairs(step.past_key_values.cross_attention_cache)


class _TargetCell(nn.Module):
    """The decoder of a sequence-to-sequence model, with its own cache and the states that it attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, cross: Pairs, past: Pairs) -> Any:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(_filled(DynamicCache(), past), _filled(DynamicCache(), cross))
        for layer in range(len(cross)):
            cache.is_updated[layer] = True
        key = cross[0][0]
        # the decoder reads its shape only: keys and values are in the cache
        source = torch.zeros(key.shape[0], key.shape[2], self.model.config.d_model, dtype=key.dtype)
        output = self.model(
            encoder_outputs=(source,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, _pairs(output.past_key_values.self_attention_cache)


def _filled(cache: Any, pairs: Pairs) -> Any:
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    return cache


def _pairs(cache: Any) -> Pairs:
    return [(layer.keys, layer.values) for layer in _own(cache).layers]


def _own(cache: Any) -> Any:
    """Returns the cache of the decoder's own attention, without that of the attention to an encoder."""
    return getattr(cache, "self_attention_cache", cache)


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _ids(model: Any, *shape: int) -> Tensor:
    return torch.randint(
        0, model.config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0)
    )


def _random(pairs: Pairs, length: int) -> Pairs:
    """Returns a cache of another length, with the sizes of `pairs`."""
    generator = torch.Generator().manual_seed(0)

    def made(like: Tensor) -> Tensor:
        size = (BATCH, like.shape[1], length, like.shape[3])
        return torch.randn(size, generator=generator).to(like.dtype)

    return [(made(key), made(value)) for key, value in pairs]


def _probe(model: Any) -> Any:
    """Returns the cache of a model, which has keys and values and nothing else.

    Raises:
        Failure: there is none, or layers keep states of another form.
    """
    try:
        cache = model(input_ids=_ids(model, 1, 2), use_cache=True).past_key_values
    except Exception as error:  # a model's own code may raise anything
        raise Failure(untraced(model, f"{type(error).__name__}: {error}")) from error
    layers = getattr(_own(cache), "layers", None) or []
    forms = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    empty = any(getattr(layer, "keys", None) is None for layer in layers)
    if not layers or forms or empty:
        what = ", ".join(sorted(forms)) or "no keys and values for each layer"
        raise Failure(untraced(model, f"its cache has {what}, and a graph takes keys and values"))
    return cache


@torch.no_grad()
def _causal(model: Any) -> list[Traced]:
    past = _random(_pairs(_probe(model)), PAST)
    positions = torch.arange(PAST, PAST + LENGTH)[None].repeat(BATCH, 1)
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64)
    step, whole = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    cached = {0: "batch_size", 2: "past_sequence_length"}
    return [
        Traced(
            "model.onnx",
            _CausalCell(model),
            (_ids(model, BATCH, LENGTH), mask, positions, past),
            (step, whole, step, [(cached, cached)] * len(past)),
            ["input_ids", "attention_mask", "position_ids", *_names("past_key_values", len(past))],
            ["logits", *_names("present", len(past))],
        )
    ]


@torch.no_grad()
def _encoder(model: Any) -> list[Traced]:
    inputs = {"input_ids": _ids(model, BATCH, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    leaving = [name for name, value in model(**inputs, return_dict=True).items() if isinstance(value, Tensor)]
    axes = {0: "batch_size", 1: "sequence_length"}
    cell = _EncoderCell(model, list(inputs), leaving)
    # inputs that are passed on as *inputs are one argument of the module
    return [Traced("model.onnx", cell, tuple(inputs.values()), ((axes,) * len(inputs),), list(inputs), leaving)]


@torch.no_grad()
def _seq2seq(model: Any) -> list[Traced]:
    mask = torch.ones(BATCH, SOURCE, dtype=torch.int64)
    ids = _ids(model, BATCH, SOURCE)
    probe = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    cross, past = _pairs(probe.cross_attention_cache), _random(_pairs(probe.self_attention_cache), PAST)
    source, target = {0: "batch_size", 1: "source_length"}, {0: "batch_size", 1: "sequence_length"}
    attended, cached = {0: "batch_size", 2: "source_length"}, {0: "batch_size", 2: "past_sequence_length"}
    count = len(past)
    return [
        Traced(
            ENCODER,
            _SourceCell(model),
            (ids, mask),
            (source, source),
            ["input_ids", "attention_mask"],
            ["last_hidden_state", *_names("cross", count)],
        ),
        Traced(
            DECODER,
            _TargetCell(model),
            (_ids(model, BATCH, LENGTH), mask, cross, past),
            (target, source, [(attended, attended)] * count, [(cached, cached)] * count),
            ["input_ids", "encoder_attention_mask", *_names("cross", count), *_names("past_key_values", count)],
            ["logits", *_names("present", count)],
        ),
    ]
