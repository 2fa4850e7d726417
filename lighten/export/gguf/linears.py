"""The matrices of a file, and which of them read the inputs that a sweep has the Gram of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lighten.export.gguf.write import Draft
from lighten.model.gguf.family import Place, place_of, places
from lighten.model.gguf.towers import name_in

if TYPE_CHECKING:
    import torch


def matrices(draft: Draft) -> list[str]:
    """Returns the Hugging Face names of the matrices that get a type, in the order of the file."""
    return [hf for hf, piece in draft.pieces.items() if piece.is_matrix]


def matrices_of(draft: Draft) -> Callable[[str], list[tuple[str, int | None]]]:
    """Returns a function that tells which matrices a stored weight is in, and the number of its expert in them."""
    labels = {draft.names[label]: label for label in matrices(draft)}
    known: dict[str, Place] = {}
    for place in places(draft.family, draft.model):
        known.setdefault(place.stored, place)

    def found(stored: str) -> list[tuple[str, int | None]]:
        name = name_in(draft.checkpoint.checkpoint.config, stored)
        at = place_of(known, name) if name else None
        own = [labels[each] for each in at[0].names if each in labels] if at else []
        # rows of heads apart are in another form
        return [(label, at[1]) for label in own if at and len(draft.shapes[label]) == (2 if at[1] is None else 3)]

    return found


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
