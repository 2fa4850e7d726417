"""What to prune: orders of removal from the Grams, and the mixture that reaches a size with the least damage."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from lighten.compress.prune import structured
from lighten.compress.prune.amounts import Target
from lighten.compress.prune.parts import Cut, Parts
from lighten.compress.prune.settings import Prune
from lighten.compress.prune.thin import Thinned
from lighten.compress.prune.ways import HEADS, Sizes, Way, allowed_of
from lighten.errors import RequestError
from lighten.model import ending
from lighten.model.blockwise import BlockwiseModel
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_ids, read_index, read_layer
from lighten.model.sensitivity import Sensitivity
from lighten.process.workers import crew, ordered
from lighten.step import Context

SEQUENCES = 8
"""Number of samples that damage is measured on."""
HEAD_ROWS = 128
"""Number of positions whose logits are in memory at a time."""
SHARES = (0.125, 0.25, 0.375, 0.5)
"""Shares of channels, and of layers, whose damage is measured. In between it is interpolated."""


class Choices:
    """The removals that one model allows. Orders are computed once, when they are needed."""

    def __init__(self, step: Prune, checkpoint: Checkpoint, context: Context) -> None:
        self.step, self.checkpoint, self.context = step, checkpoint, context
        self.facts = checkpoint.facts
        self.warnings: list[str] = []
        self.parts = Parts(checkpoint, context.grams, trust_remote_code=context.trust_remote_code)
        self.kept: dict[str, str] = {}
        """Why MLPs stay as they are, by name."""
        self._orders: dict[str, dict[int, list[int]]] = {}
        self._scores = Sensitivity.read(context.sensitivity).heads if context.sensitivity else {}

    def cut(self, mlp: int = 0, heads: int = 0, layers: int = 0) -> Cut:
        """Returns which channels of every layer, key/value heads of every layer, and layers go."""
        channels, groups = self._first("mlp", mlp), self._first("heads", heads)
        return Cut(channels, groups, self.gone_layers(layers))

    def fewer_experts(self) -> Cut:
        """Returns which experts of every layer go.

        Raises:
            RequestError: there are none, or none or all would go.
        """
        experts, parts = self.parts.experts, self.parts
        gone: dict[int, list[int]] = {}
        for done, (layer, total) in enumerate(experts.of_layers.items(), 1):
            count = self.step.gone(total)
            if not 0 < count < total:
                raise RequestError(f"{count} of {total} experts cannot go: at least one goes, and one stays")
            assert self.context.grams
            with torch.inference_mode():
                prefix = parts.prefixes[layer]
                order = experts.order(layer, self.checkpoint, prefix, self.context.grams, self.context.device)
            gone[layer] = sorted(order[:count])
            self.context.report(done, len(experts.of_layers), f"choosing experts, layer {layer + 1}")
        return Cut(experts=gone)

    def _first(self, what: str, count: int) -> dict[int, list[int]]:
        """Returns the channels or heads that go first from every layer that has any: `count`, or as many as asked."""
        if not count:
            return {}
        counts = self.counts(what, count)
        order = self._order(what, counts)
        return {index: order[index][:number] for index, number in counts.items()}

    @cached_property
    def _mlps(self) -> list[int]:
        """The layers from whose MLPs a target may take channels."""
        way = self.allowed["mlp"]
        found, self.kept = self.parts.mlps(lambda total: way.of(way.counts[-1], total))
        return list(found)

    def counts(self, what: str, count: int) -> dict[int, int]:
        """Returns how many channels or heads go from each layer, if `count` go from one of the model's usual width."""
        usual = self.facts.intermediate if what == "mlp" else self.facts.kv_heads

        def amount(total: int) -> int:
            if self.step.target and not self.parts.known:
                return self.allowed[what].of(count, total)
            return count if total == usual or self.step.target else self.step.gone(total)

        if what == "heads":
            return self.parts.attentions(amount)
        if self.step.target and not self.parts.known:
            widths = {layer: each.mlp.groups for layer, each in enumerate(self.parts.prunable) if each.mlp}
            found = {layer: amount(widths[layer]) for layer in self._mlps}
            return {layer: gone for layer, gone in found.items() if 0 < gone < widths[layer]}
        found, self.kept = self.parts.mlps(amount)
        return found

    def _order(self, what: str, counts: dict[int, int]) -> dict[int, list[int]]:
        """Returns for every layer what to remove, in order: at least as many as asked."""
        known = self._orders.get(what)
        if known is None or any(len(known.get(index, ())) < count for index, count in counts.items()):
            places = sorted(counts)
            workers = crew(len(places), self.step.bytes_of_a_layer(self.facts), self.context.device)

            def report(done: int) -> None:
                self.context.report(done, len(places), f"choosing {what}, layer {done}/{len(places)}")

            def one(number: int) -> tuple[list[int], str | None]:
                return self._one_order(what, places[number], counts[places[number]])

            answers = list(ordered(one, len(places), workers, report))
            self._orders[what] = known = {place: order for place, (order, _) in zip(places, answers, strict=True)}
            self.warnings += [warning for _, warning in answers if warning]
        return known

    def _one_order(self, what: str, index: int, count: int) -> tuple[list[int], str | None]:
        step, prunable, prefix = self.step, self.parts.prunable[index], self.parts.prefixes[index]
        channels = prunable.mlp if what == "mlp" else prunable.heads
        assert channels
        with torch.inference_mode():
            if step.score == "taylor":
                if str(index) not in self._scores:
                    raise RequestError(f"there are no gradients of the heads of {prefix[:-1]}: leave out score: taylor")
                scores = torch.tensor(self._scores[str(index)]).view(channels.groups, -1).sum(1)
                return torch.argsort(scores, stable=True).tolist()[:count], None
            name, size = f"{prefix}{channels.reader}", channels.size
            weight = self.checkpoint.tensor(f"{name}.weight").to(self.context.device)
            assert self.context.grams
            grams, read_by = read_layer(self.context.grams, index, self.context.device)
            gram = grams[read_by[channels.reader]].matrix()
            if step.score != "energy":
                try:
                    return structured.removal_order(weight, gram, size, count, step.damp_percent or 0.0), None
                except ArithmeticError as error:
                    told = f"{name}: chosen by energy, for its Gram is {error}; give it more text"
                    return structured.energy_order(weight, gram.diagonal(), size)[:count], told
            return structured.energy_order(weight, gram.diagonal(), size)[:count], None

    # a target

    def reach(self, target: Target) -> tuple[Cut, dict[str, Any]]:
        """Returns the cut that leaves few enough weights with the least damage, and what was measured.

        Damage is the rise of the mean loss on some of the calibration text when a part is removed. The damage of each
        way by itself is measured at a few amounts. For a mixture the sum is predicted, and the damage of the chosen
        mixture is measured too.

        Raises:
            RequestError: no allowed removal makes the model so small.
        """
        steps = {way: each.counts for way, each in self.allowed.items()}
        facts, weigh = self.facts, self._params
        if not self.parts.known:
            facts = replace(facts, counted=self.parts.params(Cut()))
            target.check(facts)
            weigh = Sizes(self.parts, steps, self.counts, self.gone_layers).params
        most = target.most(facts)

        def params(choice: tuple[int, ...]) -> int:
            counts = [found[index] for found, index in zip(steps.values(), choice, strict=True)]
            return weigh(*counts)

        smallest = params(tuple(len(found) - 1 for found in steps.values()))
        if smallest > most:
            stays = "; ".join(f"{way}: {each.why}" for way, each in self.allowed.items() if each.why)
            raise RequestError(
                f"{most:,} weights cannot be reached: half of the channels and layers, and "
                f"{steps['heads'][-1]} of {self.allowed['heads'].total} key/value heads, may go, which leaves "
                f"{smallest:,}" + (f" ({stays})" if stays else "")
            )
        measured = {way: self._probes(way, counts) for way, counts in steps.items()}
        total = 2 + sum(map(len, measured.values()))
        done = 0

        def damage(cut: Cut | None) -> float:
            nonlocal done
            self.context.report(done, total, f"measuring damage {done + 1}/{total}")
            done += 1
            return self._loss(cut)

        base = damage(None)
        self.cut(**{way: counts[-1] for way, counts in steps.items()})  # one order for every amount
        points = {
            way: [(0, 0.0), *((n, damage(self.cut(**{way: n})) - base) for n in counts)]
            for way, counts in measured.items()
        }
        curves = [[_between(points[way], count) for count in counts] for way, counts in steps.items()]
        choice = structured.cheapest(curves, params, most)
        assert choice
        chosen = {way: counts[index] for (way, counts), index in zip(steps.items(), choice, strict=True)}
        cut = self.cut(**chosen)
        told = {
            "chosen": chosen,
            "loss": base,
            "damage": {
                "predicted": sum(curve[index] for curve, index in zip(curves, choice, strict=True)),
                "measured": damage(cut) - base,
            },
            "damages": {way: [{"gone": n, "loss": d} for n, d in found] for way, found in points.items()},
        }
        return cut, {"target": told}

    @cached_property
    def allowed(self) -> dict[str, Way]:
        """The numbers of channels, key/value heads and layers that a target may take."""
        facts = self.facts
        if self.parts.known:
            multiple = self.step.multiple_of(facts.intermediate)
            return {
                "mlp": Way.of_channels(facts.intermediate, multiple),
                "heads": Way(facts.kv_heads, list(range(min(HEADS, facts.kv_heads - 1) + 1))),
                "layers": Way(facts.layers, list(range(facts.layers // 2 + 1))),
            }
        return allowed_of(self.parts, self.step, self.gone_layers)

    def gone_layers(self, count: int) -> tuple[int, ...]:
        """Returns the layers that go if so many go."""
        if not count:
            return ()
        assert self.context.grams
        angles = read_index(self.context.grams)["angles"]
        return tuple(structured.layers_to_remove(angles, count, bool(self.step.contiguous)))

    def _probes(self, way: str, counts: list[int]) -> list[int]:
        """Returns the amounts whose damage is measured."""
        if way == "heads":
            return counts[1:]
        total = self.allowed[way].total
        found = set(counts[1:2] if way == "layers" else [])
        for wanted in (share * total for share in SHARES if counts[1:]):
            near = [(abs(count - wanted), count) for count in counts[1:]]
            found.add(min(near)[1])
        return sorted(found)

    def _params(self, channels: int, groups: int, layers: int) -> int:
        """Returns the number of weights that are left after a removal."""
        facts = self.facts
        shared = facts.kv_heads - groups
        left = replace(
            facts,
            intermediate=facts.intermediate - channels,
            kv_heads=shared,
            heads=shared * (facts.heads // facts.kv_heads),
            layers=facts.layers - layers,
        )
        return left.params

    def _loss(self, cut: Cut | None) -> float:
        step, context = self.step, self.context
        assert context.grams
        grams = context.grams if step.repair else None
        thin = (
            Thinned(self.checkpoint, cut, grams, step.damp_percent or 0.0, context.device, self.parts)
            if cut
            else self.checkpoint
        )
        ids = read_ids(context.grams)
        return mean_loss(thin, ids[:: -(-len(ids) // SEQUENCES)], context)


def mean_loss(checkpoint: Checkpoint, ids: torch.Tensor, context: Context) -> float:
    """Returns the mean loss of a model on `ids` `[samples, length]`, one layer in memory at a time."""
    model = BlockwiseModel(checkpoint, context.device, trust_remote_code=context.trust_remote_code)
    return ending.mean_loss(model, ids, HEAD_ROWS)


def _between(points: list[tuple[int, float]], count: int) -> float:
    """Returns the damage of an amount, on straight lines between the measured amounts."""
    after = next((place for place, (n, _) in enumerate(points) if n >= count), len(points) - 1)
    if after == 0:
        return points[0][1]
    (low, least), (high, most) = points[after - 1], points[after]
    return least + (most - least) * (count - low) / (high - low)
