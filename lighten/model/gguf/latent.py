"""DeepSeek: keys and values come from a small latent vector, which is all that llama.cpp keeps of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.dense import MLP
from lighten.model.gguf.experts import DENSE, SCALES, SIGMOID, SIZES, routed, router, shared
from lighten.model.gguf.family import Config, Family, Rule, part
from lighten.model.gguf.turns import Model, Turn

if TYPE_CHECKING:
    import torch

    from lighten.model.gguf_header import Header

SOFTMAX = 1
"""llama.cpp's number of the gate that chooses experts by a softmax."""


def _split(weight: torch.Tensor, model: Model) -> list[torch.Tensor]:
    """Cuts rows of keys and values of all heads apart; keys are transposed: `[heads, latent, in]`."""
    import torch

    both = weight.reshape(model.facts.heads, -1, weight.shape[-1])
    sizes = [model.size("qk_nope_head_dim"), model.size("v_head_dim")]
    keys, values = torch.split(both, sizes, dim=1)
    return [keys.transpose(1, 2), values]


def _join(tensors: list[torch.Tensor], model: Model) -> torch.Tensor:
    import torch

    keys, values = tensors
    return torch.cat([keys.transpose(1, 2), values], 1).reshape(-1, values.shape[-1])


def _channels(channels: torch.Tensor, model: Model) -> list[torch.Tensor | None]:
    """The values of every head read the latent vector; llama.cpp multiplies queries by the keys' matrices."""
    return [None, channels.repeat(model.facts.heads)]


LAYER = (
    *part({anatomy.ATTENTION_NORM: "attn_norm"}),
    *part({anatomy.QUERY: "attn_q"}, group="queries"),
    *part(
        {
            "self_attn.q_a_proj": "attn_q_a",
            "self_attn.q_a_layernorm": "attn_q_a_norm",
            "self_attn.q_b_proj": "attn_q_b",
        },
        group="latent queries",
    ),
    *part({"self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm"}),
    Rule("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), Turn(_split, _join, channels=_channels)),
    *part({anatomy.OUTPUT: "attn_output", anatomy.MLP_NORM: "ffn_norm"}),
    *part(MLP, group=DENSE),
    *router("mlp.gate"),
    *routed("mlp.experts"),
    *shared("mlp.shared_experts"),
)


def _rope(config: Config) -> dict[str, Any]:
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    latent, rotated = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    grouped = int(config.get("n_group") or 1) > 1
    mscale = _rope(config).get("mscale_all_dim")
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": int(config["qk_nope_head_dim"]) + rotated,
        "attention.value_length_mla": int(config["v_head_dim"]),
        "rope.dimension_count": rotated,
        # a tenth of it, for reasons of llama.cpp's own
        "rope.scaling.yarn_log_multiplier": 0.1 * float(mscale) if mscale else None,
        "expert_group_count": int(config["n_group"]) if grouped else None,
        "expert_group_used_count": int(config["topk_group"]) if grouped else None,
    }


def _config(header: Header) -> Config:
    rotated = header.integer("rope.dimension_count")
    mscale = header.decimal("rope.scaling.yarn_log_multiplier", 0.0) * 10 or None
    return {
        "num_key_value_heads": header.size("attention.head_count"),
        "head_dim": None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": header.integer("attention.key_length_mla") - rotated,
        "v_head_dim": header.integer("attention.value_length_mla"),
        "q_lora_rank": header.integer("attention.q_lora_rank", 0) or None,
        "n_group": header.integer("expert_group_count", 1),
        "topk_group": header.integer("expert_group_used_count", 1),
        "rope_base": {"partial_rotary_factor": None, "mscale": mscale, "mscale_all_dim": mscale},
    }


def _objection(config: Config, facts: ModelFacts) -> str | None:
    rope = _rope(config)
    if (rope.get("mscale") or 1.0) != (rope.get("mscale_all_dim") or rope.get("mscale") or 1.0):
        return "config.json has different values of mscale and mscale_all_dim for YaRN, and llama.cpp reads one of them"
    if config.get("rope_interleave") is False:
        return "config.json has rope_interleave false: rows in another order than llama.cpp's deepseek2 rotates"
    if config.get("attention_bias"):
        return "config.json has attention_bias, which llama.cpp's deepseek2 lacks"
    return None


def _v2_objection(config: Config, facts: ModelFacts) -> str | None:
    if int(config.get("n_group") or 1) > 1 and config.get("topk_method") != "greedy":
        return "groups of experts are chosen by their best expert (topk_method), and llama.cpp sums the best two"
    if config.get("norm_topk_prob"):
        return "config.json has norm_topk_prob, which transformers does not read for this family and llama.cpp does"
    return _objection(config, facts)


_PAIRS = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    **SIZES,
    **SCALES,
}


def _v3(header: Header) -> bool:
    return header.integer("expert_gating_func", SOFTMAX) == SIGMOID


FAMILIES = {
    "DeepseekV3ForCausalLM": Family(
        "deepseek2",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        (*LAYER, *router("mlp.gate", "mlp.gate.e_score_correction_bias")[1:]),
        scalings=("yarn",),
        yarn={"mscale": "", "mscale_all_dim": ""},
        partial=True,
        varied=True,
        experts=True,
        pairs=_PAIRS,
        keys=lambda config, facts: {**_keys(config, facts), "expert_gating_func": SIGMOID},
        config=_config,
        objection=_objection,
        reads=_v3,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek2",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        LAYER,
        scalings=("yarn",),
        yarn={"mscale": "", "mscale_all_dim": ""},
        partial=True,
        varied=True,
        experts=True,
        pairs=_PAIRS,
        keys=lambda config, facts: {**_keys(config, facts), "expert_gating_func": SOFTMAX},
        config=lambda header: {**_config(header), "topk_method": "greedy"},
        objection=_v2_objection,
    ),
}
"""Families by the name in config.json's `architectures`."""
