"""Quantized checkpoints as lighten writes them, unpacked and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.compress.quantize import configs, formats
from lighten.compress.quantize.float_grid import Mxfp4Scales, Nvfp4Scales, rounded, usual
from lighten.compress.quantize.grid import Quantized
from lighten.errors import Failure, RequestError
from lighten.model.formats import EXTRAS, FORMATS
from lighten.model.unpacked import open_checkpoint
from lighten.pipeline.steps import open_step

Tiny = Callable[..., Path]


def grid(rows: int, columns: int, bits: int, group: int, sym: bool) -> Quantized:
    generator = torch.Generator().manual_seed(rows + bits)
    groups = columns // group
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator, dtype=torch.int32)
    scales = (torch.rand(groups, rows, generator=generator) + 0.1).half().float()
    zeros = torch.full((groups, rows), 2 ** (bits - 1), dtype=torch.int32)
    if not sym:
        zeros = torch.randint(1, 2**bits, (groups, rows), generator=generator, dtype=torch.int32)
    return Quantized(codes=codes, scales=scales, zeros=zeros, g_idx=torch.arange(columns) // group)


def stored(kind: str) -> tuple[formats.Stored, dict[str, Any]]:
    """Returns a linear `[96, 64]` in a format, and its configuration."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    match kind.split():
        case ["gptq", bits]:
            found = grid(96, 64, int(bits), 32, False)
            return formats.gptq(found, int(bits)), configs.gptq_config(int(bits), 32, False, False, 0.05)
        case ["awq"]:
            return formats.awq(grid(96, 64, 4, 32, False)), configs.awq_config(4, 32, [])
        case ["packed", bits, sym]:
            made = formats.pack_quantized(
                grid(96, 64, int(bits), 32, sym == "sym"), int(bits), sym == "sym", torch.float16
            )
            arguments = configs.integers(int(bits), 32, sym == "sym")
            return made, configs.compressed_config([(arguments, ["Linear"])], None, "pack-quantized", [])
        case ["int8"]:
            made = formats.int_quantized(grid(96, 64, 8, 64, True), torch.float16)
            arguments = configs.integers(8, -1, True)
            return made, configs.compressed_config([(arguments, ["Linear"])], None, "int-quantized", [])
        case ["fp8"]:
            made = formats.float_quantized(weight, torch.bfloat16)
            return made, configs.compressed_config([(configs.floats(), ["Linear"])], None, "float-quantized", [])
        case ["nvfp4" | "mxfp4" as method]:
            w = weight.t().contiguous()
            scales = Nvfp4Scales.of(weight) if method == "nvfp4" else Mxfp4Scales()
            made = formats.float_blocks(rounded(w, scales, usual(w, scales)))
            return made, open_step("quantize", {"method": method}).config({}, [])
        case ["bnb", "int8"]:
            return formats.bnb_8bit(weight), configs.bnb_8bit_config([])
        case ["bnb", name, double]:
            made = formats.bnb_4bit(weight, name, 64, double == "double")
            return made, configs.bnb_4bit_config(name, double == "double", [])
    raise AssertionError(kind)


KINDS = ["gptq 2", "gptq 3", "gptq 4", "gptq 8", "awq", "packed 4 sym", "packed 4 asym", "packed 8 sym", "int8", "fp8"]
KINDS += ["nvfp4", "mxfp4"]
KINDS += ["bnb nf4 double", "bnb nf4 single", "bnb fp4 double", "bnb int8"]
NAME = "model.layers.0.mlp.up_proj"


def checkpoint(folder: Path, kind: str, **settings: Any) -> tuple[Path, torch.Tensor]:
    made, config = stored(kind)
    tensors = {f"{NAME}.{part}": tensor.contiguous() for part, tensor in made.tensors.items()}
    tensors |= {f"{NAME}.bias": torch.ones(96), "model.norm.weight": torch.ones(64)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {**config, **settings}}))
    return folder, made.weight


@pytest.mark.parametrize("kind", KINDS)
def test_unpacks_what_the_formats_say(tmp_path: Path, kind: str) -> None:
    folder, expected = checkpoint(tmp_path, kind)
    opened = open_checkpoint(folder)
    assert torch.allclose(opened.tensor(f"{NAME}.weight"), expected, rtol=1e-6, atol=1e-7)
    assert opened.shapes() == {f"{NAME}.weight": (96, 64), f"{NAME}.bias": (96,), "model.norm.weight": (64,)}
    assert torch.equal(opened.tensor("model.norm.weight"), torch.ones(64))


