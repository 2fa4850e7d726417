"""Measuring a bundle on its device, through the system's own ssh.

    1. check: is there a Python, how much of the files is there already, how much space is left
    2. the model's files go through `cat >>` from where an earlier copy broke off, all other files as one tar
    3. the device hashes its files; bench.py runs there and its JSON lines come back
    4. the copy is removed

The copy lies in a directory named by the checksum of its files, so that a broken copy can be found again.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from lighten.data.reading import Refused, parse_json
from lighten.errors import Failure
from lighten.evaluate.remote import LINE, NO_ROOM, SHOWN, TALK, UNREACHABLE, Device, beginning, parse_target
from lighten.export.bundle.reading import Copy, opened, read_bundle
from lighten.results.results import Results
from lighten.screen import visible
from lighten.step import Report
from lighten.store.names import as_name

BLOCK = 1 << 20
TRIES = 5
"""Number of times that a broken copy is continued by itself, if it gets further each time."""
SPARE_BYTES = 20_000_000
SMALL = "files.tar"

# Every script begins with `d`, the directory of the copy, and `python`. What they say to us begins with "lighten".
_CHECK_ROOM = """
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1 || exit 71
mkdir -p "$d" && cd "$d" || exit 1
for f in $names; do [ -f "$f" ] && echo "lighten have $f $(($(wc -c < "$f")))"; done
echo "lighten free $(df -Pk . | awk 'NR == 2 {print $4}')"
"""
_APPEND = 'cd "$d" && cat >> "$f"'
_REPLACE = 'cd "$d" && cat > "$f"'
_HASH = """
cd "$d" && "$python" -c 'import hashlib, sys
for name in sys.argv[1:]:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    print("lighten sha256", name, digest.hexdigest())' $names
"""
_BENCH = 'cd "$d" && tar -xf files.tar && PYTHON=$python exec sh bench.sh --events $options'


def _values(printed: str, word: str, count: int) -> list[list[str]]:
    """Returns the words of the lines that begin with `word` and have `count` more words. Other lines are not ours."""
    lines = [line.split() for line in printed.splitlines() if line.startswith(f"lighten {word} ")]
    return [line[2:] for line in lines if len(line) == 2 + count]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def send(device: Device, copy: Copy, report: Report) -> None:
    """Copies a bundle to the device, going on where an earlier copy broke off.

    Raises:
        Failure: see `Device.trouble`. After a broken connection what arrived stays; after anything else nothing does.
    """
    best = -1
    for attempt in range(TRIES):
        time.sleep(attempt)
        arrived, code, errors = _send_once(device, copy, report)
        if not code:
            break
        if code != UNREACHABLE:
            device.drop()
            raise device.trouble("copying", code, errors)
        if arrived <= best or attempt == TRIES - 1:
            kept = "; what has arrived stays there, and the same command goes on from it" if best >= 0 else ""
            raise Failure(f"{device.trouble('copying', code, errors)}{kept}")
        best = arrived
    code, printed, errors = device.run(_HASH, names=" ".join([*copy.models, SMALL]))
    found = dict(_values(printed, "sha256", 2))
    if code == UNREACHABLE:
        raise device.trouble("checking the copy", code, errors)
    if found != {**copy.models, SMALL: hashlib.sha256(copy.small).hexdigest()}:
        device.drop()
        if code:
            raise device.trouble("checking the copy", code, errors)
        raise Failure(f"{device.address.name}: the copy is damaged and was removed: run the same command again")


def _send_once(device: Device, copy: Copy, report: Report) -> tuple[int, int, str]:
    """Returns the bytes of the model that are there (-1 if not known), and how the last script ended."""
    total = sum(map(copy.size, copy.models))
    code, printed, errors = device.run(_CHECK_ROOM, names=" ".join(copy.models))
    if code:
        return -1, code, errors
    sizes = {name: _number(size) for name, size in _values(printed, "have", 2)}
    # a size that cannot be: not ours, begin again
    claimed = {name: sizes.get(name) or 0 for name in copy.models}
    have = {name: size if size <= copy.size(name) else 0 for name, size in claimed.items()}
    arrived = sum(have.values())
    free = [size for (text,) in _values(printed, "free", 1) if (size := _number(text)) is not None]
    needed = total - arrived + len(copy.small) + SPARE_BYTES
    if free and free[0] * 1024 < needed:
        left = free[0] * 1024
        return arrived, NO_ROOM, f"{needed / 1e6:,.0f} MB are needed, {left / 1e6:,.0f} MB are free"
    code, _, errors = device.run(_REPLACE, lambda pipe: _pour(io.BytesIO(copy.small), pipe, report, 0, total), f=SMALL)
    if code:
        return arrived, code, errors
    for name in copy.models:
        begin = have.get(name, 0)
        if begin == copy.size(name) and begin:
            continue

        def feed(pipe: IO[bytes], name: str = name, begin: int = begin, arrived: int = arrived) -> None:
            with (copy.folder / name).open("rb") as file:
                file.seek(begin)
                _pour(file, pipe, report, arrived, total)

        code, _, errors = device.run(_APPEND if begin else _REPLACE, feed, f=name)
        if code:
            return arrived, code, errors
        arrived += copy.size(name) - begin
    return arrived, 0, ""


def _pour(file: IO[bytes], pipe: IO[bytes], report: Report, done: int, total: int) -> None:
    while block := file.read(BLOCK):
        pipe.write(block)
        done += len(block)
        report(done, total, f"copying, {done / 1e6:.0f} of {total / 1e6:.0f} MB")


def bench(device: Device, options: Sequence[str], report: Report, name: str) -> dict[str, Any]:
    """Runs bench.py on a copy and returns its checked results. `name` is the name of its row.

    Raises:
        Failure: it failed, or what came back is not results.
    """
    process = device.start(_BENCH, options=" ".join(options))
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda pipe: errors.append(beginning(pipe)), args=(process.stderr,))
    reader.start()
    found: Any = None
    said = 0
    try:
        while line := process.stdout.readline(LINE + 1):
            said += len(line)
            if len(line) > LINE or said > TALK:
                raise Failure(f"{device.address.name} says more than bench.py does: does something else answer?")
            event = _event(line)
            if (progress := _progress(event)) is not None:
                report(*progress)
            found = event.get("results", found)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        reader.join()
        process.stdout.close()
        process.stderr.close()
    if code or found is None:
        raise device.trouble("bench.py", code, errors[0].decode(errors="replace"))
    return _results(found, name, device.address.name)


def _event(line: bytes) -> dict[str, Any]:
    """Returns the event on a line of bench.py; None for other lines, which a shell's start-up files may print."""
    try:
        event = parse_json(line)
    except Refused:
        return {}
    return event if isinstance(event, dict) else {}


