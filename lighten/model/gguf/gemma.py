"""Gemma: norms stored less one, layers with and without a sliding window, and scales that llama.cpp has built in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.dense import LLAMA, QK_NORMS, layer_types, window_keys
from lighten.model.gguf.family import AROUND, Config, Family, less_one, part
from lighten.model.gguf.turns import Model, Turn, times

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

GEMMA = {
    **LLAMA,
    anatomy.MLP_NORM: "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LOCAL_BASE = 10_000.0
"""Base of the rotation in layers with a window, if a file does not say."""


def _windows(header: Header, period: int) -> Config:
    window = header.integer("attention.sliding_window", 0) or header.integer("context_length")
    return {"sliding_window": window, "layer_types": layer_types(header, period)}


def _theirs(facts: ModelFacts, layers_of_27b: int) -> int:
    return facts.hidden // facts.heads if facts.layers == layers_of_27b else facts.head_dim


def _query_factor(layers_of_27b: int) -> Turn:
    """Returns the factor that cancels llama.cpp's own scale of the attention, which it does not read from the file."""

    def factor(model: Model) -> float:
        theirs = _theirs(model.facts, layers_of_27b)
        wanted = float(model.config.get("query_pre_attn_scalar") or model.facts.head_dim)
        return 1.0 if wanted == theirs else math.sqrt(theirs / wanted)

    return times(factor)


def _scalar(header: Header, layers_of_27b: int) -> int:
    """Returns the scale that a file's queries are made for: that of llama.cpp."""
    heads, layers = header.size("attention.head_count"), header.size("block_count")
    hidden = header.size("embedding_length")
    return hidden // heads if layers == layers_of_27b else header.size("attention.key_length", hidden // heads)


def _gemma2_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    caps = {f"{name}ping": float(config[f"{name}ping"]) for name in ("attn_logit_softcap", "final_logit_softcap")}
    return {**caps, **window_keys(2)(config, facts)}


def _gemma2_config(header: Header) -> Config:
    return {
        "attn_logit_softcapping": header.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scalar(header, 46),
        **_windows(header, 2),
    }


def _gemma3_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    local = (rope.get("sliding_attention") or {}).get("rope_theta") or config.get("rope_local_base_freq")
    cap = config.get("final_logit_softcapping")
    return {
        **({"final_logit_softcapping": float(cap)} if cap else {}),
        **window_keys(6)(config, facts),
        "rope.freq_base_swa": float(local or _LOCAL_BASE),
    }


def _gemma3_config(header: Header) -> Config:
    cap = header.number("final_logit_softcapping", 0.0)
    return {
        "final_logit_softcapping": cap or None,
        "query_pre_attn_scalar": _scalar(header, 62),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": header.decimal("rope.freq_base_swa", _LOCAL_BASE),
            }
        },
        **_windows(header, 6),
    }


def _gemma2_objection(config: Config, facts: ModelFacts) -> str | None:
    missing = [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if not config.get(name)]
    return f"config.json has no {missing[0]}, and llama.cpp's gemma2 always caps" if missing else None


def _gemma3_objection(config: Config, facts: ModelFacts) -> str | None:
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        return f"config.json scales the positions of sliding layers ({local['rope_type']}); llama.cpp's gemma3 does not"
    if config.get("attn_logit_softcapping"):
        return "config.json has attn_logit_softcapping, which llama.cpp's gemma3 lacks"
    if config.get("use_bidirectional_attention"):
        return "config.json has use_bidirectional_attention: not a causal language model"
    return None


FAMILIES = {
    "Gemma2ForCausalLM": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        less_one(part(GEMMA, turns={anatomy.QUERY: _query_factor(46)})),
        less_one(AROUND),
        activation="gelu_pytorch_tanh",
        head="tied",
        scalings=("linear",),
        windows=True,
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        keys=_gemma2_keys,
        config=_gemma2_config,
        objection=_gemma2_objection,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        less_one(part({**GEMMA, **QK_NORMS}, turns={"self_attn.q_norm": _query_factor(62)})),
        less_one(AROUND),
        activation="gelu_pytorch_tanh",
        scalings=("linear",),
        windows=True,
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "rope_theta": 1_000_000.0,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
        },
        keys=_gemma3_keys,
        config=_gemma3_config,
        objection=_gemma3_objection,
    ),
}
"""Families by the name in config.json's `architectures`."""
