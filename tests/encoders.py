"""Tiny encoders with a tokenizer that pads and hides, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from tests.conftest import byte_level, write_tokenizer

SIZES = {
    "vocab_size": 1010,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny_encoder(folder: Path, kind: Any, **changes: Any) -> Path:
    """Writes a random model of a class of BERT's; returns the directory."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, byte_level("gpt-2"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<|endoftext|>", "mask_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = kind(BertConfig(**{**SIZES, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
