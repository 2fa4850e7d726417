"""Unpacking an archive from other people: within limits, and only into the given place."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import IO

from lighten.errors import Failure, LightenError, RequestError, missing_extra
from lighten.store.names import NAME

MOST = 2000
"""Maximum number of files of an archive."""
RATIO, SLACK = 20, 100_000_000
"""How much larger than the archive its files may be: so many times, and so many bytes more."""
HEADERS = 1 << 20
"""Maximum number of bytes between the content of two files: headers and padding."""
WINDOW = 1 << 27
"""Bytes of memory that zstd may take: the maximum that `zstd --long` needs."""
BLOCK = 1 << 20
SPARE = 100_000_000
"""Bytes that stay free on the disk."""


class _Measured:
    """A stream that gives no more bytes than are currently allowed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.allowed = HEADERS

    def read(self, size: int) -> bytes:
        """Returns `size` bytes or less at the end.

        Raises:
            Failure: more than is allowed.
        """
        self.allowed -= size
        if self.allowed < 0:
            raise Failure("its headers are larger than those of any archive that lighten makes")
        return self._stream.read(size)


def unpack(path: Path, into: Path) -> Path:
    """Unpacks a .tar.zst of plain files in one directory. Returns that directory, which lies in `into`.

    Raises:
        RequestError: zstandard is not installed.
        Failure: it is damaged, holds anything but plain files with plain names, is too large for the disk, or expands
            to more than its size allows.
    """
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("bundle", "zstandard", "reading a .tar.zst") from error
    try:
        with path.open("rb") as file:
            decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW)
            with decoder.stream_reader(file, read_across_frames=False) as plain:
                return _unpack(_Measured(plain), into, SLACK + RATIO * path.stat().st_size)
    except RequestError:
        raise
    except LightenError as error:
        raise Failure(f"{path} is not unpacked: {error}") from error
    except OSError as error:
        raise Failure(f"{path} cannot be unpacked: {error.strerror or error}") from error
    except Exception as error:  # of zstandard and tarfile, which raise many kinds for one damage
        raise Failure(f"{path} is damaged ({error}): make or fetch it again") from error


def _unpack(stream: _Measured, into: Path, room: int) -> Path:
    folder = ""
    count = total = 0
    with tarfile.open(fileobj=stream, mode="r|", bufsize=tarfile.RECORDSIZE) as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile keeps them all
            top, _, name = member.name.partition("/")
            if member.isdir() and NAME.fullmatch(top) and not name and folder in ("", top):
                continue
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
            if not plain:
                raise Failure(f"{member.name!r} in it is no plain file, but a link, a device or the like")
            if not NAME.fullmatch(top) or not NAME.fullmatch(name) or len(member.name) > 200:
                raise Failure(f"{member.name[:200]!r} in it is not DIRECTORY/FILE with plain names")
            if folder not in ("", top):
                raise Failure(f"it holds two directories, {folder} and {top}")
            folder = top
            count, total = count + 1, total + member.size
            if count > MOST:
                raise Failure(f"it holds more than {MOST:,} files")
            if total > room:
                raise Failure(f"its files have {total / 1e6:,.0f} MB, more than an archive of its size can hold")
            if member.size + SPARE > (free := shutil.disk_usage(into).free):
                raise Failure(f"{name} in it has {member.size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free here")
            _write(tar, member, stream, into / top / name)
    if not folder:
        raise Failure("there is nothing in it")
    return into / folder


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, stream: _Measured, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None
    stream.allowed = member.size + HEADERS
    try:
        with target.open("xb") as file:
            shutil.copyfileobj(content, file, BLOCK)
    except FileExistsError as error:
        raise Failure(f"{member.name!r} is twice in it") from error
    if target.stat().st_size != member.size:
        raise Failure(f"{member.name!r} in it is cut short: make or fetch it again")
    stream.allowed = HEADERS
