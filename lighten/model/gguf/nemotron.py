"""Nemotron-H: every layer is one thing, a Mamba 2 state, attention, an MLP, or experts, without rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model.gguf.experts import SCALES, SIZES, SPARSE, router
from lighten.model.gguf.family import EXPERT, Config, Family, Rule, part
from lighten.model.gguf.hybrids import ATTENDS, attending
from lighten.model.gguf.states import mamba

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

KINDS = {"attention": "attention", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}
"""Kinds of layers by their names in a config. All others have a state."""
AROUND = (
    Rule("backbone.embeddings.weight", ("token_embd.weight",)),
    Rule("backbone.norm_f.weight", ("output_norm.weight",)),
    Rule("lm_head.weight", ("output.weight",), needed=False),
)
COMMON = (
    *part({"norm": "attn_norm"}),
    *mamba("mixer", "n_groups"),
    *part(
        {
            "mixer.q_proj": "attn_q",
            "mixer.k_proj": "attn_k",
            "mixer.v_proj": "attn_v",
            "mixer.o_proj": "attn_output",
        },
        group=ATTENDS,
    ),
)
MLP = part({"mixer.up_proj": "ffn_up", "mixer.down_proj": "ffn_down"}, group="mlp")
SPARSE_LAYER = (
    *router("mixer.gate", "mixer.gate.e_score_correction_bias"),
    *(
        Rule(f"mixer.experts.{EXPERT}.{kind}_proj.weight", (f"ffn_{kind}_exps.weight",), group=SPARSE)
        for kind in ("up", "down")
    ),
    Rule("mixer.fc1_latent_proj.weight", ("ffn_latent_down.weight",), needed=False),
    Rule("mixer.fc2_latent_proj.weight", ("ffn_latent_up.weight",), needed=False),
    *part({f"mixer.shared_experts.{kind}_proj": f"ffn_{kind}_shexp" for kind in ("up", "down")}, group=SPARSE),
)
_LETTERS = {"*": "attention", "E": "moe", "-": "mlp"}


def _kinds(config: Config) -> list[str]:
    if found := config.get("layers_block_type"):
        return [KINDS.get(kind, "state") for kind in found]
    return [_LETTERS.get(letter, "state") for letter in config["hybrid_override_pattern"]]


def _keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    kinds = _kinds(config)
    width = {"moe": int(config.get("moe_intermediate_size") or 0), "mlp": facts.intermediate}
    epsilon = float(config.get("layer_norm_epsilon") or 1e-5)
    return {
        "attention.head_count_kv": [facts.kv_heads if kind == "attention" else 0 for kind in kinds],
        "feed_forward_length": [width.get(kind, 0) for kind in kinds],
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "ssm.inner_size": int(config["mamba_num_heads"]) * int(config["mamba_head_dim"]),
    }


def _config(header: Header) -> Config:
    widths = header.fields.get(f"{header.arch}.feed_forward_length")
    inner = "moe" if header.arch.endswith("moe") else "mlp"
    wide = widths if isinstance(widths, list) else [0] * header.size("block_count")
    kinds = [
        "attention" if attends else inner if each else "mamba"
        for attends, each in zip(attending(header), wide, strict=True)
    ]
    return {
        "layers_block_type": kinds,
        "num_hidden_layers": None,
        "hidden_act": None,
        "mlp_hidden_act": "relu2",
        "rms_norm_eps": None,
        "layer_norm_epsilon": header.decimal("attention.layer_norm_rms_epsilon"),
        "mamba_head_dim": header.size("ssm.inner_size") // header.size("ssm.time_step_rank"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in header.tensors),
        "rope_parameters": None,
    }


def _objection(config: Config, facts: ModelFacts) -> str | None:
    kinds = set(_kinds(config))
    if {"moe", "mlp"} <= kinds:
        return "some layers have experts and others an MLP, which llama.cpp's nemotron_h does not mix"
    if int(config.get("n_group") or 1) > 1 and "moe" in kinds:
        return "experts are chosen by groups (n_group), which lighten does not write for this architecture"
    if (config.get("mlp_hidden_act") or "relu2") != "relu2":
        return "llama.cpp's nemotron_h computes relu2"
    return None


_PAIRS = {
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
}


def _sparse(config: Config) -> bool:
    return "moe" in _kinds(config)


def _family(arch: str, layer: Any, **more: Any) -> Family:
    return Family(
        arch,
        "NemotronHForCausalLM",
        "nemotron_h",
        layer,
        AROUND,
        "backbone.layers.",
        left_out=r"mtp\..*",
        activation="relu2",
        windows=True,
        scalings=(),
        varied=True,
        keys=_keys,
        config=_config,
        objection=_objection,
        **more,
    )


FAMILIES = {
    "NemotronHForCausalLM": _family(
        "nemotron_h_moe",
        (*COMMON, *SPARSE_LAYER),
        experts=True,
        when=_sparse,
        other=_family("nemotron_h", (*COMMON, *MLP), pairs=_PAIRS),
        pairs={
            **_PAIRS,
            "expert_count": "n_routed_experts",
            **SIZES,
            "expert_shared_count": "n_shared_experts",
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "moe_latent_size": "moe_latent_size",
            **SCALES,
        },
    )
}
"""Families by the name in config.json's `architectures`."""
