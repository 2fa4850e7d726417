"""A model of transformers as an OpenVINO graph with its cache inside, by transformers' own exporter."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lighten.errors import Failure, RequestError
from lighten.export.onnx.quiet import quiet

BATCH, LENGTH, PAST = 2, 3, 5
"""Sizes of the inputs that a model is traced with: none is 0 or 1, which torch.export takes for constants."""
NEEDED = ("input_ids", "attention_mask", "beam_idx")
"""Inputs that openvino-genai gives to any model."""


def convert(model: Any) -> Any:
    """Returns the graph of a causal language model on the CPU (`openvino.Model`), its weights shared with the model.

    Weights of 16 bits stay so, and are multiplied in float32.

    Raises:
        RequestError: the installed transformers has no exporter to OpenVINO.
        Failure: the model cannot be traced, or its graph is none that openvino-genai runs.
    """
    try:
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        export = OpenVINOExporter.export_program
    except (ImportError, AttributeError) as error:
        raise RequestError(
            "the installed transformers has no exporter to OpenVINO that lighten knows: pip install 'lighten[openvino]'"
        ) from error
    name = type(model).__name__
    try:
        with quiet(), torch.no_grad():
            inputs, axes = _inputs(model)
            settings = OpenVINOConfig(dynamic=True, dynamic_shapes=axes)
            graph, _ = export(OpenVINOExporter(), model, inputs, settings)
            _join_attention(graph)
    except Exception as error:  # torch, transformers and openvino raise errors without a common class
        raise Failure(
            f"{name} cannot be made an OpenVINO graph ({_reason(error)}): write it as GGUF or ONNX, or serve it with "
            "transformers"
        ) from error
    taken = {each for port in graph.inputs for each in port.get_names()}
    if lacking := [each for each in NEEDED if each not in taken]:
        raise Failure(
            f"the OpenVINO graph of {name} takes no {' and no '.join(lacking)}, so openvino-genai cannot run it: write "
            "it as GGUF or ONNX, or serve it with transformers"
        )
    return graph


def _inputs(model: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns some tokens after others, whose cache the model fills itself; and the axes whose size may vary.

    Of a cache that holds more than keys and values nothing is said of the axes: torch finds them, which takes longer.
    """
    from transformers.exporters.utils import get_leaf_tensors

    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (BATCH, PAST + LENGTH), generator=torch.Generator().manual_seed(0))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    past = model(input_ids=ids[:, :PAST], use_cache=True)[name]
    inputs = {
        "input_ids": ids[:, PAST:],
        "attention_mask": torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + LENGTH)[None].repeat(BATCH, 1),
        name: past,
        "use_cache": True,
    }
    leaves = list(get_leaf_tensors(past).values())
    if any(leaf.dim() != 4 or leaf.shape[2] != PAST for leaf in leaves):
        return inputs, None
    free = torch.export.Dim.AUTO
    tokens = {each: {0: free, 1: free} for each in ("input_ids", "attention_mask", "position_ids")}
    return inputs, {**tokens, name: [{0: free, 2: free}] * len(leaves)}


def _join_attention(graph: Any) -> None:
    """Gives keys and values that several heads share the form in which the CPU plugin joins attention and cache.

    The plugin wants the shape that they are repeated to by itself, and no shape that is read off them.
    """
    import openvino.opset13 as ops

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        for port in (1, 2):
            reshape = node.input_value(port).get_node()
            if reshape.get_type_name() != "Reshape":
                continue
            repeat = reshape.input_value(0).get_node()
            if repeat.get_type_name() != "Broadcast":
                continue
            shape = repeat.input_value(1).get_node()
            if shape.get_type_name() == "Select":
                made = ops.broadcast(repeat.input_value(0), shape.input_value(1), broadcast_spec="BIDIRECTIONAL")
                repeat.output(0).replace(made.output(0))
    graph.validate_nodes_and_infer_types()


def _reason(error: BaseException) -> str:
    """Returns what stopped the exporter, without the advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
