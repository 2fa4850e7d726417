"""Translators of CTranslate2."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from lighten.errors import Failure
from lighten.evaluate.runtimes.ctranslate2_library import open_library
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.runtime import Capability
from lighten.evaluate.runtimes.texts import Reader, Texts
from lighten.model.ctranslate2_source import facts_of, read_header, read_vocabulary
from lighten.model.files import read_json

_SHARED, _SOURCE, _TARGET = "shared_vocabulary.json", "source_vocabulary.json", "target_vocabulary.json"


class CTranslate2Texts(Defaults):
    """A sequence-to-sequence model. See `TextRuntime` for the methods."""

    name = "ctranslate2"
    capabilities: frozenset[Capability] = frozenset({"translates"})

    def __init__(self, folder: Path, device: str) -> None:
        """Loads a directory. Errors are those of `open_library`, and Failure for a damaged vocabulary."""
        self.folder, self.device = folder, device
        self._translator = open_library("Translator", folder, device)
        self.dtype = str(self._translator.compute_type)
        self.detail = f"CTranslate2 {version('ctranslate2')}"
        self.vocab = facts_of(read_header(folder)).vocab
        self._source = read_vocabulary(self._file(_SOURCE))
        self._target = {token: id for id, token in enumerate(read_vocabulary(self._file(_TARGET)))}
        self._first, self._ends = self._rules()
        self._reader: Reader | None = None

    def _file(self, name: str) -> Path:
        file = next((self.folder / each for each in (_SHARED, name) if (self.folder / each).is_file()), None)
        if file is None:
            raise Failure(f"{self.folder} has neither {_SHARED} nor {name}: convert the model again")
        return file

    def _rules(self) -> tuple[list[str] | None, set[int]]:
        """Returns the token that every answer begins with, such as that of its language, and the ids of its ends."""
        file = self.folder / "generation_config.json"
        told = read_json(file) if file.is_file() else {}
        first, ends = told.get("forced_bos_token_id"), told.get("eos_token_id")
        names = list(self._target)
        known = [ends] if isinstance(ends, int) else ends or []
        return [names[first]] if isinstance(first, int) else None, {id for id in known if isinstance(id, int)}

    def translate(self, texts: Texts, most: int) -> list[list[int]]:
        """See `TextRuntime`."""
        rows = [
            [self._source[id] for id, seen in zip(ids, mask, strict=True) if seen and id < len(self._source)]
            for ids, mask in zip(texts.ids.tolist(), texts.mask.tolist(), strict=True)
        ]
        first = None if self._first is None else [self._first] * len(rows)
        try:
            found = self._translator.translate_batch(
                rows, target_prefix=first, beam_size=1, max_decoding_length=most, max_input_length=0
            )
        except (RuntimeError, ValueError) as error:
            raise Failure(f"CTranslate2 failed in {self.folder}: {' '.join(str(error).split())[:400]}") from error
        answers = [[self._target[token] for token in each.hypotheses[0]] for each in found]
        return [[id for id in answer if id not in self._ends] for answer in answers]

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        self._reader = self._reader or Reader(self.folder, None)
        return [int(each) for each in self._reader.read([text]).ids[0]]

    def close(self) -> None:
        """See `Runtime`."""
        self._translator.unload_model()
