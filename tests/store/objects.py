"""Objects for the tests of the store."""

from lighten.store.artifact import Artifact
from lighten.store.store import Store

KEY = "ab" * 32
OTHER = "cd" * 32


def put(store: Store, key: str, content: bytes = b"weights") -> Artifact:
    with store.lock(key), store.building(key) as out:
        (out / "folder").mkdir()
        (out / "folder" / "w.bin").write_bytes(content)
        return store.finish(out, {"key": key, "kind": "test", "format": "test", "source": {}, "warnings": []})
