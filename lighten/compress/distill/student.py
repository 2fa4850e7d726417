"""The student: which of its weights train, what the forward pass uses, and how they are kept.

Weights are trained in float32. The forward pass may multiply by something else: their nearest neighbours on a grid, or
weights with the zeros of a mask. Derivatives by these count as derivatives by the weights themselves (straight-through,
Bengio et al., 2013). Nothing of this is in the graph of autograd: the data of a weight are exchanged during the forward
and backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lighten.compress.distill.ends import changes_of
from lighten.compress.patterns import zeros_of
from lighten.compress.prune import sparse
from lighten.compress.quantize import grid
from lighten.errors import Failure, RequestError, missing_extra
from lighten.model import anatomy, attention
from lighten.model.architectures import ARCHITECTURES
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import FEW, ROUTERS, blocks_of
from lighten.model.loading import from_pretrained
from lighten.step import Context

if TYPE_CHECKING:
    from lighten.compress.distill.settings import Distill

LINEARS = tuple(map(anatomy.short, anatomy.LINEARS))


class Student:
    """A causal language model in training."""

    def __init__(self, step: Distill, path: Path, context: Context) -> None:
        """Loads the model, or makes a new one in the given shape.

        Raises:
            RequestError: settings exclude each other for this model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        self.step, self.device = step, context.device
        trusted = context.trust_remote_code
        changes = changes_of(step, Checkpoint(path))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **changes)
        torch.manual_seed(step.seed)
        made: Any = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted)
            if changes
            else from_pretrained(AutoModelForCausalLM, path, dtype=torch.float32, trust_remote_code=trusted)
        )
        self.model: Any = made.to(context.device).train()
        if attention.suited(made) == "eager":  # soft caps and sinks, which other kernels do not know
            made.set_attn_implementation("eager")
        self.known = type(made).__name__ in ARCHITECTURES
        if step.gradient_checkpointing:
            new = getattr(self.model, "activation_checkpointing_enable", None)  # older releases have the older name
            (new or self.model.gradient_checkpointing_enable)()
        self.linears = self._linears()
        self.kept = self._masks()
        self.scores: dict[str, torch.Tensor] = {}
        """Movement of every weight towards or away from zero, where that decides what is kept."""
        if step.movement:
            self.scores = {name: torch.zeros_like(module.weight) for name, module in self.linears.items()}
        if step.lora:
            self._add_lora(step.lora)
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _linears(self) -> dict[str, nn.Linear]:
        """Returns the linears of the layers, without those that choose experts."""
        inside = tuple(f"{name}." for name in blocks_of(self.model))

        def meant(name: str, module: nn.Linear) -> bool:
            short = name.rpartition(".")[2]
            if self.known:
                return short in LINEARS
            return name.startswith(inside) and module.out_features >= FEW and short not in ROUTERS

        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and meant(name, module)
        }

    def _masks(self) -> dict[str, torch.Tensor]:
        """Returns which weights of a pruned model stay; empty for a model that was not pruned."""
        found = {name: zeros_of([module.weight.detach()]) for name, module in self.linears.items()}
        masks = {name: ~zeros for name, zeros in found.items() if zeros is not None}
        for setting in ("lora", "movement"):
            if masks and getattr(self.step, setting):
                raise RequestError(f"this model has zeros that are to stay; {setting} would fill them: leave it out")
        return masks

    def _add_lora(self, rank: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise missing_extra("lora", "peft", "distill with lora") from error
        targets = list(LINEARS) if self.known else list(self.linears)
        wanted = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
        self.model = get_peft_model(self.model, wanted)

    @property
    def core(self) -> Any:
        """Model of transformers, without what is wrapped around it."""
        return self.model.get_base_model() if self.step.lora else self.model

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Exchanges the weights of the linears for those of the forward pass."""
        if not (self.step.quantize or self.scores):
            yield
            return
        own = {name: module.weight.data for name, module in self.linears.items()}
        try:
            for name, module in self.linears.items():
                module.weight.data = self.show(name, own[name])
            yield
        finally:
            for name, module in self.linears.items():
                module.weight.data = own[name]

    def show(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight that the forward pass uses for a linear."""
        if name in self.scores and name in self.kept:
            weight = weight * self.kept[name]
        if how := self.step.quantize:
            weight = grid.nearest(weight, how.bits, how.group_size, how.sym)
        return weight

    @torch.no_grad()
    def move(self, sparsity: float) -> None:
        """Adds to the scores how far each weight is about to move from zero, and keeps the best.

        Sanh et al., "Movement Pruning" (2020): S = −Σ W · ∂L/∂W, by the gradient of the weight of the forward pass. A
        masked weight gets no gradient itself.
        """
        for name, module in self.linears.items():
            gradient = module.weight.grad
            assert gradient is not None
            self.scores[name] -= module.weight * gradient
            if name in self.kept:
                gradient.mul_(self.kept[name])
            if sparsity > 0:
                assert self.step.movement
                self.kept[name] = self._best(self.scores[name], sparsity, self.step.movement.pattern)

    @staticmethod
    def _best(scores: torch.Tensor, sparsity: float, pattern: str | None) -> torch.Tensor:
        if pattern:
            return sparse.keep_largest(scores, 0.0, pattern)
        return sparse.keep_largest(scores.reshape(1, -1), sparsity).view_as(scores)

    @torch.no_grad()
    def mask(self) -> None:
        """Sets the weights to zero again that a step of the optimizer filled."""
        if not self.scores:
            for name, kept in self.kept.items():
                self.linears[name].weight.mul_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what training changes, by name."""
        masks = {f"kept.{name}": mask for name, mask in self.kept.items()} if self.scores else {}
        return {
            **{f"weight.{name}": weight.detach() for name, weight in self.trained.items()},
            **{f"score.{name}": score for name, score in self.scores.items()},
            **masks,
        }

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over the result of `state`."""
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if kind == "weight":
                self.trained[name].copy_(tensor)
            elif kind == "score":
                self.scores[name].copy_(tensor)
            elif kind == "kept":
                self.kept[name] = tensor.to(self.device)

    @torch.no_grad()
    def finished(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """Returns the weights that the model has now, by their names in a checkpoint."""
        found = self._merged(dtype) if self.step.lora else self._plain(dtype)
        if self.known:
            return found
        from transformers.core_model_loading import revert_weight_conversion

        for name, buffer in self.core.named_buffers():  # those that are stored with the weights
            if name in self.core.state_dict():
                found[name] = buffer.detach().cpu()
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.core, found)
        return reverted

    def _tied(self, name: str) -> bool:
        """Returns whether a weight is stored under another name."""
        if self.known:
            return bool(self.core.config.tie_word_embeddings) and name == anatomy.HEAD_WEIGHT
        return name in self.core.all_tied_weights_keys

    def _plain(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in self.core.named_parameters():
            linear = name.removesuffix(".weight")
            value = self.show(linear, weight.detach()) if linear in self.linears else weight.detach()
            if not self._tied(name):
                found[name] = value.to(dtype).cpu()
        return found

    def _merged(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Returns the weights with the matrices of LoRA merged."""
        found = {}
        for name, module in self.core.named_modules():
            if hasattr(module, "get_delta_weight"):
                weight = module.base_layer.weight + module.get_delta_weight("default")
                found[f"{name}.weight"] = weight.to(dtype).cpu()
                if module.base_layer.bias is not None:
                    found[f"{name}.bias"] = module.base_layer.bias.to(dtype).cpu()
        for name, weight in self.core.named_parameters():
            if ".base_layer." not in name and ".lora_" not in name and not self._tied(name):
                found[name] = weight.detach().to(dtype).cpu()
        return found


def check_vocabularies(student: Path, teacher: Path) -> None:
    """Raises RequestError unless every id of a text means the same to both. Padding does not count."""
    from lighten.model.vocabulary import differing

    if other := differing(student, teacher):
        raise RequestError(
            f"student and teacher have different vocabularies ({other}): distillation compares token by token, so take "
            "a teacher of the same family"
        )


def finite(value: float, step: int, last: str) -> None:
    """Raises Failure if a loss is no number any more."""
    if value != value or value in (float("inf"), float("-inf")):
        raise Failure(
            f"the loss is {value} at step {step}: training stopped, nothing of that step was kept. {last} "
            "Lower lr, or take precision: fp32"
        )
