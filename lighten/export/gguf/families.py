"""What llama.cpp needs to know of each architecture: one row for a family.

A row has llama.cpp's names of the architecture and its tensors, what it stores differently from Hugging Face, and the
keys that it reads besides the common ones. The facts are those of `src/models/*.cpp` and `conversion/` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model import anatomy

Config = dict[str, Any]

LLAMA = {
    anatomy.ATTENTION_NORM: "attn_norm",
    anatomy.QUERY: "attn_q",
    anatomy.KEY: "attn_k",
    anatomy.VALUE: "attn_v",
    anatomy.OUTPUT: "attn_output",
    anatomy.MLP_NORM: "ffn_norm",
    anatomy.GATE: "ffn_gate",
    anatomy.UP: "ffn_up",
    anatomy.DOWN: "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA = {
    **LLAMA,
    anatomy.MLP_NORM: "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OLMO2 = {
    **{module: name for module, name in LLAMA.items() if module != anatomy.ATTENTION_NORM},
    **QK_NORMS,
    anatomy.MLP_NORM: "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PHI3 = {
    anatomy.ATTENTION_NORM: "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    anatomy.OUTPUT: "attn_output",
    anatomy.MLP_NORM: "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    anatomy.DOWN: "ffn_down",
}
QKV = (anatomy.QUERY, anatomy.KEY, anatomy.VALUE)
ALL_BIASES = anatomy.LINEARS


def _nothing(config: Config, facts: ModelFacts) -> Mapping[str, Any]:
    return {}


def _no_objection(config: Config, facts: ModelFacts) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """The facts of one architecture for llama.cpp."""

    arch: str
    """Name in llama.cpp."""
    layer: Mapping[str, str]
    """Name in llama.cpp of every module of a layer, in the order of the file."""
    biases: tuple[str, ...] = ()
    """Modules whose bias llama.cpp adds, if there is one."""
    interleaved: bool = False
    """Whether llama.cpp rotates neighbouring rows of a head. Hugging Face rotates rows half a head apart."""
    norms_less_one: bool = False
    """Whether norm weights are stored less one. llama.cpp wants them whole."""
    activation: str = "silu"
    head: Literal["any", "tied", "own"] = "any"
    """Form of the head: "any" may be the embedding, "tied" must be, "own" is a tensor even if it is the embedding."""
    scalings: tuple[str, ...] = ("linear", "yarn")
    """Scalings of positions that are allowed."""
    partial: bool = False
    """Whether a part of each head may be rotated."""
    windows: bool = False
    """Whether `keys` says which layers have a sliding window. Otherwise llama.cpp has none."""
    defaults: Mapping[str, Any] | None = None
    """What config.json leaves out when it is the default of transformers, where that is not what most have."""
    keys: Callable[[Config, ModelFacts], Mapping[str, Any]] = _nothing
    """Further metadata, by key without the architecture's name."""
    factors: Callable[[Config, ModelFacts], Mapping[str, float]] = _nothing
    """Factors of the weights of modules."""
    objection: Callable[[Config, ModelFacts], str | None] = _no_objection
    """Reason why llama.cpp cannot run this config, or None."""


def _window_keys(period: int) -> Callable[[Config, ModelFacts], dict[str, Any]]:
    """Returns the keys of sliding windows. `period` is llama.cpp's own pattern: every `period`-th layer has none."""

    def keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
        usual = [bool((layer + 1) % period) for layer in range(facts.layers)]
        own = int(config.get("sliding_window_pattern") or period)
        kinds = config.get("layer_types") or ["sliding_attention" if (n + 1) % own else "" for n in range(facts.layers)]
        pattern = [kind == "sliding_attention" for kind in kinds]
        window = int(config["sliding_window"] or config["max_position_embeddings"])
        found: dict[str, Any] = {"attention.sliding_window": window}
        return found if pattern == usual else found | {"attention.sliding_window_pattern": pattern}

    return keys


def _gemma2_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    caps = {f"{name}ping": float(config[f"{name}ping"]) for name in ("attn_logit_softcap", "final_logit_softcap")}
    return {**caps, **_window_keys(2)(config, facts)}


def _gemma3_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    local = (rope.get("sliding_attention") or {}).get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    cap = config.get("final_logit_softcapping")
    return {
        **({"final_logit_softcapping": float(cap)} if cap else {}),
        **_window_keys(6)(config, facts),
        "rope.freq_base_swa": float(local),
    }


