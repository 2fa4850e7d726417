"""Names of the parts of a model, held to transformers' own modules, and written in one place."""

import ast
import re
from pathlib import Path

import pytest
import torch

import lighten
from lighten.model import anatomy
from lighten.model.checkpoint import facts_of
from tests.conftest import FAMILIES, SIZES

NAMED = re.compile(
    r"^(model\.(layers|embed_tokens|norm)\b.*|lm_head(\.\w+)?|self_attn|(self_attn|mlp)\.\w+"
    r"|[qkvo]_proj|(gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.?$"
)
OTHERS = {
    "model/gguf/dense.py": "linears that only other families have",
    "model/gguf/experts.py": "linears that only other families have",
    "model/gguf/hybrids.py": "linears that only other families have",
    "model/gguf/gemma4.py": "linears that only other families have",
    "model/gguf/latent.py": "linears that only other families have",
    "model/gguf/nemotron.py": "linears that only other families have",
    "model/gguf/states.py": "linears that only other families have",
    "model/gguf/towers.py": "heads of models that also see",
    "model/gguf/gemma.py": "linears that only other families have",
    "model/experts.py": "matrices of experts",
    "export/onnx/graph.py": "names in the builder's graphs",
    "evaluate/profiling/onnx.py": "names in the builder's graphs",
    "evaluate/runtimes/trace.py": "modules of layers of any family",
    "compress/quantize/configs.py": "a key of GPTQ's settings",
}
"""Files that name parts too, and why."""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_names_are_those_of_the_modules(family: str) -> None:
    config_class, model_class, settings = FAMILIES[family]
    config = config_class(**{**SIZES, **settings, "intermediate_size": 384, "vocab_size": 300})
    with torch.device("meta"):
        model = model_class(config)
    facts = facts_of(config.to_dict() | {"architectures": [model_class.__name__]}, "here")
    weights = {name.removesuffix(".weight"): value for name, value in model.named_parameters() if "weight" in name}
    assert sorted(anatomy.modules(facts.layers)) == sorted(weights)
    for name, weight in weights.items():
        assert anatomy.shape(name, facts) == (tuple(weight.shape) if weight.dim() == 2 else None), name
        found = anatomy.placed(name)
        assert (found is None) == ("layers" not in name)
        assert found is None or anatomy.layer(found[0]) + found[1] == name
    layer = model.model.layers[1]
    assert {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)} == {*anatomy.LINEARS}


def test_what_is_no_layer_is_placed_nowhere() -> None:
    for name in ("model.layers", "model.layers.", "model.layers.x.y", "model.norm.weight", "lm_head.weight", ""):
        assert anatomy.placed(name) is None


def test_one_file_writes_the_names() -> None:
    root = Path(lighten.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        if any(isinstance(text, str) and NAMED.match(text) for text in texts):
            found.add(str(path.relative_to(root)))
    assert found == {"model/anatomy.py", *OTHERS}
