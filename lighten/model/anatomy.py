"""Where the parts of a decoder-only language model lie: the names of its layers and linears, and what feeds each.

The one place that knows these names. They are those of Llama, which Mistral and Qwen2 share; what other formats call
the same parts is with the formats (`export/gguf/families.py`, `export/onnx/`).
"""

from __future__ import annotations

from lighten.facts import ModelFacts

BODY = "model."
"""What the names begin with where the head is saved beside the body."""
LAYERS = f"{BODY}layers."
"""What the names of a layer's weights begin with, before the layer's number."""
EMBEDDING, NORM, HEAD = f"{BODY}embed_tokens", f"{BODY}norm", "lm_head"
"""The modules around the layers."""
EMBEDDING_WEIGHT, NORM_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{NORM}.weight", f"{HEAD}.weight"
ATTENTION, MLP = "self_attn", "mlp"
"""The two halves of a layer."""
QUERY, KEY, VALUE, OUTPUT = (f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
GATE, UP, DOWN = (f"{MLP}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
LINEARS = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)
"""The linears of a layer, by their names in it."""
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
BEFORE = {QUERY: ATTENTION_NORM, OUTPUT: VALUE, GATE: MLP_NORM, DOWN: UP}
"""What makes the inputs of a linear (the first of those that read the same), and can take a scale per channel."""
HEADS = (HEAD, "embed_out")
"""What heads are called, in these models and in others that are only measured."""
EMBEDDINGS = tuple(f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "word_embeddings"))
"""How the names of embeddings end, in these models and in others that are only measured."""


def layer(index: int) -> str:
    """Returns what the names of the weights of a layer begin with."""
    return f"{LAYERS}{index}."


def placed(name: str) -> tuple[int, str] | None:
    """Returns the layer that a weight or module lies in, and its name there; None for what lies in none."""
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
    """Returns the heads of a linear whose outputs are turned by their position; None for any other."""
    found = placed(module)
    return {QUERY: facts.heads, KEY: facts.kv_heads}.get(found[1] if found else module)
