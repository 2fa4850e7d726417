"""Families whose layers are all an attention and an MLP. The facts are those of `src/models/*.cpp` of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.family import Config, Family, Rules, part
from lighten.model.gguf.turns import KEY_ROWS, QUERY_ROWS

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

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


def window_keys(period: int) -> Callable[[Config, ModelFacts], dict[str, Any]]:
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


def layer_types(header: Header, period: int) -> list[str]:
    """Returns the kinds of attention of all layers of a file; see `window_keys`."""
    layers = header.size("block_count")
    said = header.fields.get(f"{header.arch}.attention.sliding_window_pattern")
    if isinstance(said, int) and not isinstance(said, bool) and said > 0:
        period = said
    pattern = said if isinstance(said, list) else [(layer + 1) % period for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in pattern]


def _olmo3_config(header: Header) -> Config:
    theta = header.decimal("rope.freq_base_swa", header.decimal("rope.freq_base", 10000.0))
    return {
        "sliding_window": header.integer("attention.sliding_window"),
        "layer_types": layer_types(header, 4),
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": theta}},
    }


def _ministral3_rope(config: Config) -> dict[str, Any]:
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _ministral3_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    return {"attention.temperature_scale": float(_ministral3_rope(config).get("llama_4_scaling_beta") or 0.0)}


def _ministral3_config(header: Header) -> Config:
    beta = header.decimal("attention.temperature_scale", 0.0)
    return {"rope_base": {"llama_4_scaling_beta": beta}}


def _ministral3_objection(config: Config, facts: ModelFacts) -> str | None:
    rope = _ministral3_rope(config)
    if float(rope.get("mscale") or 1.0) != 1.0:
        return "config.json has another mscale for YaRN than 1, which llama.cpp's mistral3 takes for granted"
    return None


def _smollm3_objection(config: Config, facts: ModelFacts) -> str | None:
    usual = [int((layer + 1) % 4 != 0) for layer in range(facts.layers)]
    found = config.get("no_rope_layers")
    if found is None and (interval := config.get("no_rope_layer_interval", 4)) != 4:
        found = [int((layer + 1) % interval != 0) for layer in range(facts.layers)]
    if found is not None and list(found)[: facts.layers] != usual:
        return "config.json has other no_rope_layers than every fourth, which llama.cpp's smollm3 takes for granted"
    return None


def _llama_config(header: Header) -> Config:
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
    "Olmo3ForCausalLM": Family(
        "olmo2",
        "Olmo3ForCausalLM",
        "olmo3",
        part(OLMO2),
        head="own",
        windows=True,
        scalings=("yarn",),
        defaults={"sliding_window": 4096},
        keys=window_keys(4),
        config=_olmo3_config,
        objection=whole_heads,
        reads=lambda header: bool(header.integer("attention.sliding_window", 0)),
    ),
    "Olmo2ForCausalLM": Family("olmo2", "Olmo2ForCausalLM", "olmo2", part(OLMO2), head="own", objection=whole_heads),
    "Ministral3ForCausalLM": Family(
        "mistral3",
        "Ministral3ForCausalLM",
        "ministral3",
        llama(),
        scalings=("yarn",),
        yarn={
            "beta_fast": "rope.scaling.yarn_beta_fast",
            "beta_slow": "rope.scaling.yarn_beta_slow",
            "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
            "mscale": "",
        },
        keys=_ministral3_keys,
        config=_ministral3_config,
        objection=_ministral3_objection,
    ),
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
