"""Recipes, results, task files and bundles that belong to somebody else, damaged or made with intent."""

import copy
import json
import tarfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.compare import side
from lighten.compare.operand import Version
from lighten.errors import Failure, LightenError
from lighten.evaluate.accuracy.harness import files
from lighten.export.bundle import archive, bundle
from lighten.export.bundle import reading as received
from lighten.pipeline import device, recipe
from lighten.recommend import published
from lighten.recommend.sizes import sizes_of
from lighten.report import card, csv_table, markdown
from lighten.report.merge import add
from lighten.report.shareable import shareable
from lighten.results import file as results_file
from tests.fuzz.frame import answers, fuzz
from tests.report.sample import raw

RECIPE = """name: demo
model: demo:smollm2-135m
trust_remote_code: [demo:smollm2-135m]
x-notes: &steps [{quantize: {method: gptq, bits: 4, group_size: 64}}]
calibration: {data: builtin, samples: 4, length: 64}
variants:
  int4: *steps
  q4: [{export: {format: gguf, type: Q4_K_M, imatrix: true}}]
  slim: [{prune: {what: mlp, ratio: 0.2}}, {distill: {length: 32}}]
evaluate:
  perplexity: {data: builtin, length: 64}
  accuracy: [{task: builtin, limit: 4}]
  speed: {prompt: [8, 16], generate: 4, options: {int4: {attention: eager}}}
  speculative: {draft: q4}
"""
TASK = """task: mine
include: other.yaml
dataset_kwargs: {data_files: {test: data.jsonl}}
doc_to_text: !function code.run
"""
LAUGHS = "\n".join(
    ["x-0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)
PIECES = [
    ": ",
    "- ",
    "&a ",
    "*a ",
    "<<: *a",
    "[",
    "]",
    "{",
    "}",
    "!!python/object:os.system ",
    "!function ",
    "? ",
    "|\n",
]
PIECES += [
    "\t",
    "\x00",
    "\x1b",
    "2001-99-99",
    "1e999",
    ".nan",
    "9" * 5000,
    "0x" + "f" * 5000,
    "1:1:1",
    "on",
    "~",
    "\u2028",
]
PIECES += [
    "[" * 200,
    "{a: " * 200,
    "'",
    '"',
    "%",
    "---\n",
    "...\n",
    "!!binary x",
    "!!timestamp x",
    "!!set {a}",
    "\ud7ff",
]
cuts = st.lists(
    st.tuples(st.integers(0, 600), st.integers(0, 12), st.one_of(st.sampled_from(PIECES), st.text(max_size=4))),
    max_size=4,
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, 10**400, 1e308, -0.0]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["../../x", "\x1b[2J", "=1+1", "<script>", "/etc/passwd", "9" * 5000, "\ud800", "&a [*a]", "| x |\n"]
    ),
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def cut(text: str, changes: list[tuple[int, int, str]]) -> str:
    for place, length, what in changes:
        place %= len(text) + 1
        text = text[:place] + what + text[place + length :]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def written(file: Path, text: str) -> Path:
    file.write_bytes(text.encode(errors="surrogatepass"))
    return file


@fuzz(examples=120)
@given(changes=cuts)
@example(changes=[(0, 0, LAUGHS + "\n")])
@example(changes=[(0, 0, "x: &a [*a]\n")])
@example(changes=[(0, 0, "[" * 100_000)])
@example(changes=[(0, 0, "? [a]\n: b\n")])
@example(changes=[(0, 600, "2: x\n")])
@example(changes=[(0, 0, "x-y: " + "9" * 5000 + "\n")])
@example(changes=[(0, 0, "x-y: 2001-99-99\n")])
def test_a_damaged_recipe_is_read_or_refused(folder: Path, changes: list[tuple[int, int, str]]) -> None:
    found = answers(recipe.load, str(written(folder / "r.yaml", cut(RECIPE, changes))))
    if isinstance(found, recipe.Recipe):
        answers(found.dump)


def test_the_texts_that_are_damaged_are_sound(folder: Path) -> None:
    assert recipe.load(str(written(folder / "r.yaml", RECIPE))).trusted == ["demo:smollm2-135m"]
    assert files.parts(written(folder / "t.yaml", TASK)).keys() == {"t.yaml"}


def test_laughs_are_refused_in_no_time(folder: Path) -> None:
    found = answers(recipe.load, str(written(folder / "r.yaml", LAUGHS)))
    assert "expand to more than" in str(found)


@fuzz(examples=60)
@given(changes=cuts)
@example(changes=[(0, 0, LAUGHS + "\n")])
def test_a_damaged_task_file_is_read_or_refused(folder: Path, changes: list[tuple[int, int, str]]) -> None:
    pytest.importorskip("lm_eval")
    answers(files.facts, written(folder / "t.yaml", cut(TASK, changes)), None, 3)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inner for place in places(each, (*at, key)))]


