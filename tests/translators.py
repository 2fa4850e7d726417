"""A tiny translation model, for tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from lighten.model.translator import FILES, FOLDER


def tiny_translator(folder: Path, **changes: Any) -> Path:
    """Writes a random Marian model with the tokenizer of the demo model; returns the directory."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = AutoConfig.from_pretrained(FOLDER, **{**sizes, "init_std": 0.3, **changes})
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    for name in FILES[1:]:
        shutil.copyfile(FOLDER / name, folder / name)
    read = json.loads((folder / "config.json").read_text())
    assert read["encoder_layers"] == config.encoder_layers
    return folder
