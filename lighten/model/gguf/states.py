"""Hybrids with states: Mamba 2 layers (Granite 4, Nemotron-H), and the gated delta rule (Qwen 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.dense import ATTENTION, MLP, MULTIPLIERS, QK_NORMS, ROWS
from lighten.model.gguf.experts import SIZES, routed, router, shared
from lighten.model.gguf.family import AROUND, Config, Family, Rule, Rules, less_one, part
from lighten.model.gguf.hybrids import ATTENDS, attending, kv_heads
from lighten.model.gguf.turns import (
    COLUMN,
    DEPTHWISE,
    NEGATIVE_EXP,
    NEGATIVE_EXP_COLUMN,
    Model,
    Turn,
    after,
    halves,
    single,
)

if TYPE_CHECKING:
    import torch

    from lighten.model.gguf_header import Header

STATE = "state"
"""Group of a layer's tensors."""


def _grouped(groups: str) -> Turn:
    """Returns the turn of a norm over groups of channels; `groups` is the setting with their number."""
    return single(
        lambda tensor, model: tensor.reshape(model.size(groups), -1), lambda tensor, model: tensor.reshape(-1)
    )


def mamba(module: str, groups: str) -> Rules:
    """Returns the rules of a Mamba 2 layer."""
    return (
        *part({f"{module}.in_proj": "ssm_in"}, group=STATE),
        Rule(f"{module}.conv1d.weight", ("ssm_conv1d.weight",), DEPTHWISE, group=STATE, rounded=False),
        Rule(f"{module}.conv1d.bias", ("ssm_conv1d.bias",), needed=False),
        Rule(f"{module}.dt_bias", ("ssm_dt.bias",), group=STATE),
        Rule(f"{module}.A_log", ("ssm_a",), NEGATIVE_EXP_COLUMN, group=STATE, rounded=False),
        Rule(f"{module}.D", ("ssm_d",), COLUMN, group=STATE, rounded=False),
        Rule(f"{module}.norm.weight", ("ssm_norm.weight",), _grouped(groups), group=STATE, rounded=False),
        *part({f"{module}.out_proj": "ssm_out"}, group=STATE),
    )


def _has_experts(config: Config) -> bool:
    return bool(config.get("num_local_experts"))


def _has_none(config: Config) -> bool:
    return not _has_experts(config)


GRANITE_LAYER = (
    *part({anatomy.ATTENTION_NORM: "attn_norm"}),
    *part({name: ATTENTION[name] for name in (*anatomy.LINEARS[:4],)}, turns=ROWS, group=ATTENDS),
    *mamba("mamba", "mamba_n_groups"),
    *part({anatomy.MLP_NORM: "ffn_norm"}),
    Rule("block_sparse_moe.router.layer.weight", ("ffn_gate_inp.weight",), rounded=False, when=_has_experts),
    Rule(
        "block_sparse_moe.input_linear.weight",
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        halves(),
        when=_has_experts,
    ),
    Rule("block_sparse_moe.output_linear.weight", ("ffn_down_exps.weight",), when=_has_experts),
    *(replace(rule, when=_has_experts) for rule in routed("block_sparse_moe.experts")),
    Rule(
        "shared_mlp.input_linear.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), halves(), when=_has_experts
    ),
    Rule("shared_mlp.output_linear.weight", ("ffn_down_shexp.weight",), when=_has_experts),
    Rule("shared_mlp.input_linear.weight", ("ffn_gate.weight", "ffn_up.weight"), halves(), when=_has_none),
    Rule("shared_mlp.output_linear.weight", ("ffn_down.weight",), when=_has_none),
)
_ATTENTION_KINDS = ("attention", "full_attention")


def _granite_attends(config: Config, facts: ModelFacts) -> list[bool]:
    return [kind in _ATTENTION_KINDS for kind in config.get("layer_types") or config["layers_block_type"]]


def _granite_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    wide = int(config.get("shared_intermediate_size") or 0)
    experts = _has_experts(config)
    return {
        "attention.head_count_kv": kv_heads(config, facts, _granite_attends(config, facts)),
        "feed_forward_length": facts.intermediate if experts else wide,
        "expert_shared_feed_forward_length": wide if experts else None,
        "expert_used_count": int(config["num_experts_per_tok"]) if experts else None,
        "expert_count": int(config["num_local_experts"]) if experts else None,
        "ssm.inner_size": int(config.get("mamba_expand") or 2) * facts.hidden,
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
    }


