"""The last layer of a language model: from hidden states to logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lighten.errors import RequestError
from lighten.evaluate.runtimes.runtime import Floats
from lighten.model.anatomy import EMBEDDINGS, HEADS

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


class Head:
    """Weight `[vocab, hidden]`, bias, scale and soft cap of a checkpoint's head, in float32."""

    def __init__(self, path: Path) -> None:
        """Reads the tensors. A head that is tied to the embedding is the embedding.

        Raises:
            RequestError: no tensor could be the head.
        """
        from lighten.model.checkpoint import Checkpoint

        checkpoint = Checkpoint(path)
        names = list(checkpoint.weight_map)
        heads = [name for name in names if name.removesuffix(".weight") in HEADS]
        embeddings = [name for name in names if name.endswith(EMBEDDINGS)]
        found = heads or embeddings
        if len(found) != 1:
            raise RequestError(f"{path} has no single tensor that is its head or its tied embedding (found {found})")
        self.weight: Floats = checkpoint.tensor(found[0]).float().numpy()
        bias = found[0].removesuffix(".weight") + ".bias"
        self.bias: Floats | None = checkpoint.tensor(bias).float().numpy() if heads and bias in names else None
        config = checkpoint.config
        self.scale = 1.0
        for name in FACTORS:
            self.scale *= float(config.get(name) or 1)
        for name in DIVISORS:
            self.scale /= float(config.get(name) or 1)
        self.cap = float(config.get("final_logit_softcapping") or 0)
        self._room: Floats = np.empty((0, len(self.weight)), dtype=np.float32)

    def logits(self, hidden: Floats) -> Floats:
        """Returns `[n, vocab]` for hidden states `[n, hidden]`; valid until the next call."""
        if len(self._room) != len(hidden):
            self._room = np.empty((len(hidden), len(self.weight)), dtype=np.float32)
        np.matmul(hidden, self.weight.T, out=self._room)
        if self.bias is not None:
            self._room += self.bias
        if self.scale != 1:
            self._room *= np.float32(self.scale)
        if self.cap:
            self._room /= np.float32(self.cap)
            np.tanh(self._room, out=self._room)
            self._room *= np.float32(self.cap)
        return self._room