def test_refuses_what_cannot_be_unpacked(tmp_path: Path) -> None:
    for kind, settings in (("awq", {"version": "gemv"}), ("gptq 4", {"quant_method": "hqq"})):
        with pytest.raises(RequestError, match="cannot be unpacked here"):
            open_checkpoint(checkpoint(tmp_path, kind, **settings)[0])


def test_names_a_linear_whose_parts_do_not_fit(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "gptq 4")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{NAME}.scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Failure, match=r"the parts of model\.layers\.0\.mlp\.up_proj do not fit together"):
        open_checkpoint(folder).tensor(f"{NAME}.weight")


def test_bits_that_differ_between_linears_are_read_from_the_words(tmp_path: Path) -> None:
    folder, expected = checkpoint(tmp_path, "gptq 8", bits=4)  # the configuration says 4, this linear has 8
    opened = open_checkpoint(folder)
    assert opened.shapes()[f"{NAME}.weight"] == (96, 64)
    assert torch.allclose(opened.tensor(f"{NAME}.weight"), expected)


def test_four_bits_stored_as_another_type(tmp_path: Path) -> None:
    folder, expected = checkpoint(tmp_path, "bnb nf4 double")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].flatten().view(torch.bfloat16)[:, None]
    save_file(tensors, folder / "model.safetensors")
    assert torch.allclose(open_checkpoint(folder).tensor(f"{NAME}.weight"), expected, rtol=1e-6, atol=1e-7)


def test_rotated_inputs_and_blocks_are_not_taken_for_plain(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "fp8", transform_config={"config_groups": {}, "x": 1})
    with pytest.raises(RequestError, match="inputs are rotated"):
        open_checkpoint(folder)
    (tmp_path / "blocks").mkdir()
    block = {"group_0": {"weights": {"strategy": "block"}, "format": "float-quantized"}}
    with pytest.raises(RequestError, match="scales of blocks"):
        open_checkpoint(checkpoint(tmp_path / "blocks", "fp8", config_groups=block)[0])


def test_every_format_says_what_reads_it(tmp_path: Path) -> None:
    assert set(FORMATS) == {"gptq", "awq", "bitsandbytes", "compressed-tensors"}
    for name, each in FORMATS.items():
        packed = each.unpacked({"quant_method": name, "bits": 4})
        assert packed.refusal() is None
        assert packed.linears(["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]) == []
        assert {EXTRAS[module] for module in each.loaded_with} == {each.extra}
        assert each.written_with == [] or {extra for _, extra in each.written_with} == {each.extra}


def test_awq_of_other_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"quantized with awq, which cannot be unpacked here \(8 bits\)"):
        open_checkpoint(checkpoint(tmp_path, "awq", bits=8)[0])


BROKEN: list[tuple[str, str, torch.Tensor, str]] = [
    ("nvfp4", "weight_scale", torch.full((96, 4), torch.nan).to(torch.float8_e4m3fn), "a scale is NaN"),
    ("nvfp4", "weight_global_scale", torch.tensor([torch.inf]), r"global scale is no positive number \(\[inf\]\)"),
    ("nvfp4", "weight_global_scale", torch.tensor([0.0]), "global scale is no positive number"),
    ("mxfp4", "weight_scale", torch.full((96, 2), 255, dtype=torch.uint8), r"a scale is NaN \(exponent 255\)"),
    ("mxfp4", "weight_scale", torch.full((96, 2), 254, dtype=torch.uint8), "a weight is infinite"),
]


@pytest.mark.parametrize(("kind", "part", "value", "words"), BROKEN)
def test_four_bit_floats_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, kind: str, part: str, value: torch.Tensor, words: str
) -> None:
    folder, _ = checkpoint(tmp_path, kind)
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{NAME}.{part}"].shape == value.shape
    save_file({**tensors, f"{NAME}.{part}": value}, folder / "model.safetensors")
    with pytest.raises(Failure, match=rf"model\.layers\.0\.mlp\.up_proj cannot be unpacked, for .*{words}"):
        open_checkpoint(folder).tensor(f"{NAME}.weight")


def test_other_blocks_of_four_bit_floats_are_refused(tmp_path: Path) -> None:
    for number, (kind, changed, words) in enumerate(
        (
            ("nvfp4", {"group_size": 32}, "format nvfp4-pack-quantized in blocks of 32"),
            ("mxfp4", {"symmetric": False}, "format mxfp4-pack-quantized with zero points"),
            ("mxfp4", {"strategy": "tensor_group"}, "scales of blocks"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        _, config = stored(kind)
        weights = config["config_groups"]["group_0"]["weights"] | changed
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        with pytest.raises(RequestError, match=words):
            open_checkpoint(checkpoint(tmp_path / str(number), kind, config_groups=groups)[0])
