"""The store, as two processes and kill -9 see it."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import Failure, RequestError
from lighten.store.artifact import find_damage, read_artifact
from lighten.store.files import MANIFEST, canonical, stage_key
from lighten.store.gc import check
from lighten.store.store import Store, write_json
from tests.store.objects import KEY, OTHER, put

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON))
def test_canonical_json_has_one_spelling(value: dict) -> None:
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(dict(reversed(list(value.items())))) == text


@given(st.dictionaries(st.text(max_size=5), st.integers()), st.dictionaries(st.text(max_size=5), st.integers()))
def test_keys_differ_with_everything_that_makes_a_stage(one: dict, two: dict) -> None:
    key = stage_key("step", 1, one, [KEY])
    assert len(key) == 64
    assert (key == stage_key("step", 1, two, [KEY])) == (one == two)
    assert key not in (
        stage_key("other", 1, one, [KEY]),
        stage_key("step", 2, one, [KEY]),
        stage_key("step", 1, one, []),
        stage_key("step", 1, one, [OTHER]),
        stage_key("step", 1, one, [KEY, KEY]),
    )


def test_an_object_is_complete_read_only_and_checked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store, KEY)
    assert store.find(KEY) == artifact == read_artifact(artifact.path)
    assert artifact.size_bytes == 7
    assert not artifact.path.stat().st_mode & 0o222
    assert not (artifact.path / "folder" / "w.bin").stat().st_mode & 0o222
    assert find_damage(artifact) == []
    assert [path.name for path in store.objects.iterdir()] == [KEY]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="boom"), store.building(KEY) as out:
        (out / "half").write_text("written")
        raise ValueError("boom")
    assert store.find(KEY) is None
    assert list(store.objects.iterdir()) == []


@pytest.mark.parametrize("harm", ["flip", "missing", "extra", "manifest"])
def test_a_corrupt_object_is_found_removed_and_never_used(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    file = put(store, KEY).path / "folder" / "w.bin"
    put(store, OTHER)
    os.chmod(file, 0o644)
    os.chmod(file.parent, 0o755)
    os.chmod(file.parent.parent, 0o755)
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)
    elif harm == "missing":
        file.unlink()
    elif harm == "extra":
        (file.parent / "more").touch()
    else:
        manifest = file.parent.parent / MANIFEST
        os.chmod(manifest, 0o644)
        manifest.write_text("{")
    report = {each.key: each.damage for each in check(store)}
    assert report[OTHER] == []
    assert report[KEY]
    assert store.finished() == [OTHER]


def test_a_flipped_byte_is_never_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = put(store, KEY).path / "folder" / "w.bin"
    os.chmod(file, 0o644)
    file.write_bytes(b"weighty")
    assert store.sound(KEY) is None
    assert store.find(KEY) is None


def _build_slowly(root: str, log: str) -> None:
    store = Store(Path(root))
    with store.lock(KEY):
        if store.find(KEY) is None:
            with store.building(KEY) as out:
                (out / "file").write_text("x" * 10)
                time.sleep(0.3)
                store.finish(out, {"key": KEY, "kind": "test", "format": "test"})
            with open(log, "a") as file:
                file.write("built\n")


def test_two_processes_build_an_object_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_build_slowly, args=(str(tmp_path / "store"), str(log))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "built\n"
    assert find_damage(Store(tmp_path / "store").find(KEY)) == []


def test_kill_9_leaves_no_object_and_the_next_build_cleans_up(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from lighten.store.store import Store\n"
        f"store = Store(Path(sys.argv[1]))\n"
        f"with store.lock('{KEY}'), store.building('{KEY}') as out:\n"
        "    (out / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    store = Store(tmp_path)
    assert store.find(KEY) is None
    assert len(list(store.objects.iterdir())) == 1
    put(store, KEY)
    assert [path.name for path in store.objects.iterdir()] == [KEY]


def test_versions_count_up_and_latest_follows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        with store.new_version("demo") as folder:
            (folder / "n").write_text(str(number))
            write_json(folder / "objects.json", [KEY])
    assert [path.name for path in store.versions("demo")] == ["v1", "v2"]
    assert (tmp_path / "demo" / "latest" / "n").read_text() == "2"
    with pytest.raises(RuntimeError), store.new_version("demo"):
        raise RuntimeError
    assert len(store.versions()) == 2
    with pytest.raises(RequestError, match="objects"), store.publishing("objects"):
        pass


@pytest.mark.parametrize("told", ["", "[]", "[1]", "{}", '{"what": 1, "seconds": "x", "nominal_seconds": 1}'])
def test_a_damaged_cost_counts_as_none(tmp_path: Path, told: str) -> None:
    store = Store(tmp_path)
    cost = {"what": "sweep", "seconds": 1.0, "nominal_seconds": 2, "machine": "here"}
    store.record_cost(KEY, cost)
    store.record_cost(OTHER, cost)
    (tmp_path / "costs" / f"{OTHER}.json").write_text(told)
    assert store.costs() == [cost]


def test_an_unusable_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="artifacts directory"), Store(tmp_path / "file").lock(KEY):
        pass


@pytest.mark.parametrize(
    "harm", ["", "[]", "{}", "[" * 5000, '{"key": 7, "format": "x", "files": []}', '{"format": "x", "files": []}']
)
def test_a_damaged_manifest_is_told_and_the_object_removed(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    manifest = put(store, KEY).path / MANIFEST
    manifest.chmod(0o644)
    manifest.write_text(harm)
    said: list[str] = []
    assert store.find(KEY) is None
    with pytest.raises(Failure, match=r"artifact\.json"):
        read_artifact(manifest.parent)
    assert store.sound(KEY, said.append) is None
    assert len(said) == 1 and KEY[:12] in said[0]
    assert store.finished() == []


def test_a_changed_digit_in_a_manifest_is_damage_and_old_manifests_have_no_digest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = put(store, KEY).path / MANIFEST
    manifest.chmod(0o644)
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**whole, "kind": "tesu"}))
    assert store.find(KEY) is None
    assert store.damage(KEY)
    del whole["sha256"]
    manifest.write_text(json.dumps(whole))
    assert store.damage(KEY) == []


def test_what_cannot_be_read_just_now_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    put(store, KEY)

    def refuse(root: Path) -> list[dict[str, Any]]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("lighten.store.artifact.hash_files", refuse)
    with pytest.raises(OSError, match="open files"):
        store.sound(KEY)
    (checked,) = check(store)
    assert checked.kept == "it cannot be read"
    assert store.finished() == [KEY]


def test_an_object_without_a_manifest_or_with_anothers_is_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.objects / KEY).mkdir(parents=True)
    assert store.sound(KEY) is None
    put(store, KEY)
    shutil.copytree(store.objects / KEY, store.objects / OTHER)
    assert store.find(OTHER) is None
    assert store.sound(OTHER) is None
    assert store.finished() == [KEY]


def _publish(root: str, count: int) -> None:
    store = Store(Path(root))
    for _ in range(count):
        with store.publishing("demo"), store.new_version("demo") as folder:
            number = len(store.versions("demo")) + 1
            write_json(folder / "objects.json", [])
            write_json(folder / "number.json", number)


def test_versions_published_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_publish, args=(str(tmp_path), 20)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    store = Store(tmp_path)
    found = [(path.name, json.loads((path / "number.json").read_text())) for path in store.versions("demo")]
    assert found == [(f"v{number}", number) for number in range(1, 41)]
    assert (tmp_path / "demo" / "latest").resolve().name == "v40"


def test_latest_is_mended_where_a_kill_came_between(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        with store.publishing("demo"), store.new_version("demo") as folder:
            write_json(folder / "objects.json", [])
    latest = tmp_path / "demo" / "latest"
    latest.unlink()
    latest.symlink_to("v1")
    with store.publishing("demo"):
        pass
    assert latest.resolve().name == "v2"
