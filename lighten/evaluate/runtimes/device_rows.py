"""Statistics of rows of logits on the model's device, so that a GPU's logits stay there. `rows` is numpy's version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lighten.evaluate.runtimes.head import Head
from lighten.evaluate.runtimes.runtime import Floats, Ids

LOGITS_BYTES = 2_000_000_000
"""Maximum number of bytes of the logits of sequences that are computed together."""
MOST_TOKENS = 8192
ROWS = 1024
"""Number of rows whose softmax is in memory at a time."""


def token_logprobs(
    logits: torch.Tensor, targets: Ids, at: Ids | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the log-probability (nats) `[m]` of tokens, and whether each was the most likely one.

    Args:
        logits: `[n, vocab]`, on any device.
        targets: token ids `[m]`.
        at: row of each target `[m]`; in order if left out.
    """
    rows = torch.from_numpy(np.arange(len(targets)) if at is None else at).to(logits.device)
    wanted = torch.from_numpy(targets).to(logits.device)
    logprobs, top = [], []
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        wide = logits[rows[part]].float()
        chosen = wide.gather(-1, wanted[part, None])[:, 0]
        logprobs.append(chosen - wide.logsumexp(-1))
        top.append(wide.argmax(-1) == wanted[part])
    return torch.cat(logprobs).cpu().double().numpy(), torch.cat(top).cpu().numpy()


def divergence(reference: torch.Tensor, variant: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns KL(reference || variant) in nats `[n]`, and whether both have the same most likely token.

    The sum runs over the whole vocabulary. If one has more columns (padding), it runs over the columns of both.
    """
    vocab = min(reference.shape[1], variant.shape[1])
    found, same = [], []
    for start in range(0, len(reference), ROWS):
        ours, theirs = (each[start : start + ROWS, :vocab].float() for each in (reference, variant))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        found.append((ours.exp() * (ours - theirs)).sum(-1).clamp(min=0))
    return torch.cat(found).cpu().double().numpy(), torch.cat(same).cpu().numpy()


def batch_of(length: int, vocab: int) -> int:
    """Returns the number of sequences of a length that are computed together."""
    return max(1, min(MOST_TOKENS, LOGITS_BYTES // (4 * vocab)) // length)


class DeviceHead:
    """The head of the reference on a device: from hidden states to logits."""

    def __init__(self, path: Path, device: str) -> None:
        """Reads it from a checkpoint, as `Head` does."""
        head = Head(path)
        self._weight = torch.from_numpy(head.weight).to(device)
        self._bias = None if head.bias is None else torch.from_numpy(head.bias).to(device)
        self._scale, self._cap = head.scale, head.cap

    def logits(self, hidden: Floats) -> torch.Tensor:
        """Returns `[n, vocab]` for hidden states `[n, hidden]`, in float32."""
        found = torch.from_numpy(hidden).to(self._weight.device) @ self._weight.t()
        if self._bias is not None:
            found += self._bias
        if self._scale != 1:
            found *= self._scale
        return self._cap * torch.tanh(found / self._cap) if self._cap else found


class DeviceScorer:
    """Scores several chunks at once. Logits, NLL and KL stay on the device."""

    def __init__(self, runtime: Any, ids: Ids, first: int, against: Any) -> None:
        """Prepares for chunks `ids [chunks, length]`, scored from `first` on, and a `Reference` or None."""
        self.runtime, self.ids, self.first, self.against = runtime, ids, first, against
        self.together = batch_of(ids.shape[1], runtime.vocab)
        self._head = DeviceHead(against.model, runtime.device) if against else None

    @torch.inference_mode()
    def __call__(self, part: slice) -> tuple[Any, Any, Any, Floats | None]:
        """Returns NLL, KL and agreement of the scored positions of chunks, and the inputs of the head."""
        chunks = self.ids[part]
        shape = len(chunks), chunks.shape[1] - self.first
        scored = slice(self.first - 1, -1)
        logits = self.runtime.device_logits(chunks)[:, scored].flatten(0, 1)
        hidden = self.runtime.hidden_of_all()
        nll = -token_logprobs(logits, chunks[:, self.first :].reshape(-1))[0].reshape(shape)
        kl, same = np.zeros(shape), np.ones(shape, dtype=np.bool_)
        if self._head:
            entered = self.against.hidden(part)[:, scored]
            entered = entered.reshape(-1, entered.shape[-1])
            parts = [
                divergence(self._head.logits(entered[start : start + ROWS]), logits[start : start + ROWS])
                for start in range(0, len(entered), ROWS)
            ]
            kl, same = (np.concatenate(each).reshape(shape) for each in zip(*parts, strict=True))
        return nll, kl, same, hidden
