import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lighten.errors import RequestError
from lighten.model.mlx_source import is_mlx, quantization
from lighten.model.source import OF_MLX, find

Tiny = Callable[..., Path]


@pytest.fixture
def plain(tiny: Tiny, tmp_path: Path) -> Path:
    """A directory as mlx_lm writes it, nothing quantized."""
    folder = tmp_path / "plain"
    shutil.copytree(tiny(), folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "mlx"})
    return folder


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization": settings, "quantization_config": settings})
    )


def test_it_is_known_by_the_maker_of_its_files_or_its_widths(tiny: Tiny, plain: Path) -> None:
    assert is_mlx(plain) and not is_mlx(tiny()) and not is_mlx(plain / "config.json") and not is_mlx(plain / "none")
    save_file(load_file(plain / "model.safetensors"), plain / "model.safetensors", {"format": "pt"})
    assert not is_mlx(plain)
    quantized(plain)
    assert is_mlx(plain)
    assert quantization({"quantization": {"bits": 4, "group_size": 32}}) == {"bits": 4, "group_size": 32}
    assert (
        quantization({"quantization": {"bits": 4}})
        is quantization({"quantization": "int4"})
        is quantization({})
        is None
    )


def test_plain_weights_can_be_a_source_and_that_is_said(plain: Path) -> None:
    assert OF_MLX in find(str(plain)).notes


def test_packed_weights_are_no_source(plain: Path) -> None:
    quantized(plain)
    with pytest.raises(RequestError, match=r"measured .* but not changed: give the model that it was made from"):
        find(str(plain))


def test_what_leads_out_is_not_read(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    (plain / "model.safetensors").rename(other)
    (plain / "model.safetensors").symlink_to(other)
    with pytest.raises(RequestError, match="leads out of the directory"):
        is_mlx(plain)
