"""How to open an artifact in its runtime: a few lines of Python that run as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lighten.model.export_formats import PROMPT, export_format
from lighten.model.formats import FORMATS

_PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)*")
TRANSFORMERS = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("{PROMPT}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""


def loading(form: str, files: Sequence[str], where: str) -> str:
    """Returns Markdown: what to install, and code that opens `where` (a Python expression) and generates text."""
    files = [name for name in files if _PLAIN.fullmatch(name)]  # a name becomes a part of code that people run
    known = export_format(form)
    found = known.usage(files) if known else None
    if isinstance(found, str):
        return found
    packages = " ".join(FORMATS[form].pip_names) if form in FORMATS else "transformers torch"
    packages, code, also = found or (packages, TRANSFORMERS, "")
    imported, _, rest = code.partition("\n\n")
    remote = where.startswith("snapshot_download")
    fetched = "from huggingface_hub import snapshot_download\n" if remote else ""
    code = f"{fetched}{imported}\n\nfolder = {where}\n{rest}"
    return f"```\npip install {packages}{' huggingface_hub' if remote else ''}\n```\n\n```python\n{code}```" + (
        f"\n\n{also}" if also else ""
    )
