"""Families in which layers of different kinds take turns: attention, convolutions, states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.experts import DENSE, SIGMOID, SIZES, routed, router
from lighten.model.gguf.family import Config, Family, Rule, part
from lighten.model.gguf.turns import DEPTHWISE

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

ATTENDS, CONVOLVES = "attention", "convolution"
"""Groups of a layer's tensors."""


def kv_heads(config: Config, facts: ModelFacts, attends: list[bool]) -> list[int]:
    """Returns the heads of keys and values of every layer; 0 tells llama.cpp that a layer has no attention."""
    return [facts.kv_heads if each else 0 for each in attends]


def attending(header: Header) -> list[bool]:
    """Returns which layers of a file have attention, by `kv_heads`."""
    value = header.fields.get(f"{header.arch}.attention.head_count_kv", 0)
    return [bool(each) for each in (value if isinstance(value, list) else [value] * header.size("block_count"))]


LFM2_AROUND = (
    Rule(anatomy.EMBEDDING_WEIGHT, ("token_embd.weight",)),
    Rule("model.embedding_norm.weight", ("token_embd_norm.weight",)),
    Rule(anatomy.HEAD_WEIGHT, ("output.weight",), needed=False),
)
LFM2 = (
    *part({"operator_norm": "attn_norm", "ffn_norm": "ffn_norm"}),
    *part(
        {
            anatomy.QUERY: "attn_q",
            anatomy.KEY: "attn_k",
            anatomy.VALUE: "attn_v",
            "self_attn.out_proj": "attn_output",
            "self_attn.q_layernorm": "attn_q_norm",
            "self_attn.k_layernorm": "attn_k_norm",
        },
        group=ATTENDS,
    ),
    *part({"conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj"}, group=CONVOLVES),
    Rule("conv.conv.weight", ("shortconv.conv.weight",), DEPTHWISE, group=CONVOLVES, rounded=False),
    *part(
        {"feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down"},
        group=DENSE,
    ),
)


def _lfm2_attends(config: Config, facts: ModelFacts) -> list[bool]:
    if kinds := config.get("layer_types"):
        return [kind == "full_attention" for kind in kinds]
    full = config.get("full_attn_idxs") or range(facts.layers)
    return [layer in full for layer in range(facts.layers)]


def _lfm2_width(config: Config, facts: ModelFacts) -> int:
    """Returns the inner width, which transformers computes from the one in config.json unless it is told not to."""
    if not config.get("block_auto_adjust_ff_dim", True):
        return facts.intermediate
    width = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * facts.intermediate / 3))
    multiple = int(config.get("block_multiple_of") or 256)
    return multiple * -(-width // multiple)


def _lfm2_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    return {
        "feed_forward_length": _lfm2_width(config, facts),
        "attention.head_count_kv": kv_heads(config, facts, _lfm2_attends(config, facts)),
        "attention.layer_norm_rms_epsilon": float(config.get("norm_eps") or 1e-5),
    }


def _lfm2_config(header: Header) -> Config:
    kinds = ["full_attention" if each else "conv" for each in attending(header)]
    return {
        "block_auto_adjust_ff_dim": False,
        "norm_eps": header.decimal("attention.layer_norm_rms_epsilon"),
        "rms_norm_eps": None,
        "layer_types": kinds,
    }


def _no_conv_bias(config: Config, facts: ModelFacts) -> str | None:
    return "config.json has conv_bias, which llama.cpp's lfm2 lacks" if config.get("conv_bias") else None


def _lfm2_moe_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    return {
        **_lfm2_keys({**config, "block_auto_adjust_ff_dim": False}, facts),
        "expert_gating_func": SIGMOID,
    }


def _lfm2_moe_objection(config: Config, facts: ModelFacts) -> str | None:
    if not config.get("use_expert_bias", True) or not config.get("norm_topk_prob", True):
        return "llama.cpp's lfm2moe always has a bias of experts and weights that add up to one; config.json says no"
    return _no_conv_bias(config, facts)


FAMILIES = {
    "Lfm2ForCausalLM": Family(
        "lfm2",
        "Lfm2ForCausalLM",
        "lfm2",
        LFM2,
        LFM2_AROUND,
        varied=True,
        scalings=(),
        defaults={"tie_word_embeddings": True, "rope_theta": 1_000_000.0, "conv_L_cache": 3},
        pairs={"shortconv.l_cache": "conv_L_cache"},
        keys=_lfm2_keys,
        config=_lfm2_config,
        objection=_no_conv_bias,
    ),
    "Lfm2MoeForCausalLM": Family(
        "lfm2moe",
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        (
            *LFM2,
            *router("feed_forward.gate", "feed_forward.expert_bias"),
            *routed("feed_forward.experts", ("w1", "w3", "w2")),
        ),
        LFM2_AROUND,
        head="tied",
        varied=True,
        experts=True,
        scalings=(),
        defaults={"tie_word_embeddings": True, "rope_theta": 1_000_000.0, "conv_L_cache": 3},
        pairs={
            "shortconv.l_cache": "conv_L_cache",
            "expert_count": "num_experts",
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_scale": "routed_scaling_factor",
            **SIZES,
        },
        keys=_lfm2_moe_keys,
        config=lambda header: _lfm2_config(header) | {"use_expert_bias": True, "norm_topk_prob": True},
        objection=_lfm2_moe_objection,
    ),
}
"""Families by the name in config.json's `architectures`."""