def _granite_config(header: Header) -> Config:
    experts = header.integer("expert_count", 0)
    shared_width = "expert_shared_feed_forward_length" if experts else "feed_forward_length"
    inner, heads = header.size("ssm.inner_size"), header.size("ssm.time_step_rank")
    rotated = header.fields.get(f"{header.arch}.rope.scaling.finetuned", True)
    return {
        "layer_types": ["attention" if each else "mamba" for each in attending(header)],
        "shared_intermediate_size": header.size(shared_width),
        "num_local_experts": experts,
        "num_experts_per_tok": header.integer("expert_used_count", 0),
        "mamba_expand": inner // header.size("embedding_length"),
        "mamba_d_head": inner // heads,
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in header.tensors),
        "position_embedding_type": "rope" if rotated else "nope",
        "head_dim": None,
    }


def _granite_objection(config: Config, facts: ModelFacts) -> str | None:
    attends = _granite_attends(config, facts)
    if all(attends):
        return "no layer has a state, and llama.cpp's granitehybrid wants some"
    if int(config.get("mamba_expand") or 2) != 2:
        return "mamba_expand is not 2, which llama.cpp's granitehybrid takes for granted"
    odd = [key for key in ("mamba_proj_bias", "attention_bias") if config.get(key)]
    return f"config.json has {odd[0]}, which lighten does not write for this architecture" if odd else None


def _delta(model: Model) -> tuple[int, int, int, int]:
    """Returns the heads of keys and of values, and their widths."""
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    key_heads, value_heads, key_width, value_width = (model.size(name) for name in names)
    return key_heads, value_heads, key_width, value_width


def _reordered(tensor: torch.Tensor, axis: int, outer: int, inner: int) -> torch.Tensor:
    axis %= tensor.dim()
    shape = tensor.shape
    parts = tensor.reshape(*shape[:axis], outer, inner, -1, *shape[axis + 1 :])
    return parts.transpose(axis, axis + 1).reshape(shape)


