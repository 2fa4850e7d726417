"""The numbers of channels, heads and layers that a target may take from a model of any family, and what they weigh."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lighten.compress.prune.parts import Cut, Parts
from lighten.compress.prune.settings import Prune
from lighten.errors import RequestError

HEADS = 3
"""Maximum number of key/value heads that a target may remove."""


@dataclass(frozen=True)
class Way:
    """How many of one sort of parts may go."""

    total: int
    """In a layer, of the widest sort; or layers of the model."""
    counts: list[int]
    """Numbers that may go, the smallest first: 0 is one of them."""
    multiple: int = 1
    """What stays in a layer is a multiple of this."""
    why: str = ""
    """Why none can go."""

    @staticmethod
    def of_channels(width: int, multiple: int) -> Way:
        """Returns the numbers of channels that may go from MLPs of a width: up to half of them."""
        return Way(width, [n for n in range(width // 2 + 1) if (width - n) % multiple == 0], multiple)

    def of(self, count: int, total: int) -> int:
        """Returns how many go from a layer with `total` parts if `count` go from the widest: the same share."""
        stay = round(total * (1 - count / self.total) / self.multiple) * self.multiple
        return total - min(total, max(stay, 1))


def allowed_of(parts: Parts, step: Prune, gone_layers: Callable[[int], tuple[int, ...]]) -> dict[str, Way]:
    """Returns what may go from the layers of a model: what its parts and the settings of its class allow."""
    widths = [each.mlp.groups for each in parts.prunable if each.mlp]
    groups = [each.heads.groups for each in parts.prunable if each.heads]
    ways = {
        "mlp": Way.of_channels(max(widths), step.multiple_of(math.gcd(*widths))) if widths else Way(0, [0]),
        "heads": Way(max(groups), list(range(min(HEADS, min(groups) - 1) + 1))) if groups else Way(0, [0]),
        "layers": Way(len(parts.prefixes), list(range(len(parts.prefixes) // 2 + 1))),
    }
    return {way: _held(parts, way, each, gone_layers) for way, each in ways.items()}


def _held(parts: Parts, way: str, found: Way, gone_layers: Callable[[int], tuple[int, ...]]) -> Way:
    """Returns a way without the numbers for which the class of the model has no settings."""
    if way == "layers" and parts.whole.facts.task == "seq2seq":
        return Way(found.total, [0], why="encoder and decoder count theirs apart")
    why, held = "there are none", [0]
    for count in found.counts[1:]:
        try:
            if way == "mlp":
                parts.mlps(lambda total, count=count: found.of(count, total))  # type: ignore[misc]
            elif way == "heads":
                gone = parts.attentions(lambda total, count=count: found.of(count, total))  # type: ignore[misc]
                parts.settings(Cut({}, {layer: range(number) for layer, number in gone.items()}))
            else:
                parts.settings(Cut(layers=gone_layers(count)))
        except RequestError as error:
            why = str(error).splitlines()[0]
            continue
        held.append(count)
        if way == "mlp":  # widths are all alike to a config
            held += [each for each in found.counts if each > count]
            break
    return Way(found.total, held, found.multiple, "" if len(held) > 1 else why)


class Sizes:
    """What parts of a model weigh. Channels, heads and layers are counted apart, and then together."""

    def __init__(
        self,
        parts: Parts,
        steps: Mapping[str, list[int]],
        counts: Callable[[str, int], Mapping[int, int]],
        gone_layers: Callable[[int], tuple[int, ...]],
    ) -> None:
        """Counts the weights that go with every number of channels and of heads, layer by layer.

        Args:
            parts: of the model.
            steps: numbers of channels, heads and layers that may go.
            counts: returns how many channels or heads go from each layer, for one of these numbers.
            gone_layers: returns which layers go.
        """
        self.parts, self.counts = parts, counts
        self.layers = [0] * len(self.parts.prefixes)
        self.total = 0
        for name, shape in self.parts.whole.shapes().items():
            self.total += math.prod(shape)
            if place := self.parts.placed(name):
                self.layers[place[0]] += math.prod(shape)
        self.gone = {count: {*gone_layers(count)} for count in steps["layers"]}
        self.saved = {way: {count: self._saved(way, count) for count in steps[way]} for way in ("mlp", "heads")}

    def _saved(self, way: str, count: int) -> list[int]:
        """Returns the weights that every layer loses."""
        saved = [0] * len(self.layers)
        if not count:
            return saved
        gone = {layer: range(number) for layer, number in self.counts(way, count).items()}
        shapes = self.parts.whole.shapes()
        for name, shape in self.parts.shapes(Cut(gone) if way == "mlp" else Cut({}, gone)).items():
            place = self.parts.placed(name)
            assert place
            saved[place[0]] += math.prod(shapes[name]) - math.prod(shape)
        return saved

    def params(self, channels: int, groups: int, layers: int) -> int:
        """Returns the number of weights that are left."""
        left = self.total
        for layer, size in enumerate(self.layers):
            left -= (
                size
                if layer in self.gone[layers]
                else self.saved["mlp"][channels][layer] + self.saved["heads"][groups][layer]
            )
        return left
