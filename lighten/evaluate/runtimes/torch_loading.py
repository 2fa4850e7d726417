"""Opening a checkpoint in transformers, and the kernels that it gets."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lighten.errors import Failure, RequestError, missing_extra
from lighten.evaluate.speed.options import ATTENTION
from lighten.model import accelerator, llama_library, whole
from lighten.model.auto_classes import class_for
from lighten.model.checkpoint import Checkpoint
from lighten.model.formats import FORMATS
from lighten.model.loading import from_pretrained, readable
from lighten.model.quantized.awq import Awq
from lighten.model.quantized.compressed import float_blocks
from lighten.plugins import found_at

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Number of tokens of a batch of questions."""


def load_model(
    path: Path,
    device: str,
    dtype: torch.dtype,
    method: str | None,
    unpack: bool,
    trusted: bool,
    attention: str | None,
    *,
    assembled: bool,
) -> Any:
    """Opens a checkpoint in transformers, ready to compute.

    Args:
        path: the model directory.
        device: "cpu", "cuda" or "cuda:N".
        dtype: arithmetic of the weights that are not quantized.
        method: the checkpoint's `quant_method`; None for a plain one.
        unpack: whether its weights are going to be unpacked, so that kernels must leave them as they are stored.
        trusted: whether code beside the weights may run.
        attention: the attention to use; None for the one that transformers chooses.
        assembled: whether lighten unpacks the weights and puts them together, see `why_assembled`.

    Raises:
        RequestError: the device or an extra is missing, or transformers cannot load it.
        Failure: the weights are damaged.
    """
    if accelerator.device_type(device) == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"the device {device} is not there: torch sees no GPU. Use --device cpu")
    if assembled:
        return whole.load(path, dtype, trust_remote_code=trusted).to(device)
    options: dict[str, Any] = {"trust_remote_code": trusted}
    if attention:
        options["attn_implementation"] = ATTENTION[attention]
    stored_as = FORMATS.get(method or "")
    for module in stored_as.loaded_with if stored_as else ():
        if stored_as and find_spec(module) is None:
            raise missing_extra(stored_as.extra, module, f"running the {method} checkpoint {path}")
    if stored_as and "gptqmodel" in stored_as.loaded_with:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # with fewer it fails on a machine of two cores
        llama_library.keep_apart()
    if unpack and stored_as and stored_as.plain_kernels:
        settings, backend = stored_as.plain_kernels
        bits = Checkpoint(path).config["quantization_config"]["bits"]
        options["quantization_config"] = found_at(f"transformers:{settings}")(bits=bits, backend=backend)
    if placed := _is_placed(method, device, unpack):
        options["device_map"] = {"": device}  # the kernels of a GPU are chosen where the weights arrive on it
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with readable(path) as folder:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
        model = from_pretrained(class_for(config), path, dtype=dtype, **options)
    except SafetensorError as error:
        raise Failure(
            f"the weights in {path} cannot be read ({error}): cut short or damaged; fetch them again"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"transformers cannot load {path}: {error}") from error
    return model.eval() if placed or unpack else model.eval().to(device)


def why_assembled(path: Path, method: str | None, trusted: bool, *, unpack: bool) -> str | None:
    """Returns why lighten unpacks the weights of a checkpoint and puts them together; None if its loader opens it.

    Where weights are unpacked anyway, the packages that would only read them need not be there.
    """
    if method is None or method == "bitsandbytes":
        return None
    plain_inputs = method in ("gptq", "awq")
    # loaders of these formats look for the layers of decoders
    decoder = Checkpoint(path).facts.task == "causal" or not plain_inputs
    if not decoder or whole.is_needed(path, trust_remote_code=trusted):
        return "transformers opens no quantized experts or turned linears"
    if unpack and plain_inputs:
        lacking = [module for module in FORMATS[method].loaded_with if find_spec(module) is None]
        return f"{lacking[0]}, with which transformers opens it, is not installed" if lacking else None
    return None


def _is_placed(method: str | None, device: str, unpack: bool) -> bool:
    """Returns whether a quantized model is loaded onto the device itself.

    A model whose weights are unpacked first is moved afterwards. bitsandbytes is an exception: its weights are unpacked
    on the device.
    """
    stored_as = FORMATS.get(method or "")
    unpacked_there = stored_as is not None and stored_as.unpacked_on_device
    return method is not None and device != "cpu" and (not unpack or unpacked_there)


def arithmetic_for_quality(checkpoint: Checkpoint, device: str) -> str:
    """Returns the arithmetic of quality: float32, or bfloat16 if the model in float32 does not fit a GPU."""
    room = 1.5 * 4 * checkpoint.facts.params
    return "float32" if device == "cpu" or accelerator.fits(room, device, share=0.9) else "bfloat16"


def kernels_of(model: nn.Module) -> list[str]:
    """Returns the class names of the quantized linear layers.

    It is said of those that round their inputs to few bits, and then multiply in the arithmetic of the model.
    """
    return sorted({f"{_emulated(module)}{type(module).__name__}" for module in model.modules() if stored(module)})


