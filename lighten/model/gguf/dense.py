"""Families whose layers are all an attention and an MLP. The facts are those of `src/models/*.cpp` of llama.cpp."""

from __future__ import annotations

from typing import Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.family import Config, Family, Rules, part
from lighten.model.gguf.turns import KEY_ROWS, QUERY_ROWS

QKV = (anatomy.QUERY, anatomy.KEY, anatomy.VALUE)
ROWS = {anatomy.QUERY: QUERY_ROWS, anatomy.KEY: KEY_ROWS}
"""Turns of an architecture in which llama.cpp rotates neighbouring rows of a head."""
ATTENTION = {
    anatomy.ATTENTION_NORM: "attn_norm",
    anatomy.QUERY: "attn_q",
    anatomy.KEY: "attn_k",
    anatomy.VALUE: "attn_v",
    anatomy.OUTPUT: "attn_output",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP = {anatomy.GATE: "ffn_gate", anatomy.UP: "ffn_up", anatomy.DOWN: "ffn_down"}
LLAMA = {**ATTENTION, anatomy.MLP_NORM: "ffn_norm", **MLP}
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
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
"""Granite's factors, by key."""


def llama(biases: tuple[str, ...] = ()) -> Rules:
    """Returns the layer of llama.cpp's llama and of those that rotate like it."""
    return part(LLAMA, biases, ROWS)


def whole_heads(config: Config, facts: ModelFacts) -> str | None:
    """Refuses heads that together are not as wide as the hidden states."""
    if facts.heads * facts.head_dim != facts.hidden:
        return (
            f"the heads together are {facts.heads * facts.head_dim} wide and the hidden states {facts.hidden}; "
            "llama.cpp wants them the same for this architecture"
        )
    return None


def _smollm3_objection(config: Config, facts: ModelFacts) -> str | None:
    usual = [int((layer + 1) % 4 != 0) for layer in range(facts.layers)]
    found = config.get("no_rope_layers")
    if found is None and (interval := config.get("no_rope_layer_interval", 4)) != 4:
        found = [int((layer + 1) % interval != 0) for layer in range(facts.layers)]
    if found is not None and list(found)[: facts.layers] != usual:
        return "config.json has other no_rope_layers than every fourth, which llama.cpp's smollm3 takes for granted"
    return None


def _llama_config(header: Any) -> Config:
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


LLAMA_ROW = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    llama(anatomy.LINEARS),
    scalings=("linear", "yarn", "llama3"),
    config=_llama_config,
)
FAMILIES = {
    "LlamaForCausalLM": LLAMA_ROW,
    "MistralForCausalLM": LLAMA_ROW,
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2ForCausalLM", "qwen2", part(LLAMA, QKV)),
    "Qwen3ForCausalLM": Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3", part({**LLAMA, **QK_NORMS}), defaults={"head_dim": 128}
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        part(PHI3),
        scalings=("longrope",),
        partial=True,
        objection=whole_heads,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        llama(),
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
        objection=_smollm3_objection,
    ),
    "Olmo2ForCausalLM": Family("olmo2", "Olmo2ForCausalLM", "olmo2", part(OLMO2), head="own", objection=whole_heads),
    "GraniteForCausalLM": Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        llama(anatomy.LINEARS),
        scalings=("linear", "yarn", "llama3"),
        defaults=dict.fromkeys(MULTIPLIERS.values(), 1.0),
        pairs=MULTIPLIERS,
        config=_llama_config,
    ),
}
"""Families by the name in config.json's `architectures`. Falcon3 models are `LlamaForCausalLM`."""
