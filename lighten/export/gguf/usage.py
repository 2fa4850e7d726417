"""How a person opens a GGUF file, for model cards."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.model.export_formats import PROMPT, Usage
from lighten.model.gguf_header import MODELFILE

CODE = f"""\
from llama_cpp import Llama

model = Llama(f"{{folder}}/FILE", n_ctx=512, verbose=False)
print(model("{PROMPT}", max_tokens=20)["choices"][0]["text"])
"""
OLLAMA = """\
With Ollama and with LM Studio, in the directory of the files:

```
ollama create NAME -f Modelfile && ollama run NAME
lms import {file}
```"""


def usage(files: Sequence[str]) -> Usage | None:
    """Returns the code that opens the first .gguf file, and commands if it has a Modelfile; None without a file."""
    named = sorted(name for name in files if name.endswith(".gguf"))
    if not named:
        return None
    also = OLLAMA.replace("{file}", named[0]) if MODELFILE in files else ""
    return Usage("llama-cpp-python", CODE.replace("FILE", named[0]), also)
