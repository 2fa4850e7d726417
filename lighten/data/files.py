"""Files of text: their format by content and suffix, and their records or their text.

A file beyond `LARGE` bytes is not read whole if fewer letters are enough. Then pieces that are spread evenly over it
are read.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lighten.data.documents import Document, Row, documents, listed
from lighten.data.reading import check_depth
from lighten.errors import Failure, RequestError, missing_extra

LARGE = 128 * 2**20
"""Bytes from which a file is read in pieces, if that is enough."""
PIECES = 256
LEAST = 16 * 2**20
"""Minimum number of letters that are read of a large file."""
LONGEST_LINE = 2**20
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings. UTF-32's come first, because UTF-16's mark is the beginning of one."""
OTHERS = {
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a ZIP archive (or an office document)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF",
    b"SQLite format 3": "a database",
    b"GGUF": "a model",
}
"""First bytes of files that are no text, and what they are."""
READ = ".txt, .md, .jsonl, .json, .csv, .tsv and .parquet are read"


def read(path: Path, field: str | None = None, letters: int | None = None) -> Iterator[Document]:
    """Yields the documents of a file: its records, or one document with the whole text.

    Args:
        path: the file.
        field: the field to read, for records with several fields.
        letters: the minimum number of letters that are needed; None for all of them.

    Raises:
        RequestError: the file does not exist, its format is not read, or its records have no known field.
        Failure: it is damaged, or not in its encoding.
    """
    head, size = _look(path)
    pieces = max(letters, LEAST) // PIECES if letters is not None and size > LARGE else None
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1"):
        return documents(_parquet(path, pieces), field, str(path))
    if suffix == ".parquet":
        raise Failure(f"{path} is no parquet file: it does not begin as one; fetch it again")
    if what := next((what for mark, what in OTHERS.items() if head.startswith(mark)), None):
        raise RequestError(f"{path} is {what}: unpack or convert it first; {READ}")
    if encoding == "utf-8" and b"\0" in head:
        raise RequestError(f"{path} is no text: {READ} (UTF-16 with its byte order mark)")
    if suffix in (".csv", ".tsv"):
        step = max(1, size // (pieces * PIECES)) if pieces else 1
        return documents(_csv(path, encoding, suffix, step), field, str(path))
    if suffix in (".jsonl", ".ndjson", ".json") or (suffix not in (".txt", ".md") and _is_json(head, encoding)):
        if pieces and encoding.startswith("utf-8") and suffix != ".json":
            return documents(_records(_pieces(path, pieces, None)), field, str(path))
        return documents(_json(path, _decoded(path, encoding), suffix, size), field, str(path))
    if field:
        raise RequestError(f"{path} is plain text, which has no field {field!r}: leave out field")
    if pieces and encoding.startswith("utf-8"):
        return (text.removeprefix("\ufeff") for _, text in _pieces(path, pieces, LONGEST_LINE))
    return iter([_decoded(path, encoding)])


def rows(path: Path) -> Iterator[Row]:
    """Yields the records of a file of JSON, JSON lines, CSV or parquet. Raises the errors of `read`."""
    head, size = _look(path)
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1"):
        return _parquet(path, None)
    if what := next((what for mark, what in OTHERS.items() if head.startswith(mark)), None):
        raise RequestError(f"{path} is {what}: unpack or convert it first; {READ}")
    if suffix in (".csv", ".tsv"):
        return _csv(path, encoding, suffix, 1)
    return _json(path, _decoded(path, encoding), suffix, size)


def _look(path: Path) -> tuple[bytes, int]:
    """Returns the first bytes of a file and its size."""
    if path.is_dir():
        raise RequestError(f"{path} is a directory: name a file in it; {READ}")
    try:
        with path.open("rb") as file:
            return file.read(4096), path.stat().st_size
    except OSError as error:
        raise RequestError(f"cannot read the text {path}: {error.strerror}; check the path") from error


def _decoded(path: Path, encoding: str) -> str:
    """Returns the text of a file, with a line feed alone at the end of every line."""
    try:
        with path.open(encoding=encoding) as file:
            return file.read()
    except UnicodeError as error:
        raise _not(path, encoding, error) from error
    except OSError as error:
        raise RequestError(f"cannot read the text {path}: {error.strerror}; check the path") from error


def _not(path: Path, encoding: str, error: UnicodeError) -> Failure:
    at = f" (byte {error.start + 1})" if isinstance(error, UnicodeDecodeError) else ""
    named = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
    return Failure(f"{path} is not {named} text{at}: save it as UTF-8 ({error})")


def _is_json(head: bytes, encoding: str) -> bool:
    """Returns whether a file begins like JSON: an object with a name, or a list of objects, lists or texts."""
    start = head.decode(encoding, errors="ignore").split(None, 1)
    opening = "".join("".join(start).split())[:2]
    return opening in ('{"', "{}", "[{", '["', "[[", "[]")


def _json(path: Path, text: str, suffix: str, size: int) -> Iterator[Row]:
    """Yields the records of JSON lines, or of one JSON value: a list, or an object that holds one list."""
    if suffix not in (".jsonl", ".ndjson"):
        if size > LARGE:
            raise RequestError(
                f"{path} is one JSON value of {size / 1e6:,.0f} MB, which would have to be read at once: save it as "
                "JSON lines (.jsonl), one object a line"
            )
        try:
            return _of_value(path, value_of(text))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise Failure(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        except ValueError as error:
            raise Failure(f"{path} cannot be read: {error}") from error
    return _records((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))


def value_of(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: no JSON, nested too deep, numbers of too many digits, or half of a character.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_depth(value)
    if "\\ud" in text or "\\uD" in text:  # characters beyond 16 bits are written as two halves
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds half of a character, {error.object[error.start]!a}") from error
    return value


def _of_value(path: Path, value: Any) -> Iterator[Row]:
    if isinstance(value, dict):
        lists = {name: each for name, each in value.items() if isinstance(each, list) and each}
        tables = {name: each for name, each in lists.items() if all(isinstance(row, dict) for row in each)}
        if len(tables) == 1 and not {"messages", "conversations", "conversation"} & set(tables):
            (value,) = tables.values()
        else:
            value = [value]
    if not isinstance(value, list):
        raise RequestError(f"{path} is no list of records: give [{{…}}, …], or one JSON object a line (.jsonl)")
    return (Row(f"{path}: record {number}", each) for number, each in enumerate(value, 1))


def _records(lines: Iterator[tuple[str, str]]) -> Iterator[Row]:
    """Yields the JSON value of every line that is not empty, with its place."""
    for place, line in lines:
        if line.strip():
            try:
                yield Row(place, value_of(line))
            except ValueError as error:
                raise Failure(f"{place}: expected one JSON object a line ({error})") from error


def _pieces(path: Path, letters: int, longest: int | None) -> Iterator[tuple[str, str]]:
    """Yields whole lines, with their places, from pieces spread over a large file in UTF-8.

    Each piece ends when it has its letters. `longest` cuts lines that are longer than a piece should be; None keeps
    them whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(PIECES):
            start, end = size * number // PIECES, size * (number + 1) // PIECES
            file.seek(start)
            if start:
                file.readline(longest or -1)  # began in the piece before
            taken = 0
            while taken < letters and file.tell() < end and (line := file.readline(longest or -1)):
                place = f"{path}, byte {file.tell() - len(line) + 1}"
                taken += len(line)
                try:
                    yield place, line.decode("utf-8", errors="ignore" if longest else "strict").replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    raise _not(path, "utf-8", error) from error


def _csv(path: Path, encoding: str, suffix: str, step: int) -> Iterator[Row]:
    """Yields every `step`-th record of a table with a header."""
    csv.field_size_limit(2**30)
    try:
        with path.open(encoding=encoding, newline="") as file:
            header = file.readline()
            file.seek(0)
            separator = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
            lines = csv.DictReader(file, delimiter=separator, strict=True)
            for number, row in enumerate(lines):
                if number % step:
                    continue
                if None in row or None in row.values():
                    raise Failure(
                        f"{path}:{lines.line_num}: other columns than the header's: {listed(lines.fieldnames or ())}"
                    )
                yield Row(f"{path}:{lines.line_num}", row)
    except csv.Error as error:
        raise Failure(f"{path}: not a table of comma-separated values: {error}") from error
    except UnicodeError as error:
        raise _not(path, encoding, error) from error


def _parquet(path: Path, letters: int | None) -> Iterator[Row]:
    """Yields the records of a parquet file; of a large file, those of row groups that are spread over it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_extra("eval", "pyarrow", f"the parquet file {path}") from error
    try:
        with ParquetFile(path) as file:
            groups = range(file.num_row_groups)
            step = max(1, len(groups) // PIECES) if letters else 1
            number = 0
            for group in groups[::step]:
                taken = 0
                for batch in file.iter_batches(64 if letters else 1024, row_groups=[group]):
                    if letters and taken >= letters * PIECES // len(groups[::step]):
                        break
                    taken += batch.nbytes
                    for row in batch.to_pylist():
                        number += 1
                        yield Row(f"{path}: record {number}", row)
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # texts and times that Python has not
        raise Failure(f"{path} is damaged ({str(error)[:200]}): fetch it again") from error
