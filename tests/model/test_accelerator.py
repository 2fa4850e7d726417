"""Which device is used: asked, not believed."""

import pytest

from lighten.errors import RequestError
from lighten.model import accelerator
from lighten.model.accelerator import CPU, Device, resolve
from lighten.process import Outcome, _explain
from lighten.stage import silent


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
    import torch

    told = _explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"))
    assert told["error"].startswith("the memory of the GPU does not suffice (CUDA out of memory)")
    assert "Traceback" not in told["error"]
