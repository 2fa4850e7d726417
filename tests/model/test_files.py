import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate.loaders.survey import survey
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.model.checkpoint import INDEX, SINGLE, Checkpoint
from lighten.model.files import check_links, plain, read_json, without_pickles
from lighten.model.source import Source, find
from lighten.step import Context
from lighten.store.artifact import Artifact, find_damage
from lighten.store.files import hash_files

Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "id_rsa"
    file.write_text("a private key")
    return file


def copied(model: Path, out: Path, **settings: Any) -> set[str]:
    out.mkdir()
    Source(model="m", path=str(model), format="directory", identity="x", **settings).run(
        Artifact(model, {}), out, Context()
    )
    return {file.name for file in out.iterdir()}


@pytest.mark.parametrize("name", ["LICENSE.txt", "tokenizer.json", "config.json", SINGLE])
def test_a_link_that_leaves_the_directory_is_refused(model: Path, secret: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    for read in (find, Checkpoint, lambda path: list(without_pickles(path))):
        with pytest.raises(RequestError, match=rf"{name} leads out of the directory, to {secret}"):
            read(model if read is Checkpoint else str(model) if read is find else model)


def test_no_step_copies_what_lies_elsewhere(model: Path, secret: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(model)
    (model / "LICENSE.txt").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="leads out"):
        checkpoint.write_others(tmp_path / "out", {})
    assert not (tmp_path / "out/LICENSE.txt").exists()


def test_a_template_that_lies_elsewhere_is_not_copied(model: Path, secret: Path, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/x.jinja").symlink_to(secret)
    with pytest.raises(RequestError, match=r"x\.jinja leads out of the directory"):
        copied(model, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("x.jinja"))


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx"])
def test_directories_of_other_kinds_have_no_such_links_either(secret: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to(secret)
    for read in (find, lambda path: survey(Path(path))):
        with pytest.raises(RequestError, match=rf"{name} leads out of the directory, to {secret}"):
            read(str(folder))


def test_links_within_a_directory_and_in_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--m/blobs", tmp_path / "models--o--m/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    (tmp_path / "by-another-name").symlink_to(snapshot)
    (snapshot / "NOTICE.txt").symlink_to("config.json")
    assert find(str(tmp_path / "by-another-name")).facts.layers == 2
    assert SINGLE in copied(snapshot, tmp_path / "out")
    other = tmp_path / "models--o--private/blobs"
    other.mkdir(parents=True)
    (other / "1").write_text("{}")
    (snapshot / "x.json").symlink_to("../../../models--o--private/blobs/1")
    with pytest.raises(RequestError, match=r"x\.json leads out"):
        check_links(snapshot)
    (snapshot / "x.json").unlink()
    (blobs / "99").symlink_to(tmp_path / "by-another-name/config.json")
    (snapshot / "x.json").symlink_to("../../blobs/99")
    check_links(snapshot)


def test_pickles_and_code_are_not_copied(model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "x.pt", "y.pkl", "modeling_x.py"):
        (model / name).write_bytes(b"\x80\x04.")
    (model / "README.md").write_bytes(b"license: mit\n\xff")  # no UTF-8
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in copied(model, tmp_path / "a"))
    trusted = copied(model, tmp_path / "b", trust_remote_code=True)
    assert "modeling_x.py" in trusted and "training_args.bin" not in trusted
    (tmp_path / "c").mkdir()
    Checkpoint(model).write_others(tmp_path / "c", {})
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in (tmp_path / "c").iterdir())


@pytest.mark.parametrize(
    "name", ["../id_rsa.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", "", "x\0y", None, 7, "\x1b[2J"]
)
def test_an_index_names_files_beside_it_only(model: Path, secret: Path, name: Any) -> None:
    shutil.copy(model / SINGLE, secret.with_name("id_rsa.safetensors"))
    names = Checkpoint(model).weight_map
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    (model / SINGLE).rename(model / "a.safetensors")
    with pytest.raises(LightenError, match=r"index\.json"):
        Checkpoint(model).weight_map  # noqa: B018
    if isinstance(name, str):
        with pytest.raises(RequestError, match="names the file"):
            plain(name, model, INDEX)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        (b'{"a": "\xff"}', "not readable JSON"),
        ('{"hidden_size": 1, "hidden_size": 2}', "the key 'hidden_size' is there twice"),
        ("[1]", "must hold a JSON object"),
        ("9" * 10_000, "not readable JSON"),
        ("{", "not readable JSON"),
        ("", "not readable JSON"),
    ],
)
def test_json_that_is_none_is_one_message(model: Path, content: str | bytes, told: str) -> None:
    file = model / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Failure, match=told) as caught:
        find(str(model))
    assert str(file) in str(caught.value)


def test_json_as_large_as_no_file_of_a_model_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(Failure, match=r"has 1,099,511,627,776 bytes"):
        read_json(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("hidden_size", -1),
        ("vocab_size", "many"),
        ("head_dim", [1]),
        ("num_key_value_heads", 1e300),
        ("intermediate_size", None),
        ("architectures", {"a": 1}),
        ("architectures", [None]),
        ("quantization_config", [1]),
        ("attn_implementation", "somebody/kernel"),
        ("_attn_implementation", {"": "somebody/kernel@main:f"}),
    ],
)
def test_a_config_of_impossible_values_is_one_message(model: Path, key: str, value: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(LightenError, match=key) as caught:
        find(str(model))
    assert "config.json" in str(caught.value)


def test_an_object_of_the_store_with_a_link_is_damaged(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "object"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    artifact = Artifact(folder, {"files": hash_files(folder)})
    assert find_damage(artifact) == []
    (folder / "b.json").symlink_to(secret)
    assert any("b.json: a link" in line for line in find_damage(Artifact(folder, {"files": hash_files(folder)})))


def test_code_beside_a_model_does_not_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w').close()")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    (model / "config.json").write_text(json.dumps(config))
    assert find(str(model)).facts.layers == 2
    assert open_runtime(model).vocab == config["vocab_size"]
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(RequestError, match=r"modeling_own\.py.*--trust-remote-code"):
        find(str(model))
    with pytest.raises(LightenError):
        open_runtime(model)
    assert not mark.exists()


def test_a_tokenizer_that_is_none_is_one_message(model: Path) -> None:
    for text in ("[" * 100_000, "{}", '{"model": {"type": "BPE"}}', '{"model": 1}', ""):
        (model / "tokenizer.json").write_text(text)
        with pytest.raises(LightenError) as caught:
            open_tokenizer(model)
        assert str(model) in str(caught.value) and "\n" not in str(caught.value)
