"""Models as graphs of standard ONNX operators, by the exporter of torch that is based on `torch.export`.

A causal language model becomes `model.onnx`, which takes ids, mask, positions and a key-value cache and gives logits
and the longer cache. An encoder becomes `model.onnx` without a cache. A sequence-to-sequence model becomes
`encoder_model.onnx`, which also gives the keys and values that the decoder's layers attend to, and
`decoder_model.onnx`, which takes them beside its own cache.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lighten.errors import Failure, RequestError, missing_extra
from lighten.facts import ModelFacts
from lighten.model.files import without_pickles
from lighten.step import Context

OPSET = 20
BATCH, LENGTH, PAST, SOURCE = 2, 3, 5, 4
"""Sizes of the inputs that the graphs are traced with: none is 0 or 1, which torch.export takes for constants."""
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest difference from torch, relative to the largest output."""
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Traced:
    """A module to trace, with example inputs, their dynamic axes and the names of all that enters and leaves."""

    file: str
    module: nn.Module
    inputs: tuple[Any, ...]
    axes: tuple[Any, ...]
    entering: list[str]
    leaving: list[str]


def write(source: Path, out: Path, facts: ModelFacts, precision: str, context: Context) -> dict[str, Any]:
    """Writes the graphs of a model into the existing directory `out`, and returns facts.

    Raises:
        RequestError: a missing package, or a model that transformers has no class for.
        Failure: torch cannot trace the model, or a graph does not compute the same.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra("onnx", str(error.name), "ONNX export") from error
    model = _open(source, facts, torch.float16 if precision == "fp16" else torch.float32, context.trust_remote_code)
    makers = {"causal": _causal, "encoder": _encoder, "seq2seq": _seq2seq}
    traced = makers[facts.family](model)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        for number, each in enumerate(traced):
            context.report(number, len(traced), f"tracing {each.file}")
            path = Path(folder) / each.file
            _export(each, path)
            onnx.checker.check_model(path)
            _compare(each, path, TOLERANCE[precision if precision == "fp16" else "fp32"])
            if precision == "int8":
                _quantize(path)
            _only_standard(path)
            for file in sorted(Path(folder).glob(f"{path.name}*")):
                shutil.move(file, out / file.name)
        context.report(len(traced), len(traced), "")
    _copy_others(source, out)
    return {
        "format": "onnx",
        "graph": "plain",
        "precision": precision,
        "opset": OPSET,
        "files": [each.file for each in traced],
        **({"weights": "rounded to 8 bits for each output, inputs as they come"} if precision == "int8" else {}),
    }


def _open(source: Path, facts: ModelFacts, dtype: torch.dtype, trusted: bool) -> Any:
    import transformers

    from lighten.model.loading import from_pretrained

    name = facts.architecture
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        found = None  # the name is the file's: no other class is called
    if found is None and facts.family == "causal":
        found = transformers.AutoModelForCausalLM
    if found is None:
        raise RequestError(f"transformers has no class {name}: name one of its own under architectures in config.json")
    options = {"trust_remote_code": trusted} if found is transformers.AutoModelForCausalLM else {}
    with _quiet():
        model = from_pretrained(found, source, dtype=dtype, attn_implementation="eager", **options)
    return model.eval()


class _CausalCell(nn.Module):
    """A causal language model with its cache as pairs of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Pairs) -> Any:
        from transformers.cache_utils import DynamicCache

        cache = _filled(DynamicCache(), past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, _pairs(output.past_key_values)


class _EncoderCell(nn.Module):
    """An encoder with its tensors as a tuple."""

    def __init__(self, model: Any, entering: list[str], leaving: list[str]) -> None:
        super().__init__()
        self.model, self.entering, self.leaving = model, entering, leaving

    def forward(self, *inputs: Tensor) -> Any:
        output = self.model(**dict(zip(self.entering, inputs, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.leaving)


class _SourceCell(nn.Module):
    """The encoder of a sequence-to-sequence model, and the keys and values that its decoder attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # one step of the decoder, of which only what depends on the source is kept
        step = self.model(
            encoder_outputs=(hidden,),
            attention_mask=attention_mask,
            decoder_input_ids=torch.zeros_like(input_ids[:, :1]),
            use_cache=True,
        )
        return hidden, _pairs(step.past_key_values.cross_attention_cache)


class _TargetCell(nn.Module):
    """The decoder of a sequence-to-sequence model, with its own cache and what it attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, cross: Pairs, past: Pairs) -> Any:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(_filled(DynamicCache(), past), _filled(DynamicCache(), cross))
        for layer in range(len(cross)):
            cache.is_updated[layer] = True
        key = cross[0][0]
        # the decoder reads its shape only: keys and values are in the cache
        source = torch.zeros(key.shape[0], key.shape[2], self.model.config.d_model, dtype=key.dtype)
        output = self.model(
            encoder_outputs=(source,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, _pairs(output.past_key_values.self_attention_cache)


def _filled(cache: Any, pairs: Pairs) -> Any:
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    return cache


def _pairs(cache: Any) -> Pairs:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _ids(model: Any, *shape: int) -> Tensor:
    return torch.randint(
        0, model.config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0)
    )


def _random(pairs: Pairs, length: int) -> Pairs:
    """Returns a cache of another length, of the sizes of `pairs`."""
    generator = torch.Generator().manual_seed(0)

    def made(like: Tensor) -> Tensor:
        size = (BATCH, like.shape[1], length, like.shape[3])
        return torch.randn(size, generator=generator).to(like.dtype)

    return [(made(key), made(value)) for key, value in pairs]


@torch.no_grad()
def _causal(model: Any) -> list[Traced]:
    probe = model(input_ids=_ids(model, 1, 2), use_cache=True).past_key_values
    past = _random(_pairs(probe), PAST)
    positions = torch.arange(PAST, PAST + LENGTH)[None].repeat(BATCH, 1)
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64)
    step, whole = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    cached = {0: "batch_size", 2: "past_sequence_length"}
    return [
        Traced(
            "model.onnx",
            _CausalCell(model),
            (_ids(model, BATCH, LENGTH), mask, positions, past),
            (step, whole, step, [(cached, cached)] * len(past)),
            ["input_ids", "attention_mask", "position_ids", *_names("past_key_values", len(past))],
            ["logits", *_names("present", len(past))],
        )
    ]


@torch.no_grad()
def _encoder(model: Any) -> list[Traced]:
    inputs = {"input_ids": _ids(model, BATCH, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    leaving = [name for name, value in model(**inputs, return_dict=True).items() if isinstance(value, Tensor)]
    axes = {0: "batch_size", 1: "sequence_length"}
    cell = _EncoderCell(model, list(inputs), leaving)
    # inputs that are passed on as *inputs are one argument of the module
    return [Traced("model.onnx", cell, tuple(inputs.values()), ((axes,) * len(inputs),), list(inputs), leaving)]


@torch.no_grad()
def _seq2seq(model: Any) -> list[Traced]:
    mask = torch.ones(BATCH, SOURCE, dtype=torch.int64)
    ids = _ids(model, BATCH, SOURCE)
    probe = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    cross, past = _pairs(probe.cross_attention_cache), _random(_pairs(probe.self_attention_cache), PAST)
    source, target = {0: "batch_size", 1: "source_length"}, {0: "batch_size", 1: "sequence_length"}
    attended, cached = {0: "batch_size", 2: "source_length"}, {0: "batch_size", 2: "past_sequence_length"}
    count = len(past)
    return [
        Traced(
            "encoder_model.onnx",
            _SourceCell(model),
            (ids, mask),
            (source, source),
            ["input_ids", "attention_mask"],
            ["last_hidden_state", *_names("cross", count)],
        ),
        Traced(
            "decoder_model.onnx",
            _TargetCell(model),
            (_ids(model, BATCH, LENGTH), mask, cross, past),
            (target, source, [(attended, attended)] * count, [(cached, cached)] * count),
            ["input_ids", "encoder_attention_mask", *_names("cross", count), *_names("past_key_values", count)],
            ["logits", *_names("present", count)],
        ),
    ]


def _export(traced: Traced, path: Path) -> None:
    """Writes a graph, weights beside it, without the places in source code where its nodes come from."""
    import onnx_ir as ir

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced.module.eval(),
                traced.inputs,
                dynamo=True,
                dynamic_shapes=traced.axes,
                input_names=traced.entering,
                output_names=traced.leaving,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch's own errors share no base class
        reason = " ".join(str(error).split())[:400]
        raise Failure(
            f"torch cannot trace {type(traced.module.model).__name__} ({reason}); a plain graph needs that"
        ) from error
    assert program is not None
    model = program.model
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "model"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=256)


def _feed(traced: Traced) -> dict[str, np.ndarray[Any, Any]]:
    flat = _flat(traced.inputs)
    return {name: value.numpy() for name, value in zip(traced.entering, flat, strict=True)}


def _flat(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [each for value in values for each in _flat(value)]


def _compare(traced: Traced, path: Path, tolerance: float) -> None:
    """Runs a graph once on the inputs it was traced with.

    Raises:
        Failure: its outputs are not torch's.
    """
    with torch.no_grad():
        expected = _flat(traced.module(*traced.inputs))
    session = open_session(path)
    taken = {each.name for each in session.get_inputs()}
    found = session.run(traced.leaving, {name: value for name, value in _feed(traced).items() if name in taken})
    for name, wanted, got in zip(traced.leaving, expected, found, strict=True):
        wide = wanted.float().numpy()
        gap = float(np.abs(wide - got.astype(np.float32)).max() / max(np.abs(wide).max(), 1e-6))
        if not gap <= tolerance:
            raise Failure(
                f"{traced.file} gives another {name} than torch ({gap:.1e} off): it cannot be exported this way"
            )


def open_session(path: Path) -> Any:
    """Returns an onnxruntime session on the CPU that reports nothing but errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _quantize(path: Path) -> None:
    """Rounds the weights of products to 8 bits by onnxruntime; what enters them is rounded as it comes.

    `DynamicQuantizeLinear` and `MatMulInteger` are operators of ONNX itself.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_name(f"rounded-{path.name}")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with _quiet():
            quantize_dynamic(
                path,
                rounded,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        root.setLevel(level)
    _rewrite(rounded, path)


def _rewrite(source: Path, target: Path) -> None:
    """Writes a graph again under the name `target`, and removes the other."""
    import onnx_ir as ir

    model = ir.load(source)
    for unused in [domain for domain in model.opset_imports if domain and not _uses(model, domain)]:
        del model.opset_imports[unused]
    kept = target.with_name(f"again-{target.name}")
    ir.save(model, kept, external_data=f"{target.name}.again", size_threshold_bytes=256)
    model = ir.load(kept)
    target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=256)
    for file in (source, source.with_name(f"{source.name}.data"), kept, target.with_name(f"{target.name}.again")):
        file.unlink(missing_ok=True)


def _uses(model: Any, domain: str) -> bool:
    return any(node.domain == domain for node in model.graph)


def _only_standard(path: Path) -> None:
    """Raises Failure if a graph has an operator that is not ONNX's own."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    if others := sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")}):
        raise Failure(f"{path.name} needs operators beyond ONNX's own: {', '.join(others)}")
    onnx.checker.check_model(path)


def _copy_others(source: Path, out: Path) -> None:
    """Copies config, tokenizer and chat templates."""
    from lighten.model.tokenizer_files import copy_templates

    copy_templates(source, out)
    for file in without_pickles(source):
        known = file.suffix in (".json", ".model", ".txt", ".jinja") or file.name.startswith("LICENSE")
        if known and not file.name.endswith(".index.json") and file.name != "artifact.json":
            shutil.copyfile(file, out / file.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch and transformers from printing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