@cache
def spots() -> list[tuple[Any, ...]]:
    return places(raw())[1:]


def changed(changes: list[tuple[int, Any]]) -> dict[str, Any]:
    value = copy.deepcopy(raw())
    for number, what in changes:
        *way, last = spots()[number % len(spots())]
        inner: Any = value
        try:
            for key in way:
                inner = inner[key]
            inner[last] = what
        except (LookupError, TypeError):
            continue
    return value


def used(file: Path) -> None:
    """Does with results what commands do."""
    found = results_file.load(file)
    version = Version(str(file), found, file.parent)
    for work in (
        lambda: (markdown.markdown(found), csv_table.csv_table(found), shareable(found), add(found, [found])),
        lambda: published.recipe(found, {}, ["gptq-int4"]),
        lambda: side.protocol_of(version),
        lambda: sizes_of(version),
        lambda: card.cards(found, file.parent),
    ):
        try:
            work()
        except LightenError as error:
            assert str(error)


@fuzz(examples=60)
@given(changes=st.lists(st.tuples(st.integers(0, 100_000), values), min_size=1, max_size=3))
def test_damaged_results_are_read_or_refused(folder: Path, changes: list[tuple[int, Any]]) -> None:
    answers(used, written(folder / "results.json", json.dumps(changed(changes))))


@fuzz(examples=60)
@given(
    text=st.one_of(st.text(max_size=40), st.sampled_from(['{"schema": 1', "[" * 99_999, '{"schema": NaN}', "1" * 9999]))
)
def test_texts_that_are_no_results_are_refused(folder: Path, text: str) -> None:
    found = answers(results_file.load, written(folder / "x.json", text))
    assert isinstance(found, LightenError)


@cache
def parts() -> dict[str, bytes]:
    facts = {
        "name": "m",
        "model": "m",
        "target": "rpi5-8gb",
        "gpu": False,
        "file": "m.gguf",
        "files": ["m.gguf"],
        "type": "Q8_0",
        "params": 1,
        "size_bytes": 1,
        "bits_per_weight": 8.0,
    }
    return {"bundle.json": json.dumps(facts).encode(), "perplexity.txt": b"text", "m.gguf": b"GGUF"}


@fuzz(examples=60)
@given(
    name=st.sampled_from(["bundle.json", "SHA256SUMS", "perplexity.txt"]), changes=cuts, key=st.integers(), value=values
)
def test_a_damaged_bundle_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int, str]], key: int, value: Any
) -> None:
    into = tmp_path_factory.mktemp("bundle")
    for each, content in parts().items():
        (into / each).write_bytes(content)
    if name == "bundle.json":
        facts = json.loads(parts()[name])
        facts[list(facts)[key % len(facts)]] = value
        written(into / name, json.dumps(facts))
    bundle.write_sums(into)
    written(into / name, cut((into / name).read_text(), changes))
    if name != "SHA256SUMS":
        bundle.write_sums(into)
    answers(received.read_bundle, into)


@fuzz(examples=100)
@given(
    edits=st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=12)), max_size=4),
    end=st.integers(0, 999),
)
def test_a_damaged_archive_is_unpacked_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], end: int
) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in parts().items():
            member = tarfile.TarInfo(f"bundle-x/{name}")
            member.size, member.pax_headers = len(content), {"comment": "é"}
            tar.addfile(member, BytesIO(content))
    whole = bytearray(plain.getvalue())
    for place, what in edits:
        whole[place : place + len(what)] = what
    packed = bytearray(zstandard.ZstdCompressor().compress(bytes(whole)))
    if end % 3 == 0:
        packed[end % len(packed)] ^= 1 << end % 8
    into = tmp_path_factory.mktemp("archive")
    (into / "x.tar.zst").write_bytes(packed)
    (into / "out").mkdir()
    answers(archive.unpack, into / "x.tar.zst", into / "out")
    assert sorted(path.name for path in into.iterdir()) == ["out", "x.tar.zst"]


@fuzz(examples=60)
@given(value=values, changes=st.lists(st.tuples(st.integers(0, 100_000), values), max_size=2))
def test_what_a_device_says_is_taken_or_refused(value: Any, changes: list[tuple[int, Any]]) -> None:
    for line in (json.dumps({"progress": value}), json.dumps(value), json.dumps({"results": changed(changes)})):
        event = answers(device._event, line.encode(errors="surrogatepass"))
        answers(device._progress, event)
        if "results" in event:
            found = answers(device._results, event["results"], "mine", "box")
            assert isinstance(found, Failure) or found["variants"][0]["name"] == "mine"
