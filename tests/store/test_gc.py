"""What `gc` removes, beside versions, leases and runs under way."""

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lighten.errors import Failure
from lighten.store.files import MANIFEST
from lighten.store.gc import check, collect
from lighten.store.links import point
from lighten.store.store import Store, write_json
from tests.store.objects import KEY, OTHER, put


def test_gc_keeps_what_a_version_refers_to_and_what_is_being_built(tmp_path: Path) -> None:
    store = Store(tmp_path)
    third = "ef" * 32
    for key in (KEY, OTHER):
        put(store, key)
    with store.new_version("demo") as folder:
        write_json(folder / "objects.json", [KEY])
    with store.building(third) as building, store.lock(third):
        (building / "w").write_bytes(b"12345")
        assert collect(store, dry_run=True) == [(OTHER, 7 + (store.objects / OTHER / MANIFEST).stat().st_size)]
        assert len(store.finished()) == 2
        collect(store)
        assert store.finished() == [KEY]
        assert building.exists()


@pytest.mark.parametrize("told", [None, "", "{}", '"text"', "[1]", '["short"]'])
def test_gc_refuses_to_guess(tmp_path: Path, told: str | None) -> None:
    store = Store(tmp_path)
    put(store, KEY)
    with store.new_version("demo") as folder:
        if told is not None:
            (folder / "objects.json").write_text(told)
    with pytest.raises(Failure, match=r"objects\.json"):
        collect(store)
    assert store.finished() == [KEY]


def test_gc_keeps_what_the_variants_of_a_version_lead_to(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, KEY)
    with store.new_version("demo") as folder:
        write_json(folder / "objects.json", [])
        (folder / "variants").mkdir()
        point(folder / "variants" / "int4", f"../../../objects/{KEY}")
    collect(store)
    assert store.finished() == [KEY]


def _hold(root: str, connection: Connection) -> None:
    with Store(Path(root)).lease([KEY]):
        connection.send("held")
        time.sleep(60)


def test_what_a_living_run_declared_is_kept_and_what_a_dead_one_declared_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in (KEY, OTHER):
        put(store, key)
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), theirs))
    holder.start()
    assert ours.recv() == "held"
    assert [name for name, _ in collect(store)] == [OTHER]
    (store.objects / KEY / MANIFEST).chmod(0o644)
    (store.objects / KEY / MANIFEST).write_text("{}")
    (checked,) = check(store)
    assert checked.damage and "run under way" in str(checked.kept)
    holder.kill()
    holder.join()
    assert [name for name, _ in collect(store)] == [KEY]
    assert list((tmp_path / "leases").iterdir()) == []


@pytest.mark.parametrize("looked_at", ["leased", "referenced"])
def test_a_run_that_ends_while_gc_looks_keeps_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: str
) -> None:
    """It publishes, then gives its lease back: right after gc has read one of the two."""
    store = Store(tmp_path)
    put(store, KEY)
    run = contextlib.ExitStack()
    run.enter_context(store.lease([KEY]))
    look = getattr(Store, looked_at)

    def look_then_end(self: Store) -> set[str]:
        found: set[str] = look(self)
        if not store.versions():
            with store.publishing("demo"), store.new_version("demo") as folder:
                write_json(folder / "objects.json", [KEY])
            run.close()
        return found

    monkeypatch.setattr(Store, looked_at, look_then_end)
    collect(store)
    assert store.finished() == [KEY]


def test_gc_collects_whatever_killed_runs_leave(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, KEY)
    with store.publishing("demo"), store.new_version("demo") as folder:
        write_json(folder / "objects.json", [KEY])
    store.record_cost(KEY, {"seconds": 1})
    store.scratch(OTHER).joinpath("checkpoint").touch()
    store.record_cost(OTHER, {"seconds": 1})
    with store.publishing("half"):
        pass
    for folder in (store.objects / f".tmp-{OTHER}-x", store.objects / f".gone-{OTHER}-1", tmp_path / "half" / ".tmp-x"):
        folder.mkdir(parents=True)
    (tmp_path / "demo" / ".tmp-y").mkdir()
    (tmp_path / "demo" / ".latest").symlink_to("v1")
    (tmp_path / "demo" / "v1" / ".results.json.abcd_123").touch()
    (tmp_path / "costs" / f".{OTHER}.json.abcd_123").touch()
    (tmp_path / "leases" / "dead").write_text(f'["{OTHER}"]')
    (tmp_path / "mine" / ".tmp-z").mkdir(parents=True)  # no recipe's directory: not the store's
    before = sorted(tmp_path.rglob("*"))
    named = {name for name, _ in collect(store, dry_run=True)}
    assert sorted(tmp_path.rglob("*")) == before
    assert {f".tmp-{OTHER}-x", OTHER, "demo/.tmp-y", "half"} <= named
    collect(store)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if KEY not in path.parts}
    folders = {"objects", "locks", "costs", "leases", "unfinished", "demo", "mine", "mine/.tmp-z"}
    files = {"locks/gate.lock", f"costs/{KEY}.json", "demo/v1", "demo/v1/objects.json", "demo/latest"}
    assert left == folders | files
    assert collect(store) == []


def test_gc_leaves_a_version_alone_that_is_being_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.publishing("demo"), store.new_version("demo") as folder:
        write_json(folder / "objects.json", [])
        collect(store)
        assert folder.is_dir()
    assert [path.name for path in store.versions("demo")] == ["v1"]