def _query_factor(module: str, layers_of_27b: int) -> Callable[[Config, ModelFacts], dict[str, float]]:
    """Returns the factor that cancels llama.cpp's own scale of the attention, which it does not read from the file."""

    def factors(config: Config, facts: ModelFacts) -> dict[str, float]:
        theirs = facts.hidden // facts.heads if facts.layers == layers_of_27b else facts.head_dim
        wanted = float(config.get("query_pre_attn_scalar") or facts.head_dim)
        return {} if wanted == theirs else {module: math.sqrt(theirs / wanted)}

    return factors


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


def _smollm3_objection(config: Config, facts: ModelFacts) -> str | None:
    usual = [int((layer + 1) % 4 != 0) for layer in range(facts.layers)]
    found = config.get("no_rope_layers")
    if found is None and (interval := config.get("no_rope_layer_interval", 4)) != 4:
        found = [int((layer + 1) % interval != 0) for layer in range(facts.layers)]
    if found is not None and list(found)[: facts.layers] != usual:
        return "config.json has other no_rope_layers than every fourth, which llama.cpp's smollm3 takes for granted"
    return None


def _whole_heads(config: Config, facts: ModelFacts) -> str | None:
    if facts.heads * facts.head_dim != facts.hidden:
        return (
            f"the heads together are {facts.heads * facts.head_dim} wide and the hidden states {facts.hidden}; "
            "llama.cpp wants them the same for this architecture"
        )
    return None


def _granite_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    return {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }


_LLAMA = Family("llama", LLAMA, ALL_BIASES, interleaved=True, scalings=("linear", "yarn", "llama3"))

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", LLAMA, QKV),
    "Qwen3ForCausalLM": Family("qwen3", {**LLAMA, **QK_NORMS}, defaults={"head_dim": 128}),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA,
        norms_less_one=True,
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
        factors=_query_factor(anatomy.QUERY, 46),
        objection=_gemma2_objection,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        {**GEMMA, **QK_NORMS},
        norms_less_one=True,
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
        factors=_query_factor("self_attn.q_norm", 62),
        objection=_gemma3_objection,
    ),
    "Phi3ForCausalLM": Family("phi3", PHI3, scalings=("longrope",), partial=True, objection=_whole_heads),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        LLAMA,
        interleaved=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
        objection=_smollm3_objection,
    ),
    "Olmo2ForCausalLM": Family("olmo2", OLMO2, head="own", objection=_whole_heads),
    "GraniteForCausalLM": Family(
        "granite",
        LLAMA,
        ALL_BIASES,
        interleaved=True,
        scalings=("linear", "yarn", "llama3"),
        defaults=dict.fromkeys(
            ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0
        ),
        keys=_granite_keys,
    ),
}
"""Families by the name in config.json's `architectures`. Falcon3 models are `LlamaForCausalLM`."""


def family_of(facts: ModelFacts) -> Family:
    """Returns the row of a model.

    In llama.cpp's qwen2, all heads together must be as wide as the hidden states. With pruned heads they are not.
    llama.cpp's llama has optional biases and only rotates other pairs of rows, so it computes the same.

    Raises:
        RequestError: there is no row.
    """
    if facts.architecture not in FAMILIES:
        raise RequestError(f"GGUF export does not know {facts.architecture}; it knows {', '.join(FAMILIES)}")
    family = FAMILIES[facts.architecture]
    return _LLAMA if family.arch == "qwen2" and facts.heads * facts.head_dim != facts.hidden else family


def tensor_names(family: Family, layers: int) -> dict[str, str]:
    """Returns the GGUF name of every tensor that a model may have, by its Hugging Face name, in file order."""
    names = {anatomy.EMBEDDING_WEIGHT: "token_embd.weight"}
    for layer in range(layers):
        for module, name in family.layer.items():
            kinds = ("weight", "bias") if module in family.biases else ("weight",)
            names |= {f"{anatomy.layer(layer)}{module}.{kind}": f"blk.{layer}.{name}.{kind}" for kind in kinds}
    names[anatomy.NORM_WEIGHT] = "output_norm.weight"
    if family.head != "tied":
        names[anatomy.HEAD_WEIGHT] = "output.weight"
    return names
