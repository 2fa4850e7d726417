"""A model of transformers without storage, and the stored tensors that each of its modules is filled from.

Names, merges, splits and ties are those of transformers' own loader.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lighten.errors import RequestError
from lighten.model.auto_classes import class_for
from lighten.model.experts import ONE, Slice, layout_of, shapes_of

if TYPE_CHECKING:
    from lighten.model.checkpoint import Checkpoint


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from drawing bars and from warnings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def config_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Returns the settings of a model, an object of transformers. Changes of a checkpoint that is read count."""
    from transformers import AutoConfig

    if checkpoint.changes and not trust_remote_code:
        return AutoConfig.for_model(**_floats(checkpoint.config))
    return AutoConfig.from_pretrained(
        checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True, **checkpoint.changes
    )


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Returns the model that transformers would load a directory into, without storage.

    Its class is that of its task: the causal language model, where there is one.

    Raises:
        RequestError: transformers has no such class for its type.
    """
    from lighten.model import attention

    config = config_of(checkpoint, trust_remote_code=trust_remote_code)
    try:
        model = without_storage(class_for(config).from_config, config, dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            f"transformers opens no causal language model of the type {config.model_type} ({first})"
        ) from error
    model.config._attn_implementation = attention.suited(model)
    return model


def without_storage(build: Callable[..., Any], config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Returns what `build` makes of a config, its weights on the device "meta"."""
    with quiet(), torch.device("meta"):
        return build(config, dtype=dtype, **options).eval()


def _floats(value: Any) -> Any:
    """Returns settings with the numbers that JSON cannot write, as transformers reads them."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _floats(each) for name, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


def compute_buffers(model: Any, device: str) -> None:
    """Gives a model without storage the buffers that are computed and not stored, such as frequencies of RoPE.

    transformers computes them where it initialises weights; weights are marked, so that it leaves them alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, short = name.rpartition(".")
        model.get_submodule(path).register_buffer(short, torch.empty_like(buffer, device=device), persistent=False)
    for buffer in model.buffers():
        if buffer.is_meta:
            buffer._is_hf_initialized = True
    for name in _never_stored(model):
        path, _, short = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, short, nn.Parameter(torch.empty_like(getattr(module, short), device=device), False))
    with torch.no_grad():
        model.initialize_weights()


def place_stand_ins(model: Any, parts: Iterable[str], device: str) -> None:
    """Gives the weights of parts of a model a device, and no room. Models ask a weight of a tower for theirs."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and any(name.startswith(f"{part}.") for part in parts):
            path, _, short = name.rpartition(".")
            zero = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            stand_in: Any = nn.Parameter(zero, requires_grad=False)
            stand_in.stands_in = True
            setattr(model.get_submodule(path), short, stand_in)


@dataclass(frozen=True)
class _Converter:
    """How a stored tensor is converted."""

    operations: list[Any]
    sources: list[str]
    """Patterns of the names of the tensors that are converted together."""
    source: int
    """Number of this tensor's own pattern."""


def _never_stored(model: Any) -> list[str]:
    """Returns the names of parameters that are computed and not stored, such as Marian's positions."""
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or ()
    tied = model.all_tied_weights_keys
    return [
        name
        for name, _ in model.named_parameters()
        if name not in tied and any(re.search(pattern, name) for pattern in patterns)
    ]


