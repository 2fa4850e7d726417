"""Training of a sequence-to-sequence model on pairs of texts: batches, and the steps of an optimizer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lighten.data.phrases import Pair
from lighten.errors import Failure

B = TypeVar("B")
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Pairs of a step: what the model takes, and the tokens that it should write, `[pairs, length]`."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    """Padding is `IGNORED`."""
    chosen: list[int]
    """Numbers of the pairs."""

    def on(self, device: str) -> Batch:
        """Returns the batch on a device."""
        inputs = {name: each.to(device) for name, each in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.chosen)


@dataclass(frozen=True)
class PairSet:
    """Token ids of pairs."""

    sources: list[list[int]]
    targets: list[list[int]]
    pad: int
    start: int
    """Token that the decoder begins with."""

    @staticmethod
    def read(tokenizer: Any, pairs: Sequence[Pair], config: Any, most: int | None = None) -> PairSet:
        """Returns the ids of pairs by a tokenizer of transformers; longer texts end after `most` tokens."""
        how = {"truncation": most is not None, "max_length": most}
        sources = tokenizer([pair.source for pair in pairs], **how)["input_ids"]
        targets = tokenizer(text_target=[pair.target for pair in pairs], **how)["input_ids"]
        return PairSet(sources, targets, *pad_and_start(config))

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, chosen: list[int]) -> Batch:
        """Returns pairs by their numbers, padded."""
        ids = padded([self.sources[each] for each in chosen], self.pad)
        labels = padded([self.targets[each] for each in chosen], IGNORED)
        mask = padded([[1] * len(self.sources[each]) for each in chosen], 0)
        fed = torch.cat([torch.full((len(chosen), 1), self.start), labels[:, :-1]], 1)
        fed = fed.masked_fill(fed == IGNORED, self.pad)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed}
        return Batch(inputs, labels, chosen)


def pad_and_start(config: Any) -> tuple[int, int]:
    """Returns the token for padding, and the one that the decoder begins with.

    Raises:
        Failure: the config names no beginning.
    """
    pad = config.pad_token_id
    start = next((each for each in (config.decoder_start_token_id, pad) if each is not None), None)
    if start is None:
        raise Failure(f"the config of the {config.model_type} model has no decoder_start_token_id: add it")
    return (start if pad is None else pad), start


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Returns rows as one tensor, `[rows, longest]`."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def batches(pairs: PairSet, size: int, seed: int) -> Iterator[Batch]:
    """Yields batches without end. Pairs of similar length are together, so that little is padded."""
    order = sorted(range(len(pairs)), key=lambda each: (len(pairs.targets[each]), len(pairs.sources[each])))
    size = min(size, len(order))
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    chance = random.Random(seed)
    while True:
        chance.shuffle(groups)
        for group in groups:
            yield pairs.batch(group)


def losses_by_step(
    plan: Iterable[B],
    loss: Callable[[B], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    *,
    rate: float,
    steps: int,
    clip: float = 1.0,
    warmup: float = 0.1,
    first: int = 0,
) -> Iterator[float]:
    """Yields the loss of each step after the step is done.

    `first` steps were done before. The learning rate rises linearly in the share `warmup` of the steps, then falls in
    half a cosine to a twentieth.

    Raises:
        Failure: a loss is no number.
    """
    warm = max(1, round(warmup * steps))
    for done, batch in enumerate(plan, first):
        over = max(0, done - warm) / max(1, steps - warm)
        share = min(1.0, (done + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * over)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.zero_grad(set_to_none=True)
        found = loss(batch)
        value = float(found.detach())
        if not math.isfinite(value):
            raise Failure(f"the loss is {value} at step {done + 1}: training stopped. Lower lr")
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        yield value
