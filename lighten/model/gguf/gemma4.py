"""Gemma 4: wider heads in layers without a window, keys and values that layers share, embeddings for every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.dense import QK_NORMS, layer_types, window_keys
from lighten.model.gguf.experts import routed
from lighten.model.gguf.family import AROUND, Config, Family, Rule, part
from lighten.model.gguf.gemma import GEMMA
from lighten.model.gguf.turns import halves

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

SHARED, INPUTS = (anatomy.KEY, anatomy.VALUE, "self_attn.k_norm"), "inputs"
"""Modules that some layers lack; and the group of embeddings for every layer."""


def _has_inputs(config: Config) -> bool:
    return bool(config.get("hidden_size_per_layer_input"))


def _has_experts(config: Config) -> bool:
    return bool(config.get("enable_moe_block"))


_OWN = {**GEMMA, "self_attn.q_norm": QK_NORMS["self_attn.q_norm"]}
LAYER = (
    *part({module: name for module, name in _OWN.items() if module not in SHARED}),
    Rule(f"{anatomy.KEY}.weight", ("attn_k.weight",), group="keys"),
    Rule("self_attn.k_norm.weight", ("attn_k_norm.weight",), group="keys"),
    Rule(f"{anatomy.VALUE}.weight", ("attn_v.weight",), needed=False),
    Rule("layer_scalar", ("layer_output_scale.weight",)),
    Rule("per_layer_input_gate.weight", ("inp_gate.weight",), when=_has_inputs),
    Rule("per_layer_projection.weight", ("proj.weight",), when=_has_inputs),
    Rule("post_per_layer_input_norm.weight", ("post_norm.weight",), when=_has_inputs),
    Rule("router.proj.weight", ("ffn_gate_inp.weight",), rounded=False, when=_has_experts),
    Rule("router.scale", ("ffn_gate_inp.scale",), when=_has_experts),
    Rule("router.per_expert_scale", ("ffn_down_exps.scale",), when=_has_experts),
    Rule("experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), halves(), when=_has_experts),
    Rule("experts.gate_up_proj", ("ffn_gate_up_exps.weight",), needed=False, when=_has_experts),
    Rule("experts.down_proj", ("ffn_down_exps.weight",), when=_has_experts),
    *(replace(rule, when=_has_experts) for rule in routed("experts")),
    Rule("pre_feedforward_layernorm_2.weight", ("pre_ffw_norm_2.weight",), when=_has_experts),
    Rule("post_feedforward_layernorm_1.weight", ("post_ffw_norm_1.weight",), when=_has_experts),
    Rule("post_feedforward_layernorm_2.weight", ("post_ffw_norm_2.weight",), when=_has_experts),
)
LAYERS_INPUTS = (
    Rule("model.embed_tokens_per_layer.weight", ("per_layer_token_embd.weight",), needed=False, when=_has_inputs),
    Rule("model.per_layer_model_projection.weight", ("per_layer_model_proj.weight",), needed=False),
    Rule("model.per_layer_projection_norm.weight", ("per_layer_proj_norm.weight",), needed=False),
)


def _kinds(config: Config, facts: ModelFacts) -> list[str]:
    usual = ["sliding_attention" if (n + 1) % 6 else "full_attention" for n in range(facts.layers)]
    return list(config.get("layer_types") or usual)


def _of_full(config: Config, facts: ModelFacts, name: str, usual: int) -> int:
    """Returns a setting of layers without a window."""
    if found := config.get({"head_dim": "global_head_dim"}.get(name, "num_global_key_value_heads")):
        return int(found)
    own = config.get("per_layer_config") or {}
    kinds = _kinds(config, facts)
    found = [each[name] for layer, each in own.items() if kinds[int(layer)] == "full_attention" and name in each]
    return int(found[0]) if found else usual


def _full_head_dim(config: Config, facts: ModelFacts) -> int:
    return _of_full(config, facts, "head_dim", 512)


def _keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    wide, narrow = _full_head_dim(config, facts), facts.head_dim
    sliding = [kind == "sliding_attention" for kind in _kinds(config, facts)]
    full_heads = _of_full(config, facts, "num_key_value_heads", facts.kv_heads)
    shared = int(config.get("num_kv_shared_layers") or 0)
    doubled = [
        layer >= facts.layers - shared and bool(config.get("use_double_wide_mlp")) for layer in range(facts.layers)
    ]
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    experts = _has_experts(config)
    return {
        **window_keys(6)(config, facts),
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "rope.dimension_count_swa": narrow,
        "rope.freq_base_swa": float(local.get("rope_theta") or 10_000.0),
        "attention.head_count_kv": [facts.kv_heads if each else full_heads for each in sliding]
        if full_heads != facts.kv_heads
        else facts.kv_heads,
        "feed_forward_length": [facts.intermediate * (2 if each else 1) for each in doubled]
        if any(doubled)
        else facts.intermediate,
        "expert_count": int(config["num_experts"]) if experts else None,
        "expert_used_count": int(config["top_k_experts"]) if experts else None,
        "expert_feed_forward_length": int(config["moe_intermediate_size"]) if experts else None,
    }


def _config(header: Header) -> Config:
    kinds = layer_types(header, 6)
    heads = header.fields.get(f"{header.arch}.attention.head_count_kv")
    widths = header.fields.get(f"{header.arch}.feed_forward_length")
    by_layer = heads if isinstance(heads, list) else [heads] * len(kinds)
    of = dict(zip(kinds, by_layer, strict=True))
    few = of.get("sliding_attention", by_layer[0])
    full: Config = {"head_dim": header.size("attention.key_length")}
    if of.get("full_attention", few) != few:
        full["num_key_value_heads"] = of["full_attention"]
    wide = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    experts = header.integer("expert_count", 0)
    lacks_values = any(
        f"blk.{n}.attn_k.weight" in header.tensors and f"blk.{n}.attn_v.weight" not in header.tensors for n in wide
    )
    return {
        "head_dim": header.size("attention.key_length_swa"),
        "num_key_value_heads": few,
        "per_layer_config": {str(number): full for number in wide},
        "attention_k_eq_v": lacks_values,
        "intermediate_size": min(widths) if isinstance(widths, list) else widths,
        "use_double_wide_mlp": isinstance(widths, list) and min(widths) != max(widths),
        "num_kv_shared_layers": header.integer("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": header.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": header.tensors["per_layer_token_embd.weight"].shape[0]
        if "per_layer_token_embd.weight" in header.tensors
        else None,
        "sliding_window": header.integer("attention.sliding_window"),
        "layer_types": kinds,
        "enable_moe_block": bool(experts),
        "num_experts": experts or None,
        "top_k_experts": header.integer("expert_used_count", 0) or None,
        "moe_intermediate_size": header.integer("expert_feed_forward_length", 0) or None,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": header.decimal("rope.freq_base_swa", 10_000.0),
            }
        },
    }


def _objection(config: Config, facts: ModelFacts) -> str | None:
    if config.get("use_bidirectional_attention") == "all":
        return "config.json has use_bidirectional_attention: not a causal language model"
    if config.get("attention_bias"):
        return "config.json has attention_bias, which llama.cpp's gemma4 lacks"
    if _has_inputs(config) and config.get("vocab_size_per_layer_input", facts.vocab) != facts.vocab:
        return "config.json has another vocab_size_per_layer_input than vocab_size, which llama.cpp takes for the same"
    return None


FAMILIES = {
    "Gemma4ForCausalLM": Family(
        "gemma4",
        "Gemma4ForCausalLM",
        "gemma4_text",
        LAYER,
        (AROUND[0], *LAYERS_INPUTS, *AROUND[1:]),
        activation="gelu_pytorch_tanh",
        head="tied",
        scalings=("proportional",),
        windows=True,
        varied=True,
        experts=True,
        rotates=_full_head_dim,
        defaults={"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 512},
        pairs={"final_logit_softcapping": "final_logit_softcapping"},
        keys=_keys,
        config=_config,
        objection=_objection,
    )
}
"""Families by the name in config.json's `architectures`."""
