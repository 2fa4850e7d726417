"""The matrices of a file, and which of them read the inputs that a sweep has the Gram of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighten.export.gguf.write import Draft
from lighten.model.gguf.family import Place, place_of, places
from lighten.model.gguf.towers import name_in
from lighten.model.gguf.turns import SAME, Turn

if TYPE_CHECKING:
    import torch


def matrices(draft: Draft) -> list[str]:
    """Returns the Hugging Face names of the matrices that get a type, in the order of the file."""
    return [hf for hf, piece in draft.pieces.items() if piece.is_matrix]


class Matrices:
    """Which matrices of a file a stored weight is in, and what they are made of."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._labels = {draft.names[label]: label for label in matrices(draft)}
        self._known: dict[str, Place] = {}
        for place in places(draft.family, draft.model):
            self._known.setdefault(place.stored, place)
        self._stacked: tuple[int | None, dict[str, torch.Tensor]] = None, {}

    def _at(self, stored: str) -> tuple[Place, int | None] | None:
        name = name_in(self.draft.checkpoint.checkpoint.config, stored)
        return place_of(self._known, name) if name else None

    def of(self, stored: str) -> list[tuple[str, int | None]]:
        """Returns the labels of the matrices that a stored weight is in, and the number of its expert in them."""
        if (at := self._at(stored)) is None:
            return []
        own = [self._labels[each] for each in at[0].names if each in self._labels]
        # rows of heads apart are in another form
        return [(label, at[1]) for label in own if len(self.draft.shapes[label]) == (2 if at[1] is None else 3)]

    def turn(self, stored: str) -> Turn:
        """Returns what a stored weight is turned by; as it is, if the file has no place for it."""
        at = self._at(stored)
        return at[0].rule.turn if at else SAME

    def weight(self, label: str, expert: int | None) -> torch.Tensor:
        """Returns a matrix `[out, in]`, or that of one expert. Tensors of all experts of the last layer are kept."""
        piece = self.draft.pieces[label]
        if expert is None or piece.place.of_experts:
            return self.draft.weight(label, expert)
        if self._stacked[0] != piece.place.layer:
            self._stacked = piece.place.layer, {}
        found = self._stacked[1]
        if label not in found:
            found[label] = self.draft.weight(label)
        return found[label][expert]


def order_of(draft: Draft, hf: str, width: int) -> torch.Tensor | None:
    """Returns the numbers of the stored channels of a matrix in the order of the file; None if that is the same."""
    import torch

    piece = draft.pieces[hf]
    moved = piece.place.rule.turn.channels(torch.arange(width), draft.model)
    return moved[piece.index] if moved else None


def in_order(draft: Draft, hf: str, metric: torch.Tensor) -> torch.Tensor:
    """Returns M `[in, in]` in the order that the channels have in the file."""
    order = order_of(draft, hf, len(metric))
    return metric if order is None else metric[order][:, order]
