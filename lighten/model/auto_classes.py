"""What a model is for, by the tables of transformers' auto classes.

The tables are read in transformers' source. Importing them loads torch, for which a plan need not wait.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lighten.facts import Task

TABLES: dict[Task, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "embedding": "MODEL_MAPPING_NAMES",
}
"""Table of each task in `transformers.models.auto.modeling_auto`: the name of the class by `model_type`."""
AUTO: dict[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embedding": "AutoModel",
    "other": "AutoModel",
}
"""Auto class of each task. Heads of other kinds are left out."""
_ROW = re.compile(r'\(\s*"([^"]+)",\s*(?:"([^"]+)"|\(([^)]*)\))', re.DOTALL)


@cache
def table(task: Task) -> dict[str, tuple[str, ...]]:
    """Returns the names of a task's classes, by `model_type`; empty for "other"."""
    if task not in TABLES:
        return {}
    found = re.search(rf"^{TABLES[task]} = OrderedDict\(\n(.*?)^\)", _source(), re.DOTALL | re.MULTILINE)
    if found is None:
        from transformers.models.auto import modeling_auto

        known = getattr(modeling_auto, TABLES[task]).items()
        return {name: (value,) if isinstance(value, str) else tuple(value) for name, value in known}
    rows = _ROW.findall(found[1])
    return {name: (one,) if one else tuple(re.findall('"([^"]+)"', several)) for name, one, several in rows}


@cache
def _source() -> str:
    spec = find_spec("transformers")
    assert spec and spec.origin
    return (Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")


def is_encoder(model_type: str) -> bool:
    """Returns whether models of a type read a whole text at once: they have a class that fills gaps."""
    return model_type in table("masked") and model_type not in table("seq2seq")


def inputs_of(model: Any, ids: Any, targets: Any = None) -> dict[str, Any]:
    """Returns what a model of transformers takes to read tokens `[samples, length]`, without a cache.

    A sequence-to-sequence model writes `targets`, by default the same tokens.
    """
    names = ("model_type", "architectures", "is_encoder_decoder", "is_decoder")
    task = task_of({name: getattr(model.config, name, None) for name in names})
    if task == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids if targets is None else targets, "use_cache": False}
    return {"input_ids": ids, "use_cache": False} if task == "causal" else {"input_ids": ids}


def class_for(config: Any) -> Any:
    """Returns the auto class of transformers that opens a model: that of its task, or of other inputs beside text.

    `config` is an object of transformers.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    names = ("model_type", "architectures", "is_encoder_decoder", "is_decoder")
    task = task_of({name: getattr(config, name, None) for name in names})
    if task != "causal":
        return getattr(transformers, AUTO[task])
    plain = type(config) in AutoModelForCausalLM._model_mapping
    other = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if other and not plain else AutoModelForCausalLM


def task_of(config: dict[str, Any]) -> Task:
    """Returns what the model that a config.json describes is for.

    The class that it names decides. A class without a head is what its type is for: an encoder gives embeddings.
    """
    model_type = str(config.get("model_type"))
    named = str((config.get("architectures") or [""])[0])
    if config.get("is_encoder_decoder") or (
        named in table("seq2seq").get(model_type, ()) and named not in table("causal").get(model_type, ())
    ):
        return "seq2seq"
    if config.get("is_decoder") or named.endswith(("ForCausalLM", "LMHeadModel")) or not is_encoder(model_type):
        return "causal"
    if named in table("masked")[model_type]:
        return "masked"
    return "embedding" if named in table("embedding").get(model_type, ()) else "other"
