"""One recipe for twelve families: `make recipe-families`. Every row has to be ok, where formats hold the family.

The models are small and random, with sizes that the blocks of 256 of Q4_K divide.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.command import process
from tests.families import models

FAMILIES = (
    *("qwen3", "qwen3_moe", "qwen3_5_text", "gemma3_text", "gemma4_text", "gpt_oss"),
    *("phi3", "lfm2", "granitemoehybrid", "deepseek_v3", "llama4_text", "glm4_moe"),
)
WIDE = {
    **dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_intermediate_size"), 256),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size"), 512),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "kv_lora_rank"), 64),
    **dict.fromkeys(("mamba_d_head", "linear_key_head_dim", "linear_value_head_dim"), 64),
    "norm_topk_prob": True,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 32),
    "q_lora_rank": 256,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}
ONLY_EXPERTS = ("qwen3_moe", "gpt_oss")
"""Families without channels that a config can say less of: whole experts go instead."""
RECIPE: dict[str, Any] = {
    "name": "family",
    "calibration": {"data": "builtin", "samples": 8, "length": 128},
    "variants": {
        "gptq": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}],
        "awq": [{"quantize": {"method": "awq", "group_size": 32}}],
        "q4_k_m": [{"export": {"format": "gguf", "type": "Q4_K_M", "imatrix": True}}],
        "pruned": [{"prune": {"what": "mlp", "ratio": 0.25}}],
    },
    "evaluate": {"perplexity": {"data": "builtin", "length": 64, "samples": 4}},
}


def tried(family: str, folder: Path) -> dict[str, str]:
    """Returns the verdict on every row of the recipe's results, by its name."""
    (model := folder / "model").mkdir()
    sizes = dict(models.SIZES)
    models.SIZES.update(WIDE)
    models.OWN["llama4_text"]["attention_chunk_size"] = 8192  # llama.cpp takes it for granted
    try:
        models.write(family, model, torch.bfloat16)
    finally:
        models.SIZES.update(sizes)
    recipe: dict[str, Any] = {**RECIPE, "model": str(model)}
    if family in ONLY_EXPERTS:
        recipe["variants"] = {**RECIPE["variants"], "pruned": [{"prune": {"what": "experts", "ratio": 0.25}}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = process("run", folder / "recipe.yaml", "--json", cwd=folder)
    try:
        rows = json.loads(done.stdout)["variants"]
    except (ValueError, KeyError):
        return {"run": (done.stderr or done.stdout).strip()[-300:]}
    found = {}
    for row in rows:
        figure = (row.get("perplexity") or {}).get("value")
        found[row["name"]] = f"ok {figure:.1f}" if row["status"] == "ok" and figure else str(row.get("error"))[:200]
    return found


def main() -> None:
    """Tries the families that are named, or all."""
    bad = 0
    for family in sys.argv[1:] or FAMILIES:
        folder, start = Path(tempfile.mkdtemp(prefix="family-")), time.monotonic()
        try:
            rows = tried(family, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        bad += not all(each.startswith("ok") for each in rows.values())
        told = "; ".join(f"{name}: {verdict}" for name, verdict in rows.items())
        print(f"{family:18} {time.monotonic() - start:5.0f} s  {told}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
