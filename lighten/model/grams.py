"""Gram matrices on disk, which the sweep writes and every method reads.

There is one safetensors file per decoder layer. For each distinct input of the layer's linears it holds the upper block
rows of H = XᵀX in float32, and the largest |x| of every channel. `grams.json` says which linear reads which input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lighten.errors import Failure

IDS = "ids.safetensors"
BLOCK = 256
"""Number of rows of a block row of the stored triangle."""


@dataclass
class Gram:
    """Second moments of the inputs of one or more linears.

    `blocks` is flat: the block rows `H[i : i + BLOCK, i:]` one after the other. `absmax` is `[in]`.
    """

    width: int
    blocks: torch.Tensor
    absmax: torch.Tensor
    tokens: int = 0

    @staticmethod
    def empty(width: int, device: str) -> Gram:
        """Returns a Gram of no tokens."""
        size = sum((min(BLOCK, width - start)) * (width - start) for start in range(0, width, BLOCK))
        return Gram(width, torch.zeros(size, device=device), torch.zeros(width, device=device))

    def to(self, device: str) -> Gram:
        """Returns the Gram on a device. The packed triangle is copied, not the square."""
        return Gram(self.width, self.blocks.to(device), self.absmax.to(device), self.tokens)

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the first row of every block row and a view of it, `[rows, width - first]`."""
        offset = 0
        for start in range(0, self.width, BLOCK):
            shape = (min(BLOCK, self.width - start), self.width - start)
            yield start, self.blocks[offset : offset + shape[0] * shape[1]].view(shape)
            offset += shape[0] * shape[1]

    def matrix(self) -> torch.Tensor:
        """Returns H, `[in, in]`, float32."""
        full = torch.empty(self.width, self.width, device=self.blocks.device)
        for start, block in self.rows():
            stop = start + block.shape[0]
            full[start:stop, start:] = block
            full[start:, start:stop] = block.t()
            square = full[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).t())
        return full

    def diagonal(self) -> torch.Tensor:
        """Returns diag(H), `[in]`: the sum of x² of every channel."""
        return torch.cat([block[:, : block.shape[0]].diagonal() for _, block in self.rows()])


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


