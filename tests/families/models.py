"""Small random models of transformers' own classes, one of each family, with sizes that every config class may have."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.conftest import byte_level, write_tokenizer

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "n_inner", "ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "o_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "o_groups", "index_n_heads", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "d_kv"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "mamba_head_dim", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "index_topk"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_expand", "expand", "linear_num_key_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "mamba_d_ssm"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    "rotary_dim": 8,
    "q_lora_rank": 24,
    "linear_num_value_heads": 4,
    "shared_intermediate_size": 32,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "block_auto_adjust_ff_dim": False,
}
"""Sizes by the names of settings. A family takes those that it has."""
LATENT = {"head_dim": None, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"enable_moe_block": False, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "hybrid_override_pattern": None},
    "phi3": {"original_max_position_embeddings": 128},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "adapter_rank": 4,
        "use_shared_attention_adapter": False,
    },
}
"""Settings of families that need others; None leaves a setting out."""


LARGEST = 60_000_000
"""Number of weights of a model that is still tried."""
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    LATENT,
    {"head_dim": 8, "num_key_value_heads": 4},
    {"num_key_value_heads": 4},
)
"""Settings that are tried, one after the other, until a model runs."""
PICTURES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "d_model", "vision_output_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "projection_dim"), 32),
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    **dict.fromkeys(("head_dim", "num_position_embeddings"), 16),
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_global_layers": 1,
}
"""Sizes of what sees or hears, by the names of settings."""


def config_of(family: str, vocab: int, variant: dict[str, Any] | None = None) -> Any:
    """Returns the config of a small model of a type of transformers."""
    from transformers import CONFIG_MAPPING

    config = _small(CONFIG_MAPPING[family], vocab, variant or {})
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = vocab
    return config


def _small(kind: Any, vocab: int, variant: dict[str, Any]) -> Any:
    """Returns a small config of a class, and of the configs within it."""
    default = kind()
    parts = {name: getattr(default, name, None) for name in getattr(kind, "sub_configs", {})}
    known = {*default.to_dict(), *getattr(kind, "attribute_map", {})}
    sees = not parts and "vocab_size" not in known
    sizes = {name: value for name, value in {**SIZES, "vocab_size": vocab}.items() if name in known}
    if sees:
        sizes = {name: value for name, value in PICTURES.items() if name in known}
    sizes |= {
        name: 2
        for name, value in default.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocab
    }
    if not sees:
        sizes |= {**variant, **OWN.get(kind.model_type, {})}
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        sizes["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    for name, part in parts.items():
        if hasattr(part, "to_dict"):
            small = _small(type(part), vocab, variant).to_dict()
            sizes[name] = {**small, "model_type": part.model_type} if getattr(part, "model_type", "") else small
    return kind(**sizes)


_made: dict[tuple[str, torch.dtype, str], tempfile.TemporaryDirectory[str]] = {}


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Copies what `write` makes into a directory. It is made once in a process."""
    key = family, dtype, repr(OWN)
    if key not in _made:
        made = tempfile.TemporaryDirectory(prefix=f"{family}-")
        write(family, Path(made.name), dtype)
        _made[key] = made
    torch.manual_seed(1)
    shutil.copytree(_made[key].name, folder, dirs_exist_ok=True)
    return folder


def write(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a small random model of a family, and its tokenizer, into a directory."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    vocab = write_tokenizer(folder, byte_level("gpt-2")) + 3
    kind = AutoModelForCausalLM if family in CAUSAL else AutoModelForImageTextToText
    first: Exception | None = None
    for variant in VARIANTS:
        torch.manual_seed(1)
        try:
            config = config_of(family, vocab, variant)
            with torch.device("meta"):
                size = sum(each.numel() for each in kind.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} million weights: the class takes no notice of small sizes")
            model: Any = kind.from_config(config).float().eval()
            _randomise(model)
            with torch.no_grad():
                model(input_ids=torch.arange(5, 37)[None], use_cache=False)
            break
        except Exception as error:  # whatever a class says of sizes that do not fit
            first = first or error
    else:
        assert first
        raise first
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: Any) -> None:
    numbers = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = 0.6 / max(parameter.shape[-1], 1) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * spread)
        elif not name.endswith(("A_log", "dt_bias")):
            middle = 1.0 if float(parameter.float().mean()) > 0.5 else 0.0
            parameter.copy_(middle + 0.1 * torch.randn(parameter.shape, generator=numbers))
