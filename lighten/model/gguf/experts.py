"""Families with experts. A file has one tensor for all experts; a checkpoint has one for each, or joins gate and up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.dense import ATTENTION, MLP, QK_NORMS, QKV, layer_types, window_keys
from lighten.model.gguf.family import EXPERT, Config, Family, Rule, Rules, part
from lighten.model.gguf.turns import ALTERNATE, TRANSPOSED, TRANSPOSED_ALTERNATE, TRANSPOSED_HALVES

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

DENSE, SPARSE = "dense", "sparse"
"""Groups: a layer has an MLP, or experts."""
SIGMOID = 2
"""llama.cpp's number of the gate that chooses experts by sigmoids."""


def routed(module: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Rules:
    """Returns the rules of experts that are stored one by one, `names` in the order gate, up, down."""
    return tuple(
        Rule(f"{module}.{EXPERT}.{name}.weight", (f"ffn_{kind}_exps.weight",), group=SPARSE)
        for name, kind in zip(names, ("gate", "up", "down"), strict=True)
    )


def shared(module: str) -> Rules:
    """Returns the rules of the expert that every token passes."""
    kinds = ("gate", "up", "down")
    return part({f"{module}.{kind}_proj": f"ffn_{kind}_shexp" for kind in kinds}, group=SPARSE)


def router(module: str, bias: str = "", *, group: str = SPARSE) -> Rules:
    """Returns the rules of the linear that chooses experts, which stays F32; `bias` corrects the choice."""
    rule = Rule(f"{module}.weight", ("ffn_gate_inp.weight",), group=group, rounded=False)
    return (rule, Rule(bias, ("exp_probs_b.bias",), group=group)) if bias else (rule,)


SIZES = {
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SCALES = {"expert_weights_norm": "norm_topk_prob", "expert_weights_scale": "routed_scaling_factor"}
"""How the weights of chosen experts are made."""


def _qwen3_objection(config: Config, facts: ModelFacts) -> str | None:
    if not config.get("norm_topk_prob"):
        return (
            "config.json has norm_topk_prob false; llama.cpp's qwen3moe always makes weights of experts add up to one"
        )
    if config.get("mlp_only_layers") or int(config.get("decoder_sparse_step") or 1) != 1:
        return "some layers have no experts (mlp_only_layers, decoder_sparse_step), which llama.cpp's qwen3moe lacks"
    return None


QWEN3_MOE = Family(
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    (
        *part({**ATTENTION, **QK_NORMS, anatomy.MLP_NORM: "ffn_norm"}),
        *router("mlp.gate", group=""),
        *routed("mlp.experts"),
    ),
    experts=True,
    pairs={"expert_count": "num_experts", **SIZES},
    keys=lambda config, facts: {"expert_count": int(config.get("num_experts") or config["num_local_experts"])},
    config=lambda header: {"norm_topk_prob": True},
    objection=_qwen3_objection,
)


def _gpt_oss_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    return {"expert_feed_forward_length": facts.intermediate, **window_keys(2)(config, facts)}


def _gpt_oss_config(header: Header) -> Config:
    return {
        "sliding_window": header.integer("attention.sliding_window"),
        "layer_types": layer_types(header, 2),
        "intermediate_size": header.integer("expert_feed_forward_length"),
        "attention_bias": True,
    }


def _gpt_oss_objection(config: Config, facts: ModelFacts) -> str | None:
    built_in = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    odd = [key for key, value in built_in.items() if config.get(key, value) != value]
    return (
        f"config.json has another {odd[0]} than {built_in[odd[0]]}, which llama.cpp takes for granted" if odd else None
    )


GPT_OSS = Family(
    "gpt-oss",
    "GptOssForCausalLM",
    "gpt_oss",
    (
        *part({**ATTENTION, anatomy.MLP_NORM: "post_attention_norm"}, (*QKV, anatomy.OUTPUT)),
        Rule("self_attn.sinks", ("attn_sinks.weight",)),
        Rule("mlp.router.weight", ("ffn_gate_inp.weight",), rounded=False),
        Rule("mlp.router.bias", ("ffn_gate_inp.bias",)),
        Rule("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), TRANSPOSED_ALTERNATE),
        Rule("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), ALTERNATE),
        Rule("mlp.experts.down_proj", ("ffn_down_exps.weight",), TRANSPOSED),
        Rule("mlp.experts.down_proj_bias", ("ffn_down_exps.bias",)),
        *routed("mlp.experts"),
        *(
            Rule(f"mlp.experts.{EXPERT}.{kind}_proj.bias", (f"ffn_{kind}_exps.bias",), needed=False)
            for kind in ("gate", "up", "down")
        ),
    ),
    windows=True,
    experts=True,
    scalings=("yarn",),
    yarn={"truncate": ""},
    pairs={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    keys=_gpt_oss_keys,
    config=_gpt_oss_config,
    objection=_gpt_oss_objection,
)


def _one_group(config: Config, facts: ModelFacts) -> str | None:
    if int(config.get("n_group") or 1) != 1:
        return "experts are chosen by groups (n_group), which llama.cpp does not do for this architecture"
    return None


def _glm4_config(header: Header) -> Config:
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.tensors,
        "n_group": 1,
        "topk_group": 1,
    }


GLM4_MOE = Family(
    "glm4moe",
    "Glm4MoeForCausalLM",
    "glm4_moe",
    (
        *part({**ATTENTION, anatomy.MLP_NORM: "post_attention_norm"}, QKV),
        *part(QK_NORMS, group="norms"),
        *part(MLP, group=DENSE),
        *router("mlp.gate", "mlp.gate.e_score_correction_bias"),
        *routed("mlp.experts"),
        *shared("mlp.shared_experts"),
    ),
    experts=True,
    partial=True,
    scalings=(),
    pairs={
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
        **SIZES,
        **SCALES,
    },
    keys=lambda config, facts: {"expert_gating_func": SIGMOID},
    config=_glm4_config,
    objection=_one_group,
)

MINIMAX_M2 = Family(
    "minimax-m2",
    "MiniMaxM2ForCausalLM",
    "minimax_m2",
    (
        *part({**ATTENTION, **QK_NORMS, anatomy.MLP_NORM: "ffn_norm"}),
        *router("block_sparse_moe.gate", "block_sparse_moe.e_score_correction_bias", group=""),
        *routed("block_sparse_moe.experts", ("w1", "w3", "w2")),
    ),
    experts=True,
    head="own",
    partial=True,
    scalings=(),
    pairs={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    keys=lambda config, facts: {"expert_gating_func": SIGMOID, "expert_feed_forward_length": facts.intermediate},
)


def _llama4_step(config: Config, facts: ModelFacts) -> int:
    """Returns after how many layers one has experts; 0 if there is no such number."""
    step = int(config.get("interleave_moe_layer_step") or 1)
    found = list(config.get("moe_layers") or range(step - 1, facts.layers, step))
    steps = (step for step in range(1, facts.layers + 1) if list(range(step - 1, facts.layers, step)) == found)
    return next(steps, 0)


def _llama4_objection(config: Config, facts: ModelFacts) -> str | None:
    turned = list(config.get("no_rope_layers") or [int((n + 1) % 4 != 0) for n in range(facts.layers)])
    if turned != [int((n + 1) % 4 != 0) for n in range(facts.layers)]:
        return "config.json has other no_rope_layers than every fourth, which llama.cpp's llama4 takes for granted"
    if not _llama4_step(config, facts):
        return "layers with experts are not evenly spaced (moe_layers), which llama.cpp's llama4 wants"
    built_in = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True}
    odd = [key for key, value in built_in.items() if config.get(key, value) != value]
    if odd:
        return f"config.json has another {odd[0]} than {built_in[odd[0]]}, which llama.cpp takes for granted"
    if bool(config.get("use_qk_norm", True)) == (int(config["num_local_experts"]) == 128):
        return "llama.cpp's llama4 norms queries and keys unless there are 128 experts; config.json has it otherwise"
    return None


def _llama4_config(header: Header) -> Config:
    layers, step = header.size("block_count"), header.size("interleave_moe_layer_step")
    return {
        "intermediate_size": header.size("expert_feed_forward_length"),
        "intermediate_size_mlp": header.size("feed_forward_length"),
        "moe_layers": list(range(step - 1, layers, step)),
        "no_rope_layers": [int((n + 1) % 4 != 0) for n in range(layers)],
        "use_qk_norm": header.integer("expert_count") != 128,
    }


LLAMA4 = Family(
    "llama4",
    "Llama4ForCausalLM",
    "llama4_text",
    (
        *part({**ATTENTION, anatomy.MLP_NORM: "ffn_norm"}),
        *part({f"feed_forward.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}, group=DENSE),
        *router("feed_forward.router"),
        Rule(
            "feed_forward.experts.gate_up_proj",
            ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            TRANSPOSED_HALVES,
            group=SPARSE,
        ),
        Rule("feed_forward.experts.down_proj", ("ffn_down_exps.weight",), TRANSPOSED, group=SPARSE),
        *routed("feed_forward.experts"),
        *shared("feed_forward.shared_expert"),
    ),
    experts=True,
    windows=True,
    scalings=("llama3",),
    pairs={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    keys=lambda config, facts: {
        "interleave_moe_layer_step": _llama4_step(config, facts),
        "expert_feed_forward_length": facts.intermediate,
        "feed_forward_length": int(config["intermediate_size_mlp"]),
    },
    config=_llama4_config,
    objection=_llama4_objection,
)
FAMILIES = {
    "Llama4ForCausalLM": LLAMA4,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "MiniMaxM2ForCausalLM": MINIMAX_M2,
}
"""Families by the name in config.json's `architectures`."""
