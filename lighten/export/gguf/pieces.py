"""The tensors of a GGUF file, and the stored tensors that each is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lighten.errors import Failure, RequestError
from lighten.model.gguf.family import Family, Place, Rule, missing, places
from lighten.model.gguf.turns import Model

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """One tensor of a file."""

    name: str
    """Name in the file."""
    place: Place
    index: int
    """Number of the tensor among those that the stored one becomes."""
    stored: tuple[str, ...]
    """Names of the stored tensors: one, or one of every expert."""
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it gets a type of its own. Vectors and small kernels are F32 always."""
        return len(self.shape) > 1 and self.place.rule.rounded and self.name.endswith(".weight")

    def tensor(self, read: Callable[[str], torch.Tensor], model: Model, expert: int | None = None) -> torch.Tensor:
        """Returns the tensor, or the matrix of one expert, which is stored by itself. `read` returns a stored one."""
        import torch

        stored = self.stored if expert is None else self.stored[expert : expert + 1]
        parts = [self.place.rule.turn.there(read(name), model)[self.index] for name in stored]
        return torch.stack(parts) if self.place.of_experts and expert is None else parts[0]


def pieces_of(family: Family, model: Model, stored: Shapes, source: Path) -> dict[str, Piece]:
    """Returns the tensors to write, by label, in the order of the file.

    Raises:
        RequestError: llama.cpp has no place for a tensor.
        Failure: a tensor is missing.
    """
    shapes = _used(family, model, stored)
    known = list(places(family, model))
    found: list[Place] = []
    pieces: dict[str, Piece] = {}
    taken: set[str] = set()
    for place in known:
        parts = _parts(place, shapes)
        if not parts or taken.intersection((*place.names, *parts)):
            continue
        found.append(place)
        taken.update((*place.names, *parts))
        for index, (name, shape) in enumerate(zip(place.names, _shapes(place, parts, shapes, model), strict=True)):
            pieces[place.label(index)] = Piece(name, place, index, tuple(parts), shape)
    if model.facts.tied and family.head == "own":
        place = Place(Rule(family.embedding, ("output.weight",)), family.embedding, ("output.weight",))
        pieces[family.head_weight] = Piece("output.weight", place, 0, (family.embedding,), shapes[family.embedding])
    written = {name for piece in pieces.values() for name in piece.stored}
    if unknown := sorted(name for name in shapes if name not in written):
        raise RequestError(f"{source}: llama.cpp's {family.arch} has no place for the tensor {unknown[0]}")
    if lacking := missing(known, found):
        raise Failure(f"{source}: tensor {lacking.stored} is missing; fetch the model again")
    head = next((piece for piece in pieces.values() if piece.name == "output.weight"), None)
    if not model.facts.tied and head is None and family.head != "tied":
        raise Failure(f"{source}: tensor {family.head_weight} is missing; fetch the model again")
    rows = shapes[family.embedding][0]
    if rows != model.facts.vocab:
        raise Failure(f"{source}: config.json says {model.facts.vocab} tokens, the embedding has {rows} rows")
    return pieces


def left_out(family: Family, model: Model, stored: Iterable[str]) -> list[str]:
    """Returns the stored tensors that a file has no use for: parts that predict further tokens, after the layers."""
    pattern = re.compile(family.left_out or "(?!)")
    beyond = re.compile(rf"{re.escape(family.layers)}(\d+)\..*")
    found = {name: beyond.fullmatch(name) for name in stored}
    return [name for name, at in found.items() if pattern.fullmatch(name) or (at and int(at[1]) >= model.facts.layers)]


def _used(family: Family, model: Model, stored: Shapes) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the stored tensors that a file is made of. A tied head is the embedding."""
    useless = {*left_out(family, model, stored), *(name for name in stored if name.endswith("rotary_emb.inv_freq"))}
    shapes = {name: shape for name, shape in stored.items() if name not in useless}
    if model.facts.tied and family.embedding in shapes:
        shapes.pop(family.head_weight, None)
    return shapes


def _parts(place: Place, shapes: Shapes) -> list[str]:
    """Returns the stored names of a place; none if they are not stored."""
    if not place.of_experts:
        return [place.stored] if place.stored in shapes else []
    count = 0
    while place.parts(count + 1)[-1] in shapes:
        count += 1
    return place.parts(count)


def _shapes(place: Place, parts: list[str], shapes: Shapes, model: Model) -> list[tuple[int, ...]]:
    import torch

    found = place.rule.turn.there(torch.empty(shapes[parts[0]], device="meta"), model)
    first = (len(parts),) if place.of_experts else ()
    return [(*first, *tensor.shape) for tensor in found]
