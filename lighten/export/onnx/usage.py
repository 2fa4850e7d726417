"""How a person opens an ONNX directory, for model cards."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.model.export_formats import PROMPT, Usage

GENAI = f"""\
import onnxruntime_genai as og

model = og.Model(folder)
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=40)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("{PROMPT}"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
PLAIN = """\
import onnxruntime

session = onnxruntime.InferenceSession(f"{folder}/FILE")
print([(each.name, each.shape, each.type) for each in session.get_inputs()])
"""


def usage(files: Sequence[str]) -> Usage | None:
    """Returns the code that opens the graph: onnxruntime-genai if it is configured for the graph, else onnxruntime."""
    if "genai_config.json" in files:
        return Usage("onnxruntime-genai", GENAI)
    named = sorted(name for name in files if name.endswith(".onnx"))
    return Usage("onnxruntime", PLAIN.replace("FILE", named[0])) if named else None