def _emulated(module: nn.Module) -> str:
    inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    return "" if inputs is None else f"emulated {inputs.num_bits}-bit-input "


def stored(module: nn.Module) -> str | None:
    """Returns the format of a module's stored weight; None for a plain weight."""
    if hasattr(module, "qweight"):
        return "awq" if "awq" in str(getattr(module, "QUANT_TYPE", "")).lower() else "gptq"
    if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
        return "bnb"
    scheme = getattr(module, "quantization_scheme", None)
    return "compressed" if scheme is not None and isinstance(module, nn.Linear) else None


def describe_quantizer(checkpoint: Checkpoint, kernels: list[str], unpacked: bool, assembled: str | None) -> list[str]:
    """Returns the package that opens a quantized checkpoint, its version and what computes; nothing for a plain one.

    `assembled` says why lighten put its weights together, if it did.
    """
    stored_in = checkpoint.quantization or {}
    if assembled is not None:
        groups = stored_in.get("config_groups", {}).values()
        rounded = any(each.get("input_activations") for each in groups)
        inputs = "; its inputs, which kernels round, are not rounded here" if rounded else ""
        return [f"weights unpacked by lighten, for {assembled}{inputs}"]
    if (stored_as := FORMATS.get(stored_in.get("quant_method", ""))) is None:
        return []
    package = stored_as.pip_names[1]
    how = "weights unpacked to float32" if unpacked else f"{', '.join(kernels) or 'its own'} kernel"
    return [f"{package} {version(package)} ({how})"]


def unpack_linears(model: Any) -> bool:
    """Replaces linear layers with quantized weights and plain inputs by dense ones. Returns whether there were any.

    Layers that also quantize their inputs keep their own arithmetic.
    """
    found = False
    if any(stored(module) == "compressed" for module in model.modules()):
        model.hf_quantizer.compressor.remove_decompression_hook(model)  # what it does at the first batch is done here
    for name, module in list(model.named_modules()):
        weight = _weight(module)
        if weight is None:
            continue
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(module, "bias", None)
        if bias is not None:
            dense.bias = nn.Parameter(bias.float(), requires_grad=False)
        model.set_submodule(name, dense)
        found = True
    if found:  # some loaders keep the type that the rest of the model is stored in
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return found


def _weight(module: Any) -> Tensor | None:
    """Returns the float32 weight `[out, in]` of a quantized linear; None if there is none."""
    kind = stored(module)
    if kind == "gptq":
        module.scales = module.scales.float()
        # the class's own function: the instance's is wrapped by torch.compile and would be compiled for every layer
        weight: Tensor = type(module).dequantize_weight(module).T.contiguous()
        return weight
    if kind == "awq":
        return Awq({}).weight({name: getattr(module, name) for name in ("qweight", "qzeros", "scales")})
    if kind == "bnb" and module.weight.quant_state.quant_type in ("nf4", "fp4"):
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
        return dense.float()
    if kind == "compressed":
        from compressed_tensors.compressors import decompress_module

        exact = _float_blocks(module)
        if module.quantization_scheme.input_activations is not None:
            # its inputs are rounded as they come; its weight once, here, and not anew for every batch
            decompress_module(module)
            if exact is not None:
                module.weight = nn.Parameter(exact, requires_grad=False)
            module.quantization_scheme = module.quantization_scheme.model_copy(update={"weights": None})
            return None
        if exact is not None:
            return exact
        decompress_module(module, leave_decompressed=False)
        found: Tensor = module.weight.detach()
        return found.float()
    return None


def _float_blocks(module: Any) -> Tensor | None:
    """Returns the weight of a linear in 4-bit floats, of which the package keeps bfloat16; None for another format."""
    packed = getattr(module, "weight_packed", None)
    if packed is None or packed.dtype != torch.uint8:
        return None
    return float_blocks(packed.data, module.weight_scale.data, getattr(module, "weight_global_scale", None))


def repack(model: nn.Module) -> None:
    """Lays out the weights of linear layers for oneDNN, whose float32 is over twice as fast as MKL's on AMD."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for name, module in list(model.named_modules()):
        plain = type(module) is nn.Linear and stored(module) is None
        if plain and module.weight.dtype == torch.float32:
            model.set_submodule(name, _PackedLinear(module))


class _PackedLinear(nn.Module):
    """A float32 linear layer by oneDNN, as torch.compile's freezing makes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), BATCH_TOKENS["cpu"]
        )

    def __getattr__(self, name: str) -> Any:
        """Gives the weight back to a model that looks at it: from then on the layer is an ordinary one."""
        if name == "weight" and self.packed is not None:
            packed, self.packed = self.packed, None
            self.register_parameter("weight", nn.Parameter(packed.to_dense(), requires_grad=False))
        return super().__getattr__(name)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns inputs `[..., in]` times the transposed weight, plus the bias."""
        if self.packed is None:
            return nn.functional.linear(inputs, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return product