class Filler:
    """Fills modules of a model without storage from stored tensors, and empties them."""

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        """Finds the stored tensors of every module. `stored` are their names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.model = model
        self._modules = dict(model.named_modules())
        self._mapping = get_model_conversion_mapping(model)
        wanted = model.state_dict()
        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        self.places: dict[str, str] = {}
        """Name in the model of every stored tensor; the first of its names if it is split."""
        self.converted: set[str] = set()
        """Stored tensors that are merged, split or turned on their way into the model."""
        self.converters: dict[str, _Converter] = {}
        """How each of these is converted."""
        self.parts: dict[str, Slice] = {}
        """Where the matrix of one expert lies in the tensor of all, for names that only lighten writes."""
        self.surplus: list[str] = []
        """Stored tensors that the model has no place for."""
        for name in stored:
            place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if place not in wanted and name in wanted:
                place, pattern = name, None
            if place not in wanted and (part := self._part(place) or self._part(name)):
                place, self.parts[name] = part
                self.converted.add(name)
            elif place not in wanted:
                self.surplus.append(name)
                continue
            self.places[name] = place
            if pattern is not None:
                self.converted.add(name)
                converter = next((each for each in converters if pattern in each.source_patterns), None)
                if converter:
                    sources = list(converter.source_patterns)
                    self.converters[name] = _Converter(converter.operations, sources, sources.index(pattern))

    def _part(self, name: str) -> tuple[str, Slice] | None:
        """Returns the parameter that the matrix of one expert belongs to, and where in it."""
        found = ONE.fullmatch(name)
        module = self._modules.get(found["module"]) if found else None
        layout = layout_of(module)
        if not found or module is None or layout is None:
            return None
        spot = layout.place(found["part"], int(found["expert"]), shapes_of(module))
        return (f"{found['module']}.{spot.tensor}", spot) if spot else None

    def is_turned(self, name: str) -> bool:
        """Returns whether a stored tensor is the weight of a linear that has its inputs before its outputs."""
        return type(self._modules.get(self.places[name].rpartition(".")[0])).__name__ == "Conv1D"

    def names(self, module: str) -> list[str]:
        """Returns the stored names of the tensors of a module."""
        return [name for name, place in self.places.items() if place.startswith(f"{module}.")]

    def fill(self, tensors: dict[str, torch.Tensor], device: str) -> None:
        """Loads stored tensors, by their stored names, into the model.

        Raises:
            ValueError: a tensor has another shape than its place, or could not be converted.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = self.model.dtype
        tensors = self._joined(tensors, dtype)
        how = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if info.mismatched_keys:
            name, stored, wanted = sorted(info.mismatched_keys)[0]
            raise ValueError(f"{name} is {list(stored)}, and the model asks for {list(wanted)}")
        if info.conversion_errors:
            raise ValueError(next(iter(info.conversion_errors.values())))

    def _joined(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Returns tensors by name, in which matrices of single experts are joined into the parameter of all."""
        found = {name: tensor for name, tensor in tensors.items() if name not in self.parts}
        for name in tensors.keys() & self.parts.keys():
            place = self.places[name]
            if place not in found:
                found[place] = torch.zeros(
                    self.model.get_parameter(place).shape, dtype=dtype, device=tensors[name].device
                )
            self.parts[name].of(found[place]).copy_(tensors[name])
        return found

    def tie(self, module: nn.Module, name: str, load: Callable[[list[str]], None]) -> None:
        """Gives a module the weights that it shares with another, from which they are stored.

        Args:
            module: filled but for those weights.
            name: its name in the model; "" for all of it.
            load: loads tensors by their stored names.
        """
        for place in self.lacks(module):
            source = self.model.all_tied_weights_keys.get(f"{name}.{place}" if name else place)
            stored = [each for each, at in self.places.items() if at == source]
            if source is None or not stored:
                continue
            load(stored)
            weight = self.model.get_parameter(source)
            path, _, short = place.rpartition(".")
            setattr(module.get_submodule(path), short, nn.Parameter(weight.detach(), requires_grad=False))
            if name and not source.startswith(f"{name}."):
                path, _, short = source.rpartition(".")
                gone = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
                setattr(self.model.get_submodule(path), short, gone)

    @staticmethod
    def lacks(module: nn.Module) -> list[str]:
        """Returns the names of a module's weights and buffers that nothing was loaded into."""
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return [name for name, tensor in named if tensor.is_meta]

    @staticmethod
    def empty(module: nn.Module) -> None:
        """Drops the storage of a module's weights. Its buffers stay."""
        for each in module.modules():
            for name, parameter in list(each.named_parameters(recurse=False)):
                setattr(each, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
