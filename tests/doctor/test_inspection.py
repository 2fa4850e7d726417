"""What a model consists of, against transformers' own count of its weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lighten.doctor.inspection import inspect
from lighten.doctor.inspection_text import percent, runs, show
from lighten.errors import RequestError
from lighten.pipeline.steps import open_step
from lighten.screen import console
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.command import lighten
from tests.families.models import make


@pytest.fixture(scope="module", params=["qwen3_5_text", "granitemoehybrid", "falcon"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def test_every_weight_is_told_of_once(family: Path) -> None:
    found = inspect(str(family))
    stored = {}
    for file in family.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            stored |= {name: math.prod(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    assert found["params"] == sum(stored.values()) == sum(part["params"] for part in found["parts"])
    assert sum(part["tensors"] for part in found["parts"]) == len(stored)
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert sorted(number for kind in found["kinds"] for number in kind["layers"]) == [0, 1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(family)
    assert {kind["class"] for kind in found["kinds"]} == {type(layer).__name__ for layer in _layers(model)}
    first = found["parts"][0]
    linears = {f"{name}.weight" for name, each in model.named_modules() if type(each).__name__.endswith("Linear")}
    assert first["what"] == "linears" and first["tensors"] <= len(linears)
    assert all((part["what"] == "stays") == (part["why"] is not None) for part in found["parts"])
    assert (found["experts"] is not None) == any("experts" in name or "block_sparse_moe" in name for name in stored)


def _layers(model: object) -> list[object]:
    body = model.base_model  # type: ignore[attr-defined]
    return list(getattr(body, "layers", None) or body.h)


def test_a_method_covers_what_it_then_covers(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    make("qwen3", folder)
    told = {each["method"]: each for each in inspect(str(folder))["methods"]}
    assert told["rtn"]["group_size"] == 32  # 64 does not divide 96
    (out := tmp_path / "out").mkdir()
    step = open_step("quantize", {"method": "rtn", "group_size": 32})
    facts = step.run(Artifact(folder, {"key": "x", "format": "hf"}), out, Context())
    assert facts["coverage"] == pytest.approx(told["rtn"]["covers"], abs=1e-4)
    quantized = inspect(str(out))
    assert quantized["methods"] == [] and quantized["quantized"]["linears"] == facts["quantized_linears"]
    assert quantized["quantized"]["covers"] == pytest.approx(facts["coverage"], abs=1e-4)
    assert quantized["quantized"]["bits"] == 4 and quantized["params"] == inspect(str(folder))["params"]
    shown = _text(quantized)
    assert "quantized already (gptq, bits 4, group_size 32" in shown and "that it was made from" in shown


def test_a_gguf_file_by_the_types_of_its_tensors(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = tiny()
    (out := tmp_path / "out").mkdir()
    open_step("export", {"format": "gguf", "type": "F16"}).run(
        Artifact(source, {"key": "x", "format": "hf"}), out, Context()
    )
    (file,) = out.glob("*.gguf")
    found = inspect(str(file))
    assert {each["type"] for each in found["types"]} == {"F16", "F32"} and found["source"]
    assert sum(each["params"] for each in found["types"]) == inspect(str(source))["params"]
    assert "The file can be a source" in _text(found)


def test_what_is_no_model_with_layers_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such model here"):
        inspect(str(tmp_path / "nothing"))


def test_the_command(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny()
    assert json.loads(lighten("inspect", folder, "--json", cwd=tmp_path).stdout) == inspect(str(folder))
    done = lighten("inspect", folder, cwd=tmp_path)
    assert done.returncode == 0 and "quantize gptq, rtn, awq" in done.stdout and "stay: " in done.stdout


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0, 1, 2], "0–2"), ([0, 2, 4], "every 2nd from 0 to 4"), ([3], "3"), ([0, 1, 4], "0–1, 4"), ([], "")],
)
def test_layers_in_words(numbers: list[int], text: str) -> None:
    assert runs(numbers) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (1.0, "100%"), (0.5, "50.0%"), (0.9999, "99.990%"), (0.0002, "0.020%")]
)
def test_shares_in_words(share: float, text: str) -> None:
    assert percent(share) == text


def _text(found: dict[str, object]) -> str:
    screen = console(width=240, record=True, force_terminal=False, quiet=False)
    screen.print(show(found))
    return screen.export_text()
