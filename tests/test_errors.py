"""A disk that is full, however it is told; and the name that a person meant."""

import errno
import os

import pytest

from lighten.errors import DiskFull, Failure, disk_full, nearest
from lighten.process.isolate import run_isolated


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_recognised_by_number_by_text_and_behind_other_errors(code: int) -> None:
    told = OSError(code, os.strerror(code), "file")
    behind = Failure("cannot write the report")
    behind.__cause__ = told
    for error in (told, behind, RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})")):
        full = disk_full(error)
        assert full and "free some space" in str(full)
        assert disk_full(full) is full
    assert disk_full(OSError(errno.EIO, "Input/output error")) is None
    assert disk_full(None) is None


def write_too_much(payload: dict, report: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_in_another_process_stays_one() -> None:
    with pytest.raises(DiskFull, match="free some space"):
        run_isolated("tests.test_errors:write_too_much", {})


def test_the_nearest_name_is_offered_only_if_it_is_near() -> None:
    assert nearest("tokns", ["tokens", "seed"]) == ["tokens"]
    assert nearest("q9", ["baseline", "q8"]) == ["q8"]
    assert nearest("flsh", ["seed", "length"]) == []
    assert nearest("mmlu_algebra", ["mmlu", "mmlu_abstract_algebra", "piqa"], 3) == ["mmlu_abstract_algebra", "mmlu"]
