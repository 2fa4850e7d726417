import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import find_opener
from lighten.export.gguf import write as export
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.split import split
from lighten.model import gguf_source
from lighten.model.source import find
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.gguf.test_write import logits_of

Tiny = Callable[..., Path]
IDS = list(range(3, 40))


def whole_and_parts(tiny: Tiny, folder: Path, family: str = "llama3") -> tuple[Path, list[Path]]:
    export.write(tiny(family), folder / "m.gguf", "F16")
    shutil.copy(folder / "m.gguf", folder / "whole.gguf")
    return folder / "whole.gguf", split(folder / "m.gguf", 1_000_000)


def test_llama_cpp_opens_the_parts_as_one(tiny: Tiny, tmp_path: Path) -> None:
    whole, parts = whole_and_parts(tiny, tmp_path)
    count = len(parts)
    assert count > 2
    assert [part.name for part in parts] == [f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    assert sorted(tmp_path.iterdir()) == sorted([whole, *parts])
    assert all(part.stat().st_size <= 1_000_000 for part in parts)
    assert np.array_equal(logits_of(whole, IDS), logits_of(parts[0], IDS))
    readers = [gguf.GGUFReader(part) for part in parts]
    assert [reader.fields["split.no"].contents() for reader in readers] == list(range(count))
    assert {reader.fields["split.count"].contents() for reader in readers} == {count}
    assert {reader.fields["split.tensors.count"].contents() for reader in readers} == {22}
    before = gguf.GGUFReader(whole).fields
    after = readers[0].fields
    assert {key for key in after if not key.startswith("split.")} - {"GGUF.kv_count"} == set(before) - {"GGUF.kv_count"}


def test_a_small_file_stays_whole(tiny: Tiny, tmp_path: Path) -> None:
    export.write(tiny(), tmp_path / "m.gguf", "F16")
    assert split(tmp_path / "m.gguf", 10**9) == [tmp_path / "m.gguf"]
    with pytest.raises(RequestError, match="the metadata alone takes"):
        split(tmp_path / "m.gguf", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_parts_are_a_source(tiny: Tiny, tmp_path: Path) -> None:
    whole, parts = whole_and_parts(tiny, tmp_path, "llama")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    gguf_source.convert(whole, tmp_path / "a")
    gguf_source.convert(parts[0], tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    identity = find(str(parts[0])).identity
    with pytest.raises(RequestError, match=r"part 2 of .*give the first one, m-00001"):
        find(str(parts[1]))
    data = bytearray(parts[-1].read_bytes())
    data[-40] ^= 1
    parts[-1].write_bytes(data)
    assert find(str(parts[0])).identity != identity
    parts[1].unlink()
    with pytest.raises(Failure, match=r"m-00002-of-.* is missing"):
        find(str(parts[0]))


def test_the_step_splits_and_the_directory_is_found(tiny: Tiny, tmp_path: Path) -> None:
    source = Artifact(tiny(), {"format": "hf", "source": {"licence": "mit"}})
    step = Gguf(format="gguf", type="F16", split="1MB")
    assert step.dump()["split"] == 1_000_000
    assert "split" not in Gguf(format="gguf").key_config()
    facts = step.run(source, tmp_path, Context(key="abc"))
    assert facts["files"] == sorted(path.name for path in tmp_path.iterdir())
    assert facts["fallbacks"]["of"] == 21
    found = find_opener(tmp_path)[1]
    assert found == tmp_path / facts["files"][0]
    fields = gguf.GGUFReader(found).fields
    assert fields["lighten.key"].contents() == "abc"
    assert json.loads(fields["lighten.step"].contents())["type"] == "F16"
    assert fields["general.license"].contents() == "mit"