def _value_heads(axis: int, *, keys_first: bool = False) -> Turn:
    """Returns the turn that puts heads of values in llama.cpp's order.

    The stored heads lie together by their head of keys. llama.cpp repeats the heads of keys as a whole, so that the
    first of every group come first. `keys_first`: queries and keys lie before the values, and stay.
    """

    def move(tensor: torch.Tensor, model: Model, *, back: bool) -> torch.Tensor:
        import torch

        key_heads, value_heads, key_width, _ = _delta(model)
        sizes = (key_heads, value_heads // key_heads)
        outer, inner = reversed(sizes) if back else sizes
        if not keys_first:
            return _reordered(tensor, axis, outer, inner)
        before = 2 * key_heads * key_width
        kept, values = tensor[:before], tensor[before:]
        return torch.cat([kept, _reordered(values, axis, outer, inner)])

    def channels(values: torch.Tensor, model: Model) -> list[torch.Tensor | None] | None:
        return [move(values[None], model, back=False)[0]] if axis == 1 else None

    return Turn(
        lambda tensor, model: [move(tensor, model, back=False)],
        lambda tensors, model: move(tensors[0], model, back=True),
        channels=channels,
    )


_HEADS = _value_heads(0)
DELTA = (
    *part(
        {"linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate"},
        turns={"linear_attn.in_proj_qkv": _value_heads(0, keys_first=True), "linear_attn.in_proj_z": _HEADS},
        group=STATE,
    ),
    *part(
        {"linear_attn.in_proj_b": "ssm_beta", "linear_attn.in_proj_a": "ssm_alpha"},
        turns=dict.fromkeys(("linear_attn.in_proj_b", "linear_attn.in_proj_a"), _HEADS),
        group=STATE,
    ),
    Rule(
        "linear_attn.conv1d.weight",
        ("ssm_conv1d.weight",),
        after(DEPTHWISE, _value_heads(0, keys_first=True)),
        group=STATE,
        rounded=False,
    ),
    Rule("linear_attn.dt_bias", ("ssm_dt.bias",), _HEADS, group=STATE),
    Rule("linear_attn.A_log", ("ssm_a",), after(NEGATIVE_EXP, _HEADS), group=STATE),
    Rule("linear_attn.norm.weight", ("ssm_norm.weight",), group=STATE),
    *part({"linear_attn.out_proj": "ssm_out"}, turns={"linear_attn.out_proj": _value_heads(1)}, group=STATE),
)
QWEN35 = (
    *part({anatomy.ATTENTION_NORM: "attn_norm"}),
    *part({**{name: ATTENTION[name] for name in anatomy.LINEARS[:4]}, **QK_NORMS}, group=ATTENDS),
    *DELTA,
    *part({anatomy.MLP_NORM: "post_attention_norm"}),
)
_SHARED_GATE = single(lambda tensor, _: tensor[0], lambda tensor, _: tensor[None])


def _qwen35_layers(config: Config, facts: ModelFacts) -> list[bool]:
    if kinds := config.get("layer_types"):
        return [kind == "linear_attention" for kind in kinds]
    interval = int(config.get("full_attention_interval") or 4)
    return [bool((layer + 1) % interval) for layer in range(facts.layers)]


def _interval(recurrent: Sequence[bool]) -> int | None:
    """Returns after how many layers one has attention; None if there is no such number."""
    for interval in range(1, len(recurrent) + 1):
        if [bool((layer + 1) % interval) for layer in range(len(recurrent))] == list(recurrent):
            return interval
    return None


def _qwen35_keys(config: Config, facts: ModelFacts) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    part_rotated = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    pairs = int(facts.head_dim * part_rotated) // 2
    # time, height and width take turns; a pair of none of them would not turn at all
    usual = [-(-max(pairs - first, 0) // 3) for first in range(3)]
    said = rope.get("mrope_section")
    sections = said if said and sum(said) == pairs else usual
    return {
        "ssm.inner_size": int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"]),
        "full_attention_interval": _interval(_qwen35_layers(config, facts)),
        "rope.dimension_sections": [*(int(each) for each in sections), 0, 0, 0][:4],
    }


def _qwen35_config(header: Header) -> Config:
    heads, interval = header.size("ssm.time_step_rank"), header.size("full_attention_interval", 4)
    layers = header.size("block_count")
    return {
        "linear_value_head_dim": header.size("ssm.inner_size") // heads,
        "layer_types": ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(layers)],
    }


def _qwen35_objection(config: Config, facts: ModelFacts) -> str | None:
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        return "heads of keys and values of linear attention have different widths, which llama.cpp lacks"
    if _interval(_qwen35_layers(config, facts)) is None:
        return "layers with attention are not evenly spaced (layer_types), which llama.cpp's qwen35 wants"
    return None


def _qwen35(arch: str, architecture: str, model_type: str, mlp: Rules, **more: Any) -> Family:
    pairs = {
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
        **more.pop("pairs", {}),
    }
    return Family(
        arch,
        architecture,
        model_type,
        (*less_one(QWEN35, "linear_attn.norm"), *mlp),
        less_one(AROUND),
        left_out=r"(model\.)?mtp\..*",
        partial=True,
        scalings=(),
        defaults={"head_dim": 256, "partial_rotary_factor": 0.25},
        pairs=pairs,
        keys=_qwen35_keys,
        config=_qwen35_config,
        objection=_qwen35_objection,
        varied=True,
        **more,
    )


_GRANITE_PAIRS = {
    **MULTIPLIERS,
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
FAMILIES = {
    "GraniteMoeHybridForCausalLM": Family(
        "granitehybrid",
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        GRANITE_LAYER,
        scalings=(),
        varied=True,
        experts=True,
        defaults=dict.fromkeys(MULTIPLIERS.values(), 1.0),
        pairs=_GRANITE_PAIRS,
        keys=_granite_keys,
        config=_granite_config,
        objection=_granite_objection,
    ),
    "Qwen3_5ForCausalLM": _qwen35("qwen35", "Qwen3_5ForCausalLM", "qwen3_5_text", part(MLP)),
    "Qwen3_5MoeForCausalLM": _qwen35(
        "qwen35moe",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        (
            *router("mlp.gate", group=""),
            *routed("mlp.experts"),
            *shared("mlp.shared_expert"),
            Rule("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), _SHARED_GATE),
        ),
        experts=True,
        pairs={
            "expert_count": "num_experts",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            **SIZES,
        },
    ),
}
"""Families by the name in config.json's `architectures`."""
