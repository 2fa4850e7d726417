"""Every method on a device that refuses to meet tensors of the processor: the same bytes as without it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.distill.settings import Distill
from lighten.compress.prune.settings import Prune
from lighten.model import accelerator, stream
from lighten.pipeline.steps import open_step
from lighten.step import Context, Step
from lighten.store.artifact import Artifact
from tests import pretend

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QUANTIZE: tuple[dict[str, Any], ...] = (
    {"method": "gptq", "bits": 4, "group_size": 32},
    {"method": "gptq", "bits": 3, "group_size": 32, "desc_act": True, "sym": False},
    {"method": "gptq", "budget": "bits=4.5", "group_size": 32},
    {"method": "awq", "group_size": 32},
    {"method": "rtn", "bits": 4, "group_size": 32},
    {"method": "rtn", "bits": 4, "group_size": 32, "head": 8},
    {"method": "w8a8"},
    {"method": "int8-dynamic"},
    {"method": "int8"},
    {"method": "fp8"},
    {"method": "nvfp4"},
    {"method": "mxfp4"},
)
PRUNE: tuple[dict[str, Any], ...] = (
    {"what": "mlp", "ratio": 0.25, "multiple": 32},
    {"what": "heads", "count": 1},
    {"what": "heads", "count": 1, "score": "taylor"},
    {"target": "ratio=0.1"},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.5, "scope": "global"},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "sparsegpt", "sparsity": 0.5},
)
DISTILL: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 0, "beta": 0.1},
    {"level": "sequence", "written": 4},
    {"quantize": {"bits": 4, "group_size": 32}},
    {"movement": {"sparsity": 0.5}},
    {"lora": 4},
)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields the pretended device; in float32 and with attention's plain kernel, both compute the same bits."""
    monkeypatch.setitem(stream.BATCH_TOKENS, pretend.NAME, stream.BATCH_TOKENS["cpu"])
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    with pretend.device() as name, sdpa_kernel(SDPBackend.MATH):
        yield name


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path]) -> Artifact:
    return Artifact(tiny("llama", dtype=torch.bfloat16, **SHAPE), {"key": "x", "format": "hf"})


@pytest.fixture(scope="module")
def swept(source: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the processor leaves: Grams and sensitivities."""
    made = {"grams": tmp_path_factory.mktemp("grams"), "sensitivity": tmp_path_factory.mktemp("sensitivity")}
    Sweep(samples=8, length=64).run(source, made["grams"], Context())
    Sensitivities(samples=8, length=64).run(source, made["sensitivity"], Context())
    return made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a directory."""
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def alike(first: Path, second: Path) -> None:
    """Checks that two directories hold the same tensors, to the last bit."""
    ours, theirs = tensors(first), tensors(second)
    assert ours and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def both(step: Step, source: Artifact, tmp_path: Path, there: str, **inputs: Any) -> None:
    """Runs a step on the processor and on the device, and compares what it wrote."""
    for device in ("cpu", there):
        out = tmp_path / device
        out.mkdir()
        if "scratch" in inputs:
            inputs["scratch"] = tmp_path / f"scratch-{device}"
            inputs["scratch"].mkdir()
        before = pretend.COUNTS["operations"]
        step.run(source, out, Context(device=device, **inputs))
        assert (pretend.COUNTS["operations"] > before) == (device == there)
    alike(tmp_path / "cpu", tmp_path / there)


def test_two_devices_refuse_to_meet(there: str) -> None:
    here = torch.ones(2)
    with pytest.raises(RuntimeError, match="two devices"):
        here.to(there) + here
    assert float((here.to(there) + 1).sum()) == 4.0


@pytest.mark.parametrize("step", [Sweep(samples=8, length=64), Sensitivities(samples=8, length=64)])
def test_a_sweep(step: Step, source: Artifact, there: str, tmp_path: Path) -> None:
    both(step, source, tmp_path, there)


@pytest.mark.parametrize("settings", QUANTIZE, ids=lambda each: "-".join(map(str, each.values())))
def test_quantize(
    settings: dict[str, Any], source: Artifact, swept: dict[str, Path], there: str, tmp_path: Path
) -> None:
    both(open_step("quantize", settings), source, tmp_path, there, **swept)


@pytest.mark.parametrize("settings", PRUNE, ids=lambda each: "-".join(map(str, each.values())))
def test_prune(settings: dict[str, Any], source: Artifact, swept: dict[str, Path], there: str, tmp_path: Path) -> None:
    both(Prune.model_validate(settings), source, tmp_path, there, **swept)


@pytest.mark.parametrize("what", ["mlp", "heads"])
def test_a_repair_factorises_once_in_every_layer_and_on_the_device(
    what: str, source: Artifact, swept: dict[str, Path], there: str, tmp_path: Path
) -> None:
    """What goes is chosen by energy here, which factorises nothing."""
    step = Prune.model_validate({"what": what, "ratio": 0.5, "score": "energy"})
    both(step, source, tmp_path, there, **swept)
    assert pretend.COUNTS["aten::linalg_cholesky_ex"] == SHAPE["num_hidden_layers"]


def test_gptq_of_a_pruned_model(source: Artifact, swept: dict[str, Path], there: str, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    Prune.model_validate({"method": "sparsegpt", "pattern": "2:4"}).run(source, sparse, Context(**swept))
    both(open_step("quantize", QUANTIZE[0]), Artifact(sparse, {"format": "hf"}), tmp_path, there, **swept)


@pytest.mark.parametrize("settings", DISTILL, ids=lambda each: "-".join(each) or "plain")
def test_distill(
    settings: dict[str, Any], source: Artifact, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(accelerator, "deterministic", asked.append)
    quick = {"length": 32, "samples": 12, "batch": 4, "steps": 3, "top_k": 8, "precision": "fp32", "lr": 1e-3}
    step = Distill.model_validate({**quick, **settings})
    for device in ("cpu", there):
        folder = tmp_path / f"lessons-{device}"
        folder.mkdir()
        step.lessons().run(source, folder, Context(device=device))
    lessons = tmp_path / "lessons-cpu"
    alike(lessons, tmp_path / f"lessons-{there}")
    both(step, source, tmp_path, there, teacher=source.path, lessons=lessons, scratch=tmp_path)
    assert asked == ["cpu", there] * 2  # the teacher and the training, each of them
