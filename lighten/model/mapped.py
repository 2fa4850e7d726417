"""Weights in a mapped file. Their pages count as memory of the process until they are given back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable

from torch import Tensor

_FILES = "/proc/self/smaps"


class Mapped:
    """The private mappings of files that some tensors lie in and that were never written to.

    A page of such a mapping can be given back. The next read of it reads the same bytes from the file again, usually
    from the system's cache. If a tensor is written to afterwards, what was written may be lost.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Finds the mappings. There are none if the system does not list them (Linux does)."""
        places = sorted(each.data_ptr() for each in tensors if each.device.type == "cpu")
        self._ranges = [(start, end) for start, end in _unwritten() if _any_within(places, start, end)]
        self._advise = ctypes.CDLL(None).madvise if self._ranges else None

    def give_back(self, tensor: Tensor) -> None:
        """Gives back the whole pages of a contiguous tensor, if it lies in one of the mappings."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not tensor.is_contiguous() or self._advise is None:
            return
        if not any(start <= first and last <= end for start, end in self._ranges):
            return
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _any_within(places: list[int], start: int, end: int) -> bool:
    return bisect_right(places, end - 1) > bisect_right(places, start - 1)


def _unwritten() -> list[tuple[int, int]]:
    """Returns start and end of the mappings of files in which this process has written no page."""
    if sys.platform != "linux":
        return []
    found = []
    place, file, own = (0, 0), False, ""
    try:
        with open(_FILES, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, *rest = line.split()
                if not name.endswith(":"):  # address, rights, offset, device, inode, path
                    start, end = (int(each, 16) for each in name.split("-"))
                    place, file = (start, end), len(rest) > 4 and rest[3] != "0" and rest[4].startswith("/")
                elif name == "Anonymous:":
                    own = rest[0]
                elif name == "Swap:" and file and own == rest[0] == "0":
                    found.append(place)
    except OSError:
        return []
    return found
