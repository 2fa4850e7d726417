"""A GGUF file in training: the model that it is, with its matrices in blocks, and the same file with other scales."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import nn

from lighten.compress.polish.blocks import BlockLinear, Blocks
from lighten.compress.polish.student import IN_ONE, THE_HEAD, Student, why_left
from lighten.errors import Failure
from lighten.model import whole
from lighten.model.checkpoint import Checkpoint, facts_of
from lighten.model.empty import Filler
from lighten.model.gguf.blocks import KINDS, Bytes, unpack, with_halves
from lighten.model.gguf.family import Place
from lighten.model.gguf.table import family_of
from lighten.model.gguf.towers import Tower
from lighten.model.gguf.turns import Model
from lighten.model.gguf_header import Header, Tensor, open_any, with_modelfile
from lighten.model.gguf_source import places_in, read_stored, read_tensor
from lighten.model.stream import fast_dtype
from lighten.step import Context

HEAD = "output.weight"
PLAIN = ("F32", "F16", "BF16")
ELSEWHERE = "it lies in the file in another way"


class Twin(Checkpoint):
    """A model directory whose tensors are those that a file has instead of them.

    A tensor of the file is taken if it is nearer to the directory's own than zeros are. So what is turned otherwise, or
    was made of another model, is found by its numbers.
    """

    def __init__(self, source: Path, file: Path) -> None:
        """Opens a directory, and a file that was made of it."""
        super().__init__(source)
        self.header = open_any(file)
        tower = Tower(self)
        family = family_of(tower.facts, tower.config)
        config = {**(family.defaults or {}), **tower.config}
        self.model = Model(config, facts_of(config, str(source)))
        self.rounded: list[Rounded] = []
        """Places whose tensors are quantized."""
        self.elsewhere: set[str] = set()
        """Names of tensors that were read, and are not what the file has in their place."""
        self._at: dict[str, tuple[Place, int | None]] = {}
        known = tower.shapes()
        for place in places_in(self.header, family, self.model):
            tensors = [self.header.tensors[name] for name in place.names]
            own = [name for name in place.parts(tensors[0].shape[0]) if name in known]
            stored = [tower.stored(name) for name in own]
            self._at |= {name: (place, at if place.of_experts else None) for at, name in enumerate(stored)}
            types = [GGMLQuantizationType(tensor.type).name for tensor in tensors]
            if not {*types} <= {*PLAIN}:
                self.rounded.append(Rounded(place, tensors, types, stored))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU; what comes from the file is in float32."""
        own = super().tensor(name)
        if name not in self._at:
            return own
        place, expert = self._at[name]
        try:
            found = read_stored(self.header, place, self.model, expert)
        except (RuntimeError, IndexError) as error:
            raise Failure(f"{self.header.path}: {place.names[0]} does not fit the sizes ({error}): damaged") from error
        if found.shape == own.shape and (found - own.float()).norm() <= own.float().norm():
            return found
        self.elsewhere.add(name)
        return own

    def matrix(self, tensor: Tensor, type: str) -> Blocks:
        """Returns a matrix of the file."""
        with (tensor.file or self.header.path).open("rb") as file:
            file.seek(tensor.start)
            return Blocks(unpack(_rows(file.read(tensor.size), tensor), KINDS[type]))


@dataclass
class Rounded:
    """A place in a file whose tensors are quantized."""

    place: Place
    tensors: list[Tensor]
    types: list[str]
    stored: list[str]
    """Names of the source's tensors that are in it."""

    def why_left(self, twin: Twin, filler: Filler) -> str | None:
        """Returns why its scales stay; None if they can train."""
        if HEAD in self.place.names:
            return THE_HEAD
        if self.place.of_experts or filler.converted.intersection(self.stored):
            return IN_ONE
        if unknown := [type for type in self.types if type not in KINDS]:
            return f"its type {unknown[0]} is none whose scales polish trains"
        if len(self.stored) != 1 or twin.elsewhere.intersection(self.stored):
            return ELSEWHERE
        return None


def open_file(file: Path, source: Path, context: Context) -> Student:
    """Returns the model in a file, which was made of the model directory `source`, ready for training.

    Raises:
        RequestError: the file has tensors that the model has no place for.
        Failure: no matrix of it can be trained.
    """
    twin = Twin(source, file)
    trusted = context.trust_remote_code
    student = Student(whole.fill(twin, fast_dtype(context.device), trust_remote_code=trusted))
    filler = Filler(student.model, [name for each in twin.rounded for name in each.stored])
    for each in twin.rounded:
        why = each.why_left(twin, filler) or _take(each, twin, filler, student)
        student.left += [{"what": tensor.name, "why": why} for tensor in each.tensors if why]
    if not student.trained:
        reasons = ", ".join(dict.fromkeys(left["why"] for left in student.left))
        raise Failure(f"{file.name} has no matrix whose scales can be trained ({reasons or 'none is quantized'})")
    if twin.facts.tied and HEAD in twin.header.tensors:
        student.own_head = read_tensor(twin.header, twin.header.tensors[HEAD])
    return student


def _take(each: Rounded, twin: Twin, filler: Filler, student: Student) -> str | None:
    """Puts the matrices of the file in the place of a linear. Returns why they stay, if they do."""
    (stored,) = each.stored
    where = filler.places[stored].rpartition(".")[0]
    module = student.model.get_submodule(where)
    if why := why_left(module):
        return why
    matrices = {tensor.name: twin.matrix(tensor, type) for tensor, type in zip(each.tensors, each.types, strict=True)}
    back, bias = partial(_back, each.place, twin.model), getattr(module, "bias", None)
    made = BlockLinear([*matrices.values()], back, bias, module.weight.dtype)
    if type(module) is not nn.Linear or not torch.equal(made.stored(), module.weight):
        return ELSEWHERE
    student.model.set_submodule(where, made)
    student.linears += 1
    student.trained |= matrices
    return None


def _back(place: Place, model: Model, tensors: list[torch.Tensor]) -> torch.Tensor:
    return place.rule.turn.back(tensors, model)


def write_file(file: Path, trained: Mapping[str, Blocks], out: Path) -> int:
    """Copies a file, or its parts, and its Modelfile, with other d and dmin. Returns the number of those that changed.

    Args:
        file: the file, or the first of its parts.
        trained: its matrices in training, by their names.
        out: directory of the copy.

    Raises:
        Failure: a scale is no number.
    """
    header, changed = open_any(file), 0
    for each in with_modelfile(file):
        shutil.copyfile(each, out / each.name)
    for name, matrix in trained.items():
        found = matrix.rounded().cpu()
        if not torch.isfinite(found).all():
            raise Failure(f"the scales of {name} are no numbers after training: lower lr")
        changed += int((found != matrix.first.cpu()).sum())
        _rewrite(out, header, header.tensors[name], [*found.half()])
    return changed


def _rewrite(out: Path, header: Header, tensor: Tensor, halves: list[torch.Tensor]) -> None:
    """Writes other d and dmin over those of a tensor."""
    kind = KINDS[GGMLQuantizationType(tensor.type).name]
    with (out / (tensor.file or header.path).name).open("r+b") as file:
        file.seek(tensor.start)
        packed = _rows(file.read(tensor.size), tensor)
        file.seek(tensor.start)
        file.write(with_halves(packed, kind, halves).numpy().tobytes())


def _rows(packed: bytes, tensor: Tensor) -> Bytes:
    """Returns packed rows, `[out, bytes of a row]`."""
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(tensor.shape[0], -1)
