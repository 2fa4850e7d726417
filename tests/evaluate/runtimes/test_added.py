"""A runtime of an installed package: pairs of tokens, counted, in a file of numpy's."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from lighten.errors import Failure, RequestError
from lighten.evaluate import machine
from lighten.evaluate.loaders.survey import survey
from lighten.evaluate.runtimes import choose
from lighten.evaluate.runtimes.choose import open_runtime, opener
from lighten.evaluate.runtimes.runtime import Question
from lighten.model.traffic import traffic
from lighten.pipeline.verbs import measure
from lighten.plugins import Table
from lighten.step import silent

CODE = """
from pathlib import Path

import numpy as np

from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Opener
from lighten.evaluate.runtimes.tokenizer import HfTokenizer


class PairsOpener(Opener[Path]):
    name = "pairs"
    weights = (".pairs",)

    def recognises(self, target):
        return target if isinstance(target, Path) and target.suffix == ".pairs" else None

    def open(self, place, conditions):
        return Pairs(place)


class Pairs(Defaults):
    name, device, dtype, detail = "pairs", "cpu", "float32", "numpy"
    capabilities = frozenset({"logits", "scores"})

    def __init__(self, place):
        self._table = np.load(place, allow_pickle=False)
        self._folder = place.parent
        self.vocab = self._table.shape[1]

    def logits(self, ids):
        return self._table[ids]

    def encode(self, text):
        return HfTokenizer(self._folder).encode(text)
"""


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the runtime, whose package is installed as pip does it."""
    packages = tmp_path / "packages"
    told = packages / "lighten_pairs-1.0.dist-info"
    told.mkdir(parents=True)
    (packages / "lighten_pairs.py").write_text(textwrap.dedent(CODE))
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: lighten-pairs\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[lighten.runtimes]\npairs = lighten_pairs:PairsOpener\n")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ["PYTHONPATH"]]))
    rows = choose.RUNTIMES
    monkeypatch.setattr(choose, "RUNTIMES", Table(rows.what, rows.group, rows.rows, base=rows.base, key=rows.key))
    choose.weight_endings.cache_clear()
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny() / name, folder)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    table = np.random.default_rng(0).normal(size=(vocab, vocab)).astype(np.float32)
    with (folder / "model.pairs").open("wb") as file:
        np.save(file, table)
    yield folder / "model.pairs"
    choose.weight_endings.cache_clear()
    sys.modules.pop("lighten_pairs", None)


def test_a_runtime_that_was_added_opens_its_files(model: Path) -> None:
    opened = open_runtime(model)
    assert (opened.name, opened.hidden(), opened.peak_vram_bytes()) == ("pairs", None, None)
    ids = np.array([3, 4, 5])
    logits = opened.logits(ids).astype(np.float64)
    expected = logits[2, 7] - np.log(np.exp(logits[2]).sum())
    assert opened.choose([3, 4, 5], [[7]])[0].logprob == pytest.approx(expected, abs=1e-4)
    two, one = opened.choose_many([Question([3, 4, 5], [[7, 8], [7]])], silent)[0]
    assert two.logprob < one.logprob


def test_it_is_measured_and_surveyed_like_ours(model: Path) -> None:
    (row,) = measure([str(model)], perplexity={"length": 64, "samples": 2})["variants"]  # type: ignore[arg-type]
    assert (row["status"], row["runtime"], row["format"]) == ("ok", "pairs", "pairs"), row["error"]
    assert row["perplexity"]["value"] > 100 and row["bits_per_weight"] > 0
    found = {load["loader"]: load["status"] for load in survey(model).loads}
    assert found["pairs"] == "ok" and set(found.values()) == {"ok", "other"}


def test_what_no_runtime_serves_is_refused() -> None:
    with pytest.raises(RequestError, match="no runtime serves it"):
        open_runtime("ftp://example.org/v1")


def test_packages_of_a_runtime_enter_the_keys_of_its_own_measurements_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = machine.measuring_packages()
    assert "safetensors" not in ours
    for name in ("torch", "llama.cpp", "onnxruntime"):
        assert machine.measuring_packages(opener(name).packages) == ours, "keys of an old store"
    assert machine.measuring_packages(("safetensors",)) == {**ours, "safetensors": version("safetensors")}
    monkeypatch.setattr(machine.llama_library, "installed", lambda: None)  # as where both packages are, of the other
    assert machine.measuring_packages(opener("llama.cpp").packages) == machine.measuring_packages()


def test_there_is_no_roofline_of_weights_that_nobody_can_count(model: Path) -> None:
    with pytest.raises(Failure, match="no weights in files that can be read here"):
        traffic(model, opener("torch").facts(model.parent), "float32")
