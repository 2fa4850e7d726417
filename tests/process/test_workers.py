"""Work shared out to processes: in order, the same for any number of them, and every end a clear one."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lighten.errors import Failure, RequestError
from lighten.process.isolate import run_isolated
from lighten.process.workers import crew, ordered

HERE = "tests.process.test_workers"


def late(index: int) -> list[int]:
    time.sleep(0.02 * (5 - index % 5))
    return [index, os.getpid()]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers: int, tmp_path: Path) -> None:
    def meet(index: int) -> list[int]:
        """Waits in every worker's first task until all workers are at work: one could do it all before the others."""
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < workers:
            time.sleep(0.01)
        return late(index)

    done: list[int] = []
    found = list(ordered(meet, 11, workers, done.append))
    assert [index for index, _ in found] == list(range(11))
    assert done == list(range(1, 12))
    pids = {pid for _, pid in found}
    assert len(pids) == workers
    assert (os.getpid() in pids) == (workers == 1)


def test_nothing_to_do() -> None:
    assert list(ordered(late, 0, 2)) == []


@pytest.mark.parametrize("error", [RequestError, Failure])
def test_errors_keep_their_kind(error: type[Exception]) -> None:
    def fail(index: int) -> int:
        if index == 3:
            raise error("the third")
        return index

    with pytest.raises(error, match="the third"):
        list(ordered(fail, 5, 2))


def test_a_killed_worker_is_one_message() -> None:
    def die(index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Failure, match=r"a worker crashed .*SIGKILL.*memory ran out"):
        list(ordered(die, 2, 2))


def test_workers_end_when_their_results_are_no_longer_wanted() -> None:
    results = ordered(late, 10_000, 2)
    pids = {next(results)[1] for _ in range(4)}
    results.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_the_crew_fits_the_machine() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert crew(30, 1, "cpu") == 4
        assert crew(3, 1, "cpu") == 3
        assert crew(30, 1, "cuda") == 1
        assert crew(30, 10**15, "cpu") == 1
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert crew(30, memory // 5, "cpu") == 2
    finally:
        torch.set_num_threads(before)


def quantized(payload, report):
    """Quantizes a model with some threads; returns the hash of what was written."""
    from lighten.compress.calibrate.sensitivity import Sensitivities
    from lighten.compress.calibrate.sweep import Sweep
    from lighten.pipeline.steps import open_step
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    torch.set_num_threads(payload["threads"])
    source, out = Artifact(Path(payload["source"]), {"key": "x", "format": "hf"}), Path(payload["out"])
    grams, sensitivity, quantized = (out / name for name in ("grams", "sensitivity", "quantized"))
    for folder in (out, grams, sensitivity, quantized):
        folder.mkdir()
    Sweep(samples=8, length=64).run(source, grams, Context())
    Sensitivities(samples=8, length=64, sequences=2).run(source, sensitivity, Context())
    threads = []
    context = Context(lambda *_: threads.append(torch.get_num_threads()), grams, sensitivity)
    open_step("quantize", payload["settings"]).run(source, quantized, context)
    return {
        "hash": hashlib.sha256((quantized / "model.safetensors").read_bytes()).hexdigest(),
        "files": sorted(file.name for file in quantized.iterdir()),
        "parent_threads": max(threads),
    }


@pytest.mark.parametrize("settings", [{}, {"method": "awq"}, {"budget": {"bits": 4}}, {"method": "w8a8"}])
def test_the_number_of_workers_does_not_change_a_byte(
    tiny: Callable[..., Path], tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if settings.get("method") != "w8a8":
        settings = {"group_size": 32, **settings}
    payload = {"source": str(tiny("llama", dtype=torch.bfloat16)), "settings": settings}
    found = [
        run_isolated(f"{HERE}:quantized", {**payload, "threads": threads, "out": str(tmp_path / str(threads))}).value
        for threads in (1, 2)
    ]
    assert found[0]["hash"] == found[1]["hash"]
    assert found[0]["files"] == found[1]["files"]
    assert not any(name.startswith(".") for name in found[1]["files"])
    assert [each["parent_threads"] for each in found] == [1, 1]