def _progress(event: dict[str, Any]) -> tuple[int, int, str] | None:
    given = event.get("progress")
    if not isinstance(given, list) or len(given) != 3 or not all(type(each) is int for each in given[:2]):
        return None
    done, total, note = given
    return (done, total, visible(str(note)[:SHOWN])) if 0 <= done <= total < 1 << 31 else None


def _results(found: Any, name: str, device: str) -> dict[str, Any]:
    """Returns the results that a device sent, checked.

    Raises:
        Failure: they are none, or not of one model.
    """
    try:
        results = Results.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:SHOWN]
        raise Failure(f"{device} sent results that cannot be read: {visible(where)}: {first['msg'][:SHOWN]}") from error
    if len(results.variants) != 1 or results.variants[0].elsewhere:
        raise Failure(f"{device} sent results of {len(results.variants)} models, and one was measured")
    row = results.variants[0].model_copy(update={"name": name})
    return results.model_copy(update={"variants": [row]}).model_dump(mode="json")


def measure_there(
    paths: Sequence[str], target: str, report: Report, *, python: str = "python3", perplexity: bool = True
) -> dict[str, Any]:
    """Measures bundles on a device; returns the contents of a results.json with a row for each.

    Args:
        paths: directories or archives of bundles.
        target: ssh://user@host[:port].
        report: called with the progress of copying and measuring.
        python: the interpreter there.
        perplexity: whether to take the perplexity of the bundle's text.

    Raises:
        RequestError: a path that is no bundle, a wrong address.
        Failure: the device cannot be reached or used; nothing is left there but a copy that a broken connection cut. Of
            several bundles one that fails is a row that says why.
    """
    address = parse_target(target)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for path in paths:
        try:
            with opened(Path(path)) as folder:
                copy = read_bundle(folder)
                device = Device(address, copy.key, python)
                send(device, copy, report)
                try:
                    options = [] if perplexity else ["--chunks", "0"]
                    found.append(bench(device, options, report, as_name(copy.facts.name)))
                    found[-1]["variants"][0]["notes"] += copy.notes
                finally:
                    device.drop()
        except Failure as error:
            if len(paths) == 1:
                raise
            failed.append(
                {"name": as_name(Path(path).name), "status": "failed", "error": str(error), "path": str(path)}
            )
        else:
            found[-1]["variants"][0]["path"] = str(path)
    if not found:
        raise Failure("; ".join(f"{row['path']}: {row['error']}" for row in failed))
    merged = found[0]
    for row in [*(each["variants"][0] for each in found[1:]), *failed]:
        taken = {row["name"] for row in merged["variants"]}
        row["name"] = next(
            name for name in (row["name"], *(f"{row['name']}-{n}" for n in range(2, 1000))) if name not in taken
        )
        merged["variants"].append(row)
    return merged | {"recipe": "evaluate"}
