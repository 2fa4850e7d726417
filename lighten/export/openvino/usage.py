"""How a person opens an OpenVINO directory, for model cards."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.model.export_formats import PROMPT, Usage

GENAI = f"""\
import openvino_genai

pipeline = openvino_genai.LLMPipeline(folder, "CPU")
print(pipeline.generate("{PROMPT}", max_new_tokens=40))
"""
PLAIN = """\
import openvino

model = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU")
print([(each.any_name, each.partial_shape) for each in model.inputs])
"""


def usage(files: Sequence[str]) -> Usage | None:
    """Returns the code that opens the model: openvino-genai if its tokenizer is there too, else openvino."""
    if "openvino_model.xml" not in files:
        return None
    return Usage("openvino-genai", GENAI) if "openvino_tokenizer.xml" in files else Usage("openvino", PLAIN)
