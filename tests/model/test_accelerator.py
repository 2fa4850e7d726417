"""Which device is used: asked, not believed."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lighten.errors import RequestError
from lighten.evaluate.speed.energy import GpuCounters
from lighten.model import accelerator
from lighten.model.accelerator import CPU, Device, resolve
from lighten.process.isolate import Outcome, _explain
from lighten.step import silent


def test_a_processor_is_a_processor_without_asking() -> None:
    assert resolve("cpu", gpus=True) == CPU
    assert resolve("auto", gpus=False) == CPU


def test_auto_believes_torch_and_not_the_driver() -> None:
    if accelerator.survey({}, silent)["devices"]:
        pytest.skip("torch can use a GPU here")
    found = resolve("auto", gpus=True)
    assert found.name == "cpu"
    assert found.note and "torch" in found.note and "the CPU is used" in found.note


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_torch_cannot_use_is_refused(name: str) -> None:
    if accelerator.survey({}, silent)["devices"]:
        pytest.skip("torch can use a GPU here")
    with pytest.raises(RequestError, match=r"built for CPUs only|sees no GPU"):
        resolve(name, gpus=True)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "", "cpu:0"])
def test_other_names_mean_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=r"auto, cpu, cuda or cuda:N"):
        resolve(name, gpus=True)


def test_a_number_beyond_the_last_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"title": "A", "total_bytes": 10}, {"title": "B", "total_bytes": 20}]
    answer = Outcome({"devices": devices, "reason": None}, 0.0, 0)
    monkeypatch.setattr(accelerator, "run_isolated", lambda *_: answer)
    assert resolve("cuda:1", gpus=True) == Device("cuda:1", "B", 20)
    assert resolve("auto", gpus=True) == Device("cuda", "A", 10)
    with pytest.raises(RequestError, match="the last one is cuda:1"):
        resolve("cuda:2", gpus=True)


def test_what_a_device_adds_to_a_key() -> None:
    assert CPU.key() == {}
    assert Device("cuda:1").key() == Device("cuda").key() == {"device": "cuda"}


def test_room() -> None:
    assert CPU.holds(1e15)
    assert Device("cuda", "A", 100).holds(80) and not Device("cuda", "A", 100).holds(95)


def test_a_full_gpu_is_one_message() -> None:
    told = _explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"))
    assert told["error"].startswith("the memory of the GPU does not suffice (CUDA out of memory)")
    assert "Traceback" not in told["error"]


def test_counters_are_those_of_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def answer(name: str, found: object, device: str) -> object:
        asked.append((name, device))
        return found

    answers = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 5,
        "memory_reserved": 4,
        "memory_allocated": 1,
        "mem_get_info": (10, 20),
    }
    for name, found in answers.items():
        monkeypatch.setattr(torch.cuda, name, partial(answer, name, found))
    for device in ("cpu", "cuda:1"):
        accelerator.synchronize(device)
        accelerator.reset_peak(device)
        assert accelerator.peak_bytes(device) == (None if device == "cpu" else 5)
        assert accelerator.free_bytes(device) == (None if device == "cpu" else 13)
    assert sorted(asked) == sorted((name, "cuda:1") for name in answers)


def test_energy_is_that_of_the_card_whatever_its_number_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES hides cards from torch, and not from the driver: only their identity is the same to both."""
    pynvml = pytest.importorskip("pynvml")
    cards = {"cuda:0": SimpleNamespace(uuid="a"), "cuda:1": SimpleNamespace(uuid="b")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-a": 100, "GPU-b": 200}[uuid])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: handle)
    found = GpuCounters("cuda:1")
    assert found and found.read() == [200] and "cuda:1" in found.note


def test_training_on_a_gpu_is_asked_to_be_the_same_every_time() -> None:
    script = (
        "import os, torch; from lighten.model.accelerator import deterministic as ask;"
        "told = lambda: (torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'));"
        "ask('cpu'); print(*told()); ask('cuda:1'); print(*told())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None", "True", ":4096:8"]
