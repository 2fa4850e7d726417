"""The tokenizer of a model directory as OpenVINO graphs, which openvino-genai runs before and after the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.data.hard import hard_strings
from lighten.export.onnx.quiet import quiet
from lighten.model.openvino_library import load

TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"


def write(source: Path, out: Path, warnings: list[str]) -> dict[str, Any]:
    """Writes the tokenizer of a directory as two graphs, if openvino-tokenizers can, and returns facts.

    Its ids for hard strings are compared with those of transformers. Differences are told in `warnings`.
    """
    from transformers import AutoTokenizer

    openvino = load("OpenVINO export")
    import openvino_tokenizers

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        try:
            there, back = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
        except Exception as error:  # the package raises errors of many kinds
            reason = " ".join(str(error).split())[:200]
            warnings.append(
                f"openvino-tokenizers cannot hold this tokenizer ({type(error).__name__}: {reason}): openvino-genai "
                "takes ids only, which transformers makes"
            )
            return {"tokenizer": "not converted"}
        for graph, name in ((there, TOKENIZER), (back, DETOKENIZER)):
            openvino.save_model(graph, out / name)
    strings = hard_strings(special=tuple(tokenizer.get_added_vocab()))
    run = openvino.Core().compile_model(there, "CPU")
    odd = [text for text in strings if run([text])["input_ids"][0].tolist() != tokenizer(text)["input_ids"]]
    if odd:
        warnings.append(
            f"{len(odd)} of {len(strings)} hard strings get other ids in openvino_tokenizer.xml than in transformers, "
            f"the first of them {odd[0]!r}"
        )
    return {"tokenizer": "converted", "tokenizer_strings": len(strings), "tokenizer_strings_differ": len(odd)}
