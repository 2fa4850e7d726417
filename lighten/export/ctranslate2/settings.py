"""Settings of the export to CTranslate2: a model directory becomes `model.bin` and its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.export.ctranslate2 import converter
from lighten.export.step import Export
from lighten.facts import ModelFacts, Task
from lighten.model.export_formats import PROMPT, Usage
from lighten.model.formats import FORMATS
from lighten.step import Estimate

_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0, "int16": 16.0}
"""Bits per weight, for predictions; 8 for the others."""
_SECONDS = 6e-8
"""Seconds per weight: 8 s for SmolLM2-135M on two cores."""
_FED_SECONDS = 3.5e-7
"""The same for errors that are fed back: 45 s."""
_LARGEST = 2**32
"""CTranslate2 writes the size of a tensor in 32 bits."""

_CODE = f"""\
import json
from pathlib import Path
import ctranslate2
from transformers import AutoTokenizer

kind = json.loads((Path(folder) / "config.json").read_text()).get("compute_type", "default")
generator = ctranslate2.Generator(folder, compute_type=kind)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer.convert_ids_to_tokens(tokenizer.encode("{PROMPT}"))
found = generator.generate_batch([prompt], max_length=40, sampling_topk=1)
print(tokenizer.decode(found[0].sequences_ids[0]))
"""
_TRANSLATES = """\
import json
from pathlib import Path
import ctranslate2
from transformers import AutoTokenizer

kind = json.loads((Path(folder) / "config.json").read_text()).get("compute_type", "default")
translator = ctranslate2.Translator(folder, compute_type=kind)
tokenizer = AutoTokenizer.from_pretrained(folder)
source = tokenizer.convert_ids_to_tokens(tokenizer.encode("A text to translate."))
found = translator.translate_batch([source])
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(found[0].hypotheses[0])))
"""


class CTranslate2(Export):
    """Writes a directory that CTranslate2 opens, with the files of the tokenizer beside the model."""

    work: ClassVar[str] = "lighten.export.ctranslate2.step:run"
    version: ClassVar[int] = 2
    runtime: ClassVar[str] = "ctranslate2"
    library: ClassVar[str] = "ctranslate2"
    calibrated: ClassVar[bool] = False
    tasks: ClassVar[tuple[Task, ...]] = ("causal", "seq2seq")
    optional: ClassVar[tuple[str, ...]] = (*Export.optional, "compute_type")

    format: Literal["ctranslate2"] = Field(description="what to write")
    quantization: Literal[
        "float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"
    ] = Field("int8", description="CTranslate2's type of the weights; int8 has a scale for every output")

    compute_type: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="type of the products: if absent that of the weights, and int8 rounds the inputs of linears too; "
        "with one of these inputs stay as they are, and weights are unpacked when the model is loaded",
    )

    rounding: Literal["gptq", "nearest"] = Field(
        "gptq",
        description="how a causal model's weights get codes of 8 bits: with error feedback, its inputs made alike "
        "before, or the nearest as CTranslate2's converter takes them",
    )

    @property
    def codes(self) -> bool:
        """Whether weights become codes of 8 bits."""
        return self.quantization.startswith("int8")

    @property
    def feeds_back(self) -> bool:
        """Whether the rounding errors of weights make good for each other."""
        return self.codes and self.rounding == "gptq"

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded."""
        return self.quantization != "float32"

    @property
    def bits(self) -> float:
        """Bits of a weight."""
        return _BITS.get(self.quantization, 8.0)

    def exact(self, facts: ModelFacts) -> bool:
        """Plain numbers of 32 bits hold everything of a source, and float16 holds more of it than bfloat16."""
        return self.quantization in ("float32", "float16")

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """The package that converts a model, and runs it."""
        return [(converter.PACKAGE, "ctranslate2")]

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        if "model.bin" not in files:
            return None
        causal = "vocabulary.json" in files
        return Usage("ctranslate2 transformers", _CODE if causal else _TRANSLATES)

    def check(self, facts: ModelFacts) -> None:
        """Refuses what the converter does not know, and a tensor that is too large for the file."""
        if not converter.knows(facts.architecture):
            raise RequestError(
                f"CTranslate2's converter does not know {facts.architecture}; it knows "
                f"{', '.join(sorted(converter.architectures()))}. gguf and onnx take more"
            )
        if facts.vocab * facts.hidden * self.bits / 8 >= _LARGEST:
            raise RequestError(
                f"the embedding takes more than 4 GiB in {self.quantization}, and CTranslate2's file holds no such "
                "tensor: set quantization to one with fewer bits"
            )

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses what cannot be unpacked."""
        if form not in ("hf", *FORMATS):
            raise RequestError(f"CTranslate2 models are made of a model directory, this one is {form}")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the weights, and the time that SmolLM2-135M took. A head that is turned is not tied."""
        fed = self.feeds_back and facts.task == "causal"
        own_head = facts.vocab * facts.hidden if fed and facts.tied else 0
        size = int((facts.params + own_head) * self.bits / 8)
        seconds = 8 + (_SECONDS + _FED_SECONDS * fed) * facts.params
        return Estimate(seconds=seconds, peak_bytes=900_000_000 + (13 if fed else 9) * facts.params, disk_bytes=size)
