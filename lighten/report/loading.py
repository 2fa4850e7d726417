"""How an artifact is opened in its runtime, as a few lines of Python that run as they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)*")
PROMPT = "The capital of France is"
NEEDS = {
    "gptq": "transformers gptqmodel optimum",
    "awq": "transformers gptqmodel optimum",
    "bitsandbytes": "transformers accelerate bitsandbytes",
    "compressed-tensors": "transformers accelerate compressed-tensors",
}
"""What pip installs for a format that transformers reads; transformers and torch for all others."""

TRANSFORMERS = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("{PROMPT}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""
LLAMA_CPP = f"""\
from llama_cpp import Llama

model = Llama(f"{{folder}}/FILE", n_ctx=512, verbose=False)
print(model("{PROMPT}", max_tokens=20)["choices"][0]["text"])
"""
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
ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession(f"{folder}/FILE")
print([(each.name, each.shape, each.type) for each in session.get_inputs()])
"""


def loading(form: str, files: Sequence[str], where: str) -> str:
    """Returns Markdown: what to install, and code that opens `where` (a Python expression) and says something."""
    files = [name for name in files if _PLAIN.fullmatch(name)]  # a name becomes a part of code that people run
    named = {suffix: sorted(name for name in files if name.endswith(suffix)) for suffix in (".gguf", ".onnx")}
    if form == "bundle":
        return "Unpack the archive on the device; its README says how to chat, to serve and to measure."
    if form == "gguf" and named[".gguf"]:
        packages, code = "llama-cpp-python", LLAMA_CPP.replace("FILE", named[".gguf"][0])
    elif form == "onnx" and "genai_config.json" in files:
        packages, code = "onnxruntime-genai", GENAI
    elif form == "onnx" and named[".onnx"]:
        packages, code = "onnxruntime", ONNX.replace("FILE", named[".onnx"][0])
    else:
        packages, code = NEEDS.get(form, "transformers torch"), TRANSFORMERS
    imported, _, rest = code.partition("\n\n")
    remote = where.startswith("snapshot_download")
    fetched = "from huggingface_hub import snapshot_download\n" if remote else ""
    code = f"{fetched}{imported}\n\nfolder = {where}\n{rest}"
    return f"```\npip install {packages}{' huggingface_hub' if remote else ''}\n```\n\n```python\n{code}```"
