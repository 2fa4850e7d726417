"""The places of the parts of a decoder-only language model: names of layers and linears, and what feeds each.

Only this file knows these names. They are those of Llama, which Mistral and Qwen2 share. The names of the same parts in
other formats stand with the formats (`export/gguf/families.py`, `export/onnx/`).
"""

from __future__ import annotations

from lighten.facts import ModelFacts

BODY = "model."
"""Beginning of the names if the head is saved beside the body."""
LAYERS = f"{BODY}layers."
"""Beginning of the names of a layer's weights, before the layer's number."""
EMBEDDING, NORM, HEAD = f"{BODY}embed_tokens", f"{BODY}norm", "lm_head"
"""The modules around the layers."""
EMBEDDING_WEIGHT, NORM_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{NORM}.weight", f"{HEAD}.weight"
ATTENTION, MLP = "self_attn", "mlp"
"""The two halves of a layer."""
QUERY, KEY, VALUE, OUTPUT = (f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
GATE, UP, DOWN = (f"{MLP}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
LINEARS = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)
"""Linears of a layer, by their names in it."""
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
HEADS = (HEAD, "embed_out")
"""Names of heads, in these models and in others that are only measured."""
EMBEDDINGS = tuple(f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "word_embeddings"))
"""Endings of the names of embeddings, in these models and in others that are only measured."""


def layer(index: int) -> str:
    """Returns the beginning of the names of the weights of a layer."""
    return f"{LAYERS}{index}."


def placed(name: str) -> tuple[int, str] | None:
    """Returns the layer of a weight or module, and its name in the layer; None outside of layers."""
    number, dot, rest = name.removeprefix(LAYERS).partition(".")
    return (int(number), rest) if dot and name.startswith(LAYERS) and number.isdecimal() else None


def short(linear: str) -> str:
    """Returns the last part of a module's name: "q_proj" of "self_attn.q_proj"."""
    return linear.rpartition(".")[2]


def modules(layers: int) -> list[str]:
    """Returns the modules that have weights, in the order of the computation."""
    inside = [ATTENTION_NORM, QUERY, KEY, VALUE, OUTPUT, MLP_NORM, GATE, UP, DOWN]
    return [EMBEDDING, *(layer(index) + name for index in range(layers) for name in inside), NORM, HEAD]


def shape(module: str, facts: ModelFacts) -> tuple[int, int] | None:
    """Returns `[out, in]` of a module by its full name; None for a norm."""
    wide, narrow = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    sizes = {
        QUERY: (wide, facts.hidden),
        KEY: (narrow, facts.hidden),
        VALUE: (narrow, facts.hidden),
        OUTPUT: (facts.hidden, wide),
        GATE: (facts.intermediate, facts.hidden),
        UP: (facts.intermediate, facts.hidden),
        DOWN: (facts.hidden, facts.intermediate),
        EMBEDDING: (facts.vocab, facts.hidden),
        HEAD: (facts.vocab, facts.hidden),
    }
    found = placed(module)
    return sizes.get(found[1] if found else module)


def rotated_heads(module: str, facts: ModelFacts) -> int | None:
    """Returns the heads of a linear whose outputs are rotated by their position; None for any other linear."""
    found = placed(module)
    return {QUERY: facts.heads, KEY: facts.kv_heads}.get(found[1] if found else module)
