"""A bundle from other people, and the part of it that goes to a device.

The facts, text and model of a bundle are read. Its scripts and requirements are not used: those that go to a device
come from the installed lighten.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from lighten.data.reading import Refused, parse_json
from lighten.errors import Failure, RequestError
from lighten.export.bundle import bundle
from lighten.export.bundle.archive import unpack
from lighten.store.files import hash_file
from lighten.store.names import as_name

FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
TEXT = "perplexity.txt"
LONGEST = 1_000_000
"""Maximum number of bytes of a bundle's text, of its facts and of its checksums."""
REQUIREMENTS = "requirements.txt"
RUN_THERE = ("python.sh", "bench.sh", "bench.py")
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,60}$")]
Count = Annotated[int, Field(ge=0, le=10**15)]


class Facts(BaseModel):
    """The part of bundle.json that bench.py reads."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(max_length=200)
    model: str = Field(max_length=300)
    target: Word
    gpu: bool
    file: str
    files: list[str] = Field(min_length=1, max_length=1000)
    type: Word
    params: Count
    size_bytes: Count
    bits_per_weight: float


@dataclass(frozen=True)
class Copy:
    """The files for the device: the model's files by name, and all other files as one tar."""

    folder: Path
    models: dict[str, str]
    """SHA-256 by name."""
    small: bytes
    facts: Facts
    notes: tuple[str, ...] = ()
    """Differences between what is measured and what the bundle says."""

    @property
    def key(self) -> str:
        """Checksum of all files."""
        listing = json.dumps([sorted(self.models.items()), hashlib.sha256(self.small).hexdigest()])
        return hashlib.sha256(listing.encode()).hexdigest()

    def size(self, name: str) -> int:
        """Returns the bytes of one of the model's files."""
        return (self.folder / name).stat().st_size


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Yields the directory of a bundle. An archive is unpacked meanwhile.

    Raises:
        RequestError: it is no bundle.
        Failure: the archive is damaged, or exceeds the limits of our own archives.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file() or not path.name.endswith(bundle.ARCHIVE):
        raise RequestError(f"{path} is not a bundle: give a directory or .tar.zst that `lighten export` made")
    with tempfile.TemporaryDirectory(prefix="lighten-") as scratch:
        folder = unpack(path, Path(scratch))
        if not (folder / "bundle.json").is_file():
            raise RequestError(f"{path} is not a bundle: there is no bundle.json in it")
        yield folder


def read_bundle(folder: Path) -> Copy:
    """Reads a bundle and checks its checksums.

    Raises:
        RequestError: it is no bundle.
        Failure: a file is missing or damaged.
    """
    try:
        facts = Facts.model_validate(parse_json(_read(folder / "bundle.json")))
        lines = _read(folder / bundle.SUMS).decode().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except OSError as error:
        raise RequestError(f"{folder} is not a bundle: it has no {Path(str(error.filename)).name}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Failure(f"{folder}/bundle.json is damaged ({where}: {first['msg']}): make the bundle again") from error
    except (Refused, UnicodeDecodeError) as error:
        raise Failure(f"{folder}: {bundle.SUMS} or bundle.json is damaged ({error}): make the bundle again") from error
    for name, digest in sums.items():
        if not FILE.fullmatch(name) or (folder / name).is_symlink() or not (folder / name).is_file():
            raise Failure(f"{folder}: {name[:200]!r} is missing or no plain file: make or fetch the bundle again")
        if hash_file(folder / name) != digest:
            raise Failure(f"{folder}/{name} is not what {bundle.SUMS} says: make or fetch the bundle again")
    if facts.file not in facts.files or not all(name.endswith(".gguf") for name in facts.files):
        raise Failure(f"{folder}/bundle.json is damaged (files: not a model's): make the bundle again")
    if unknown := [name for name in (*facts.files, TEXT) if name not in sums]:
        raise Failure(f"{folder}/{bundle.SUMS} does not list {unknown[0][:200]!r}: make the bundle again")
    sent = _sent(folder, facts)
    other = [name for name in RUN_THERE if name in sums and sums[name] != hashlib.sha256(sent[name]).hexdigest()]
    if (folder / REQUIREMENTS).is_file() and _pins(_read(folder / REQUIREMENTS)) != _pins(sent[REQUIREMENTS]):
        other.append(REQUIREMENTS)
    notes = [f"measured with the {name} of this lighten: the bundle brings another" for name in other]
    return Copy(folder, {name: sums[name] for name in facts.files}, _packed(sent), facts, tuple(notes))


def _pins(requirements: bytes) -> set[bytes]:
    return {line.strip() for line in requirements.splitlines() if line.strip() and not line.startswith(b"#")}


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise Refused(f"{file.name} has more than {LONGEST:,} bytes")
    return content


def _sent(folder: Path, facts: Facts) -> dict[str, bytes]:
    """Returns the small files for the device: the bundle's facts and text, and our own scripts and requirements."""
    plain = facts.model_copy(update={"name": as_name(facts.name)})
    try:
        text = _read(folder / TEXT).decode()
    except (Refused, UnicodeDecodeError) as error:
        raise Failure(f"{folder}/{TEXT} is damaged ({error}): make the bundle again") from error
    return {
        "bundle.json": (json.dumps(plain.model_dump(), indent=1) + "\n").encode(),
        TEXT: text.encode(),
        REQUIREMENTS: bundle.requirements("# what this lighten has", bundle.pins()),
        **{name: bundle.script(name) for name in RUN_THERE},
    }


def _packed(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
