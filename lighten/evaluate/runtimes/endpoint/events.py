"""Server-sent events, read from bytes that may be cut anywhere (WHATWG HTML, section 9.2)."""

from __future__ import annotations

DONE = "[DONE]"
"""Data of the event that ends a stream in OpenAI's API."""
_MARK = b"\xef\xbb\xbf"


class Events:
    """Collects the bytes of a stream, and gives the data of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._begun = False

    def feed(self, more: bytes) -> list[str]:
        """Returns the data of the events that these bytes complete, in order."""
        self._rest += more
        if not self._begun:
            if len(self._rest) < len(_MARK) and _MARK.startswith(self._rest):
                return []  # perhaps half of a byte order mark
            self._rest, self._begun = self._rest.removeprefix(_MARK), True
        found: list[str] = []
        while (line := self._line()) is not None:
            found += self._take(line)
        return found

    def end(self) -> list[str]:
        """Returns the data of the last event, if the stream ended without the empty line that ends an event."""
        last, self._rest = self._rest.removesuffix(b"\r"), b""
        found = self._take(last) if last else []
        return found + self._take(b"")

    def _line(self) -> bytes | None:
        """Removes and returns the next line without its end; None if it is not complete yet."""
        ends = [place for place in (self._rest.find(b"\n"), self._rest.find(b"\r")) if place >= 0]
        if not ends:
            return None
        place = min(ends)
        if self._rest[place : place + 1] == b"\r" and place + 1 == len(self._rest):
            return None  # a "\n" of the same end may follow
        width = 2 if self._rest[place : place + 2] == b"\r\n" else 1
        line, self._rest = self._rest[:place], self._rest[place + width :]
        return line

    def _take(self, line: bytes) -> list[str]:
        if not line:
            data, self._data = self._data, []
            return ["\n".join(data)] if data else []
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode(errors="replace"))
        return []
