"""Running a model one decoder layer at a time, with only that layer's weights in memory.

transformers' own modules do the arithmetic. The model is built without storage. Every layer is filled from the shards
when its turn comes, and emptied afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighten.errors import Failure, RequestError
from lighten.model import accelerator, anatomy
from lighten.model.architectures import check_architecture
from lighten.model.checkpoint import Checkpoint
from lighten.model.products import fast_bfloat16

HEAD_ROWS = 128
"""Number of positions whose logits are in memory at a time."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Number of tokens that go through a layer at once. They fill the units of a device, and no more."""


def batch_of(device: str, length: int) -> int:
    """Returns the number of sequences of a length that go through a layer at once."""
    return max(1, BATCH_TOKENS[accelerator.device_type(device)] // length)


def fast_dtype(device: str) -> torch.dtype:
    """Returns bfloat16 if the device multiplies it in hardware, else float32."""
    return torch.bfloat16 if device != "cpu" or fast_bfloat16() else torch.float32


class _StandIn(nn.Module):
    """Takes the place of a decoder layer. It keeps the arguments of its calls and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return hidden_states


class StreamedModel:
    """A causal language model whose decoder layers are loaded one at a time."""

    def __init__(self, source: Path | Checkpoint, device: str = "cpu", *, trust_remote_code: bool = False) -> None:
        """Builds the modules without storage. `source` is a model directory, or an object that reads one.

        Raises:
            RequestError: the architecture is not supported, or the checkpoint is already quantized.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        from lighten.model import attention

        self.checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
        path = self.checkpoint.path
        if not trust_remote_code:
            check_architecture(self.checkpoint.facts.architecture)
        if self.checkpoint.quantization:
            raise RequestError(f"{path} is already quantized: sweep over the model that it was made from")
        self.device = device
        self.dtype = fast_dtype(device)
        if self.checkpoint.changes and not trust_remote_code:
            config = AutoConfig.for_model(**self.checkpoint.config)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **self.checkpoint.changes)
        config._attn_implementation = attention.NAME
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=trust_remote_code)
            self.model: Any = made.eval()
        # non-persistent buffers (RoPE frequencies) are computed, not stored: build them for real
        rotary = type(self.model.model.rotary_emb)
        self.model.model.rotary_emb = rotary(config=config).to(device)
        self.layers: list[Any] = list(self.model.model.layers)

    def _fill(self, module: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
        moved = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in moved.values()]).tolist()
        if not all(finite):
            key = next(key for key, sound in zip(moved, finite, strict=True) if not sound)
            raise Failure(f"{name}{key} has NaN or infinite weights: the checkpoint is damaged; fetch it again")
        moved = {key: tensor.to(self.dtype) for key, tensor in moved.items()}
        module.requires_grad_(False)
        missing, unexpected = module.load_state_dict(moved, strict=False, assign=True)
        if missing or unexpected:
            what = f"lacks {missing}" if missing else f"has tensors that it should not: {unexpected}"
            raise Failure(f"{self.checkpoint.path}: {name[:-1]} {what}; is it complete, and of this architecture?")

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Returns the hidden states before the first layer, and the arguments of every layer.

        Args:
            ids: `[samples, length]`.

        Returns:
            Hidden states `[samples, length, hidden]`, and for each layer the keyword arguments (mask, positions, …)
            of a call with one sample; they broadcast over samples of the same length. The states lie on the device
            where they fit beside what a layer needs, else on the CPU.
        """
        body = self.model.model
        self._fill(body.embed_tokens, self.checkpoint.tensors(f"{anatomy.EMBEDDING}."), f"{anatomy.EMBEDDING}.")
        stand_ins = [_StandIn() for _ in self.layers]
        for stand_in, layer in zip(stand_ins, self.layers, strict=True):
            # some models look at their layers' attributes to choose the mask
            stand_in.__dict__.update({k: v for k, v in layer.__dict__.items() if k in ("attention_type", "layer_idx")})
        body.layers = nn.ModuleList(stand_ins)
        norm, body.norm = body.norm, nn.Identity()
        body(inputs_embeds=body.embed_tokens(ids[:1].to(self.device)), use_cache=False)
        size = ids.numel() * body.config.hidden_size * self.dtype.itemsize
        place = self.device if accelerator.fits(size, self.device, share=0.25) else "cpu"
        hidden = torch.empty(*ids.shape, body.config.hidden_size, dtype=self.dtype, device=place)
        for index, row in enumerate(ids):
            hidden[index] = body.embed_tokens(row.to(self.device))
        body.norm = norm
        body.embed_tokens.to("meta")
        return hidden, [stand_in.calls[0] for stand_in in stand_ins]

    def head_gradient(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Returns the derivative of the loss of predicting `ids` by the states that the last layer left.

        Args:
            hidden: `[samples, length, hidden]`, the states after the last layer.
            ids: `[samples, length]`.

        Returns:
            The mean square of the derivative by a logit, XᵀX of the inputs of the head, and the derivative by
            `hidden`; the loss is summed over tokens.
        """
        body = self.model.model
        self._fill(body.norm, self.checkpoint.tensors(f"{anatomy.NORM}."), f"{anatomy.NORM}.")
        head = self.checkpoint.head().to(self.device, self.dtype)
        gradient = torch.zeros_like(hidden)
        ids = ids.to(self.device)
        gram = torch.zeros(hidden.shape[-1], hidden.shape[-1], device=self.device)
        squares = 0.0
        for row in range(len(ids)):
            state = hidden[row : row + 1].to(self.device).clone().requires_grad_()
            with torch.enable_grad():
                inputs = body.norm(state)[0]
            back = torch.zeros_like(inputs)
            for start in range(0, len(inputs) - 1, HEAD_ROWS):
                rows = slice(start, min(start + HEAD_ROWS, len(inputs) - 1))
                part = inputs.detach()[rows]
                difference = torch.softmax((part @ head.t()).float(), -1)
                difference[torch.arange(len(part), device=part.device), ids[row, rows.start + 1 : rows.stop + 1]] -= 1
                squares += float(difference.square().sum())
                back[rows] = difference.to(self.dtype) @ head
            wide = inputs.detach().float()
            gram += wide.t() @ wide
            (gradient[row : row + 1],) = torch.autograd.grad(inputs, state, back)
        body.norm.to("meta")
        return squares / (ids.numel() * len(head)), gram.cpu(), gradient

    @torch.inference_mode()
    def loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> float:
        """Returns the mean loss of predicting `ids` `[samples, length]` from the states that the last layer left."""
        body = self.model.model
        self._fill(body.norm, self.checkpoint.tensors(f"{anatomy.NORM}."), f"{anatomy.NORM}.")
        head = self.checkpoint.head().to(self.device, self.dtype)
        total = 0.0
        for state, row in zip(hidden, ids, strict=True):
            inputs = body.norm(state[None, :-1].to(self.device))[0]
            for part, wanted in zip(inputs.split(HEAD_ROWS), row[1:].split(HEAD_ROWS), strict=True):
                logits = (part @ head.t()).float()
                total += float(nn.functional.cross_entropy(logits, wanted.to(self.device), reduction="sum"))
        body.norm.to("meta")
        return total / (ids.numel() - len(ids))

    def stream(self, reverse: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Yields every decoder layer, filled, from first to last or back. Each is emptied before the next is loaded."""
        for index, layer in sorted(enumerate(self.layers), key=lambda each: each[0], reverse=reverse):
            prefix = anatomy.layer(index)
            self._fill(layer, self.checkpoint.tensors(prefix), prefix)
            yield index, layer
            layer.to("meta")