class GramWriter:
    """Writes one layer's Grams after the other, then the index."""

    def __init__(self, folder: Path, prefixes: Sequence[str], facts: dict[str, Any]) -> None:
        """Opens a writer. `prefixes` are the beginnings of the names of every layer's weights: "model.layers.0."."""
        self.folder, self._prefixes = folder, prefixes
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self.index: dict[str, Any] = {"layers": [], **facts}

    def __len__(self) -> int:
        return len(self.index["layers"])

    def add(self, grams: dict[str, Gram], inputs: dict[str, str]) -> None:
        """Writes the next layer: Grams by the name of their input, and the input that each linear reads.

        A layer from a GPU is written while the next layer is computed. Only one layer is being written at a time.
        """
        layer = len(self)
        tensors = {}
        for name, gram in grams.items():
            tensors[f"{name}.gram"] = gram.blocks.cpu()
            tensors[f"{name}.absmax"] = gram.absmax.cpu()
        beside = any(gram.blocks.device.type != "cpu" for gram in grams.values())
        self._wait()
        if beside:
            self._written = self._writer.submit(save_file, tensors, _file(self.folder, layer))
        elif tensors:
            save_file(tensors, _file(self.folder, layer))
        tokens = {name: gram.tokens for name, gram in grams.items()}
        self.index["layers"].append({"prefix": self._prefixes[layer], "inputs": inputs, "tokens": tokens})

    def add_expert(self, expert: int, tokens: int, grams: dict[str, Gram], inputs: dict[str, str]) -> None:
        """Writes an expert of the layer that was added last, into a file of its own.

        Args:
            expert: its number.
            tokens: number of tokens that the router sent to it. Its Grams may count others too.
            grams: as for `add`.
            inputs: as for `add`.
        """
        entry = self.index["layers"][-1]
        number = len(entry.setdefault("experts", {}))
        file = f"layer-{len(self) - 1:05d}-expert-{number:05d}.safetensors"
        tensors = {f"{name}.gram": gram.blocks.cpu() for name, gram in grams.items()}
        save_file(tensors | {f"{name}.absmax": gram.absmax.cpu() for name, gram in grams.items()}, self.folder / file)
        entry["inputs"] |= inputs
        entry["tokens"] |= {name: gram.tokens for name, gram in grams.items()}
        entry.setdefault("files", {}).update(dict.fromkeys(grams, file))
        entry["experts"][next(iter(grams))] = tokens

    def _wait(self) -> None:
        """Waits for the layer that is being written. Raises the error of its writing."""
        if self._written:
            self._written.result()
        self._written = None

    def close(self, ids: torch.Tensor, angles: list[list[float]], targets: torch.Tensor | None = None) -> None:
        """Writes the index, without which the directory is not complete, and the token ids of the sweep.

        `angles` are the angles between the residual streams before any two layers, see `structured.angular_distances`.
        `targets` are the token ids that a decoder reads, if those are others.
        """
        self._wait()
        self._writer.shutdown()
        read = {} if targets is None else {"targets": targets.int()}
        save_file({"ids": ids.int(), **read}, self.folder / IDS)
        self.index["angles"] = angles
        (self.folder / "grams.json").write_text(json.dumps(self.index, indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the contents of `grams.json`."""
    try:
        index: dict[str, Any] = json.loads((folder / "grams.json").read_text())
        return index
    except (OSError, ValueError) as error:
        raise Failure(f"{folder} does not hold the Grams of a sweep: {error}") from error


@dataclass(frozen=True)
class ExpertTokens:
    """Numbers of tokens that the experts of a model saw in a sweep."""

    experts: int
    fewest: int
    median: int
    starved: int
    """Number of experts that saw fewer tokens than their inputs are wide. Tokens of others count in their Grams."""
    unseen: int
    """Number of experts among these that saw none."""

    @staticmethod
    def of(seen: Sequence[tuple[int, int]]) -> ExpertTokens | None:
        """Returns the numbers for experts with so many tokens and so wide inputs; None for no experts."""
        if not seen:
            return None
        counts = sorted(tokens for tokens, _ in seen)
        starved = sum(tokens < width for tokens, width in seen)
        return ExpertTokens(len(counts), counts[0], counts[len(counts) // 2], starved, counts.count(0))

    def as_json(self) -> dict[str, int]:
        """Returns it as plain data."""
        return asdict(self)


def expert_tokens(folder: Path) -> ExpertTokens | None:
    """Returns the numbers of tokens that experts saw in a sweep; None if the model has no experts."""
    index = read_index(folder)
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(index["layers"]):
        experts = layer.get("experts", {})
        if experts:
            width = LayerGrams(folder, number, layer, "cpu")[next(iter(experts))].width
            seen += [(tokens, width) for tokens in experts.values()]
    return ExpertTokens.of(seen)


def prefix_of(index: dict[str, Any], layer: int) -> str:
    """Returns the beginning of the names of a layer's weights. Older sweeps tell that of the list of layers."""
    return str(index["layers"][layer].get("prefix") or f"{index['prefix']}{layer}.")


def read_ids(folder: Path) -> torch.Tensor:
    """Returns the token ids of a sweep, `[samples, length]`."""
    ids: torch.Tensor = load_file(folder / IDS)["ids"]
    return ids.long()


def read_targets(folder: Path) -> torch.Tensor | None:
    """Returns the token ids that the decoder reads, `[samples, length]`; None if those are the ids, or older sweeps."""
    targets = load_file(folder / IDS).get("targets")
    return None if targets is None else targets.long()


class LayerGrams(Mapping[str, Gram]):
    """The Grams of one layer by the name of their input. Each is read when it is asked for."""

    def __init__(self, folder: Path, layer: int, entry: dict[str, Any], device: str) -> None:
        self._folder, self._layer, self._entry, self._device = folder, layer, entry, device
        self._last: tuple[str, Gram] | None = None

    def __getitem__(self, name: str) -> Gram:
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._read(name))
        return self._last[1]

    def _read(self, name: str) -> Gram:
        file = self._entry.get("files", {}).get(name)
        path = self._folder / file if file else _file(self._folder, self._layer)
        tokens = self._entry["tokens"][name]
        try:
            with safe_open(path, framework="pt") as stored:
                absmax, blocks = stored.get_tensor(f"{name}.absmax"), stored.get_tensor(f"{name}.gram")
        except (OSError, SafetensorError) as error:
            raise Failure(f"{path} cannot be read ({error}): the sweep is damaged") from error
        return Gram(absmax.numel(), blocks, absmax, tokens).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry["tokens"])

    def __len__(self) -> int:
        return len(self._entry["tokens"])


def read_layer(folder: Path, layer: int, device: str = "cpu") -> tuple[LayerGrams, dict[str, str]]:
    """Returns the Grams of one layer, on a device, by the name of their input, and the input that each linear reads."""
    entry = read_index(folder)["layers"][layer]
    return LayerGrams(folder, layer, entry, device), entry["inputs"]


def read_diagonals(folder: Path) -> Iterator[tuple[str, Any, int]]:
    """Yields, for every linear, its weight's name, diag(H) as a float32 array `[in]`, and the number of tokens."""
    index = read_index(folder)
    for layer in range(len(index["layers"])):
        grams, inputs = read_layer(folder, layer)
        for linear, name in inputs.items():
            weight = f"{prefix_of(index, layer)}{linear}.weight"
            yield weight, grams[name].diagonal().numpy(), grams[name].tokens
