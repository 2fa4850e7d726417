"""A model of any family, run with the weights of one of its blocks in memory.

The forward is the model's own. The model is built without storage, and every block is filled from the shards when its
turn comes, and emptied afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lighten.errors import Failure, RequestError
from lighten.model import accelerator, stream
from lighten.model.auto_classes import inputs_of
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy, anatomy_of, blocks_of
from lighten.model.empty import Filler, compute_buffers, empty_model, place_stand_ins
from lighten.model.experts import layout_of
from lighten.model.finite import finite
from lighten.model.folds import Fold, folds_of
from lighten.model.grams import read_index
from lighten.model.suspension import Place, Turn, turns


class BlockwiseModel:
    """A causal language model whose blocks are loaded one at a time."""

    def __init__(self, source: Path | Checkpoint, device: str = "cpu", *, trust_remote_code: bool = False) -> None:
        """Builds the modules without storage. `source` is a model directory, or an object that reads one.

        Raises:
            RequestError: the checkpoint is already quantized, or no layers are found in its model.
            Failure: stored tensors do not fill the layers.
        """
        self.checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
        if self.checkpoint.quantization:
            raise RequestError(
                f"{self.checkpoint.path} is already quantized: sweep over the model that it was made from"
            )
        self.device = device
        self.dtype = stream.fast_dtype(device)
        self.model = empty_model(self.checkpoint, self.dtype, trust_remote_code=trust_remote_code)
        compute_buffers(self.model, device)
        self.model.requires_grad_(False)
        self.blocks = blocks_of(self.model)
        self._filler = Filler(self.model, self.checkpoint.weight_map)
        self.anatomy: Anatomy = anatomy_of(self.model, self._filler, self.checkpoint.shapes())
        self._number = {layer.module: index for index, layer in enumerate(self.anatomy.layers)}
        self._inside = {name for block in self.blocks for name in self._filler.names(block)}

    def batches(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns `ids` `[samples, length]` in batches that fill the device."""
        return torch.split(ids, stream.batch_of(self.device, ids.shape[1]))

    def turns(
        self,
        ids: torch.Tensor,
        *,
        batches: Sequence[torch.Tensor] = (),
        targets: torch.Tensor | None = None,
        inference: bool = True,
        at_head: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Iterator[tuple[int, nn.Module, Turn]]:
        """Yields the layer's number, the filled block and its turn, for every block in the order of the forward.

        Args:
            ids: `[samples, length]`.
            batches: parts of `ids` that run together; the default fills the device.
            targets: what the decoder of a sequence-to-sequence model reads, `[samples, length]`; None for `ids`.
            inference: without it, the code between blocks records gradients.
            at_head: gets a batch's number and what its forward gives to the head.

        Raises:
            Failure: weights are missing, misshapen or not finite.
        """
        batches = batches or self.batches(ids)
        read = batches if targets is None else torch.split(targets, [len(batch) for batch in batches])
        width = self.model.config.get_text_config().hidden_size
        size = ids.numel() * width * self.dtype.itemsize * (1 if inference else len(self.blocks))
        place = Place(self.device, self.device if accelerator.fits(size, self.device, share=0.25) else "cpu")
        head = self.model.get_output_embeddings()
        within = [f"{name}." if name else "" for name in _language_model(self.model)]
        outside = [
            name
            for name, place in self._filler.places.items()
            if name not in self._inside and (place.startswith(tuple(within)) or place in _weights_of(self.model, head))
        ]
        embeddings = {
            name: each
            for name, each in self._modules_outside().items()
            if isinstance(each, nn.Embedding) and f"{name}.".startswith(tuple(within))
            if any(parameter.is_meta for parameter in each.parameters())  # others are computed, and never stored
        }
        looked_up = {name for each in embeddings for name in self._filler.names(each)}
        heads = {name for name in outside if self._filler.places[name] in _weights_of(self.model, head)}
        self._fill([name for name in outside if name not in looked_up and name not in heads])
        for name, each in embeddings.items():  # some models put the ids where the weights are
            self._look_up(name, each)
        place_stand_ins(self.model, self.anatomy.others, self.device)
        hooks = [
            each.register_forward_pre_hook(lambda module, _, name=name: self._look_up(name, module))
            for name, each in self._modules_outside().items()
            if list(each.parameters(recurse=False)) and each is not head
        ]
        running: dict[int, int] = {}
        if at_head and head is not None:
            hooks.append(
                head.register_forward_pre_hook(lambda _, args: at_head(running[threading.get_ident()], args[0]))
            )

        def forward(batch: int) -> None:
            running[threading.get_ident()] = batch
            own = batches[batch].to(self.device)
            self.model(**inputs_of(self.model, own, read[batch].to(self.device)))

        try:
            for turn in turns(forward, len(batches), self.blocks, ends=head, inference=inference, place=place):
                for each in embeddings.values():
                    self._filler.empty(each)
                with self.filled(turn.name) as block, torch.inference_mode(inference), torch.set_grad_enabled(False):
                    yield self._number[turn.name], block, turn
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def filled(self, name: str) -> Iterator[nn.Module]:
        """Fills a module of the model, and empties it afterwards.

        Raises:
            Failure: weights are missing, misshapen or not finite.
        """
        module = self.model.get_submodule(name)
        self._fill(self._filler.names(name))
        self._check_full(module, name)
        module.requires_grad_(False)
        yield module
        self._filler.empty(module)

    def _modules_outside(self) -> dict[str, nn.Module]:
        """Returns the modules that are in no block, by name."""
        return {
            name: each
            for name, each in self.model.named_modules()
            if not any(name == block or name.startswith(f"{block}.") for block in self.blocks)
        }

    def _look_up(self, name: str, module: nn.Module) -> None:
        """Fills a module that is called: an embedding, or what lies between the layers and the head."""
        if any(parameter.is_meta or hasattr(parameter, "stands_in") for parameter in module.parameters()):
            self._fill(self._filler.names(name))
            self._check_full(module, name)
            module.requires_grad_(False)

    def _fill(self, stored: list[str]) -> None:
        tensors = {name: tensor.to(self.device) for name, tensor in self.checkpoint.some(stored).items()}
        for name, sound in zip(tensors, finite(list(tensors.values())), strict=True):
            if not sound:
                raise Failure(f"{name} has NaN or infinite weights: the checkpoint is damaged; fetch it again")
        try:
            self._filler.fill(tensors, self.device)
        except ValueError as error:
            raise Failure(f"{self.checkpoint.path}: {error}; is it complete, and of this architecture?") from error

    def _check_full(self, module: nn.Module, name: str) -> None:
        self._filler.tie(module, name, self._fill)
        if lacking := self._filler.lacks(module):
            raise Failure(
                f"{self.checkpoint.path}: {name} lacks {', '.join(lacking[:3])}; is it complete, and of this "
                "architecture?"
            )


def _language_model(model: Any) -> list[str]:
    """Returns the names of the modules that make states of text: the decoder, and the encoder if there is one."""
    if len(inputs_of(model, None)) == 1:  # an encoder: what follows its layers reads their states too
        return [""]
    parts = [model.get_decoder(), *([model.get_encoder()] if model.config.is_encoder_decoder else [])]
    return [name for name, each in model.named_modules() if any(each is part for part in parts)]


def _weights_of(model: Any, module: nn.Module | None) -> set[str]:
    """Returns the names in the model of a module's own weights."""
    if module is None:
        return set()
    name = next(name for name, each in model.named_modules() if each is module)
    return {f"{name}.{short}" for short, _ in module.named_parameters()}


def known_anatomy(checkpoint: Checkpoint, grams: Path | None, *, trust_remote_code: bool = False) -> Anatomy:
    """Returns the anatomy of a model: from the sweep over it if that tells it, else from its modules."""
    told = read_index(grams).get("anatomy") if grams else None
    if told:
        return Anatomy.of_json(told)
    model = empty_model(checkpoint, torch.bfloat16, trust_remote_code=trust_remote_code)
    anatomy = anatomy_of(model, Filler(model, checkpoint.weight_map), checkpoint.shapes())
    leave_uncalled(model, anatomy)
    return anatomy


class _Ones(TorchFunctionMode):
    """Answers questions about numbers of tensors that have none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch, or answers for it."""
        if func in (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__):
            return 1 if func is not torch.Tensor.__bool__ else True
        return func(*args, **(kwargs or {}))


def leave_uncalled(model: Any, anatomy: Anatomy) -> None:
    """Leaves alone the linears whose weights the model reads without calling them.

    They are seen in a forward without storage, which computes nothing. A question about a number gets the answer 1. If
    the code of a model does not come to its end, linears of layers that did not run count as called; `unseen` says so.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    stacks = [module for module in model.modules() if layout_of(module) is not None]
    for module in stacks:
        module.forward = lambda states, *_, **__: states
    try:
        with torch.no_grad(), torch.device("meta"), _Ones():
            model(input_ids=torch.ones(1, 16, dtype=torch.long, device="meta"), use_cache=False)
    except Exception as error:  # whatever a class says of numbers that are not there
        anatomy.unseen = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    finally:
        for hook in hooks:
            hook.remove()
        for module in stacks:
            del module.forward
    ran = [layer.module for layer in anatomy.layers if layer.module in called]
    for layer in anatomy.layers:
        if layer.module in ran[: len(ran) - 1 if len(ran) < len(anatomy.layers) else None]:
            own = [each for each in layer.linears if each.inside is None]
            missed = {each.name for each in own if f"{layer.module}.{each.module}" not in called}
            layer.leave_unread({each.name for each in layer.linears} - missed)


def known_folds(checkpoint: Checkpoint, anatomy: Anatomy, *, trust_remote_code: bool = False) -> dict[int, list[Fold]]:
    """Returns what can take over scales in the layers of a model, by the kind of the layer."""
    model = empty_model(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    filler = Filler(model, checkpoint.weight_map)
    return folds_of(model, anatomy, filler, checkpoint.facts.head_dim)


def doubts(anatomy: Anatomy) -> list[str]:
    """Returns a warning if it is not known of every linear whether the model calls it."""
    if not anatomy.unseen:
        return []
    return [
        f"a forward without weights stopped ({anatomy.unseen}): linears whose weights the model reads otherwise "
        "than by calling them may be among those that were changed; a method with a sweep (gptq) sees them"
    ]


def check_known(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Raises RequestError if no linear is found that a method can take, or experts are not taken apart."""
    if experts := anatomy.experts:
        outside = anatomy.covered / anatomy.weights
        raise RequestError(
            f"{checkpoint.facts.architecture} has experts ({experts[0]}, …) in a form that lighten does not take "
            f"apart; {outside:.0%} of its weights are outside of them. Export the model to GGUF, if that knows it"
        )
    if not any(layer.linears for layer in anatomy.layers):
        why = next((why for layer in anatomy.layers for why in layer.kept.values()), "its layers have no weights")
        raise RequestError(f"no linear was found in the layers of {checkpoint.facts.architecture} ({why})")
