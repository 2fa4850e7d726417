"""Memory of the trials on a layer with the sizes of DeepSeek-V3: 256 experts of 2,048 by 7,168.

    python -m benchmarks.trial_memory folds|channels OUT.json

The checkpoint has the names and the shapes of all tensors of one layer, and no numbers: its file is a hole.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from lighten.model import blockwise, channels
from lighten.model.checkpoint import Checkpoint


def write(folder: Path) -> None:
    """Writes the config of one layer with experts, and a file whose header has its tensors."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(num_hidden_layers=1, first_k_dense_replace=0, vocab_size=1024)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    experts = "model.layers.0.mlp.experts"
    number, both, width = shapes.pop(f"{experts}.gate_up_proj")
    del shapes[f"{experts}.down_proj"]
    for expert in range(number):
        shapes |= {f"{experts}.{expert}.{part}_proj.weight": (both // 2, width) for part in ("gate", "up")}
        shapes[f"{experts}.{expert}.down_proj.weight"] = (width, both // 2)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _peak() -> int:
    """Returns the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs the trials and writes what they took."""
    what, out = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        checkpoint = Checkpoint(Path(folder))
        anatomy = blockwise.known_anatomy(checkpoint, None)
        before, start = _peak(), time.perf_counter()
        if what == "folds":
            found = len(blockwise.known_folds(checkpoint, anatomy)[0])
        else:
            (kind,) = channels.prunable_of(checkpoint, anatomy)
            found = sum(each is not None for each in (kind.mlp, kind.heads))
        row = {
            "what": what,
            "found": found,
            "seconds": round(time.perf_counter() - start, 1),
            "layer_bytes_float32": 4 * anatomy.covered,
            "peak_bytes": _peak(),
            "peak_bytes_before": before,
        }
    out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
