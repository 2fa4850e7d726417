"""A causal language model as an ExecuTorch program for XNNPACK."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lighten.errors import Failure
from lighten.export.executorch.cached import Cached
from lighten.export.onnx.quiet import quiet

CHUNK = 128
"""Maximum number of tokens of a call."""
LOGITS = 1 << 26
"""Bytes that the logits of a call may take. The program reserves them."""
_SAMPLE, _START = 5, 3
"""Number of tokens and their place, with which a model is traced: none is 0 or 1, which torch.export takes for
constants."""


def chunk(vocab: int, context: int) -> int:
    """Returns the number of tokens that a call may take."""
    most = min(CHUNK, context)
    while most > 8 and most * vocab * 4 > LOGITS:
        most //= 2
    return most


def build(
    model: Any, context: int, bits: int, ends: tuple[int, list[int]], out: Path, report: Callable[[str], None]
) -> dict[str, int]:
    """Writes a program.

    Args:
        model: a causal model with the attention of `cached`, its weights in float32 or in codes.
        context: positions of the cache.
        bits: bits of most weights, which the program tells.
        ends: id that begins a text, and ids that end one.
        out: file to write.
        report: is told each stage.

    Returns:
        Number of parts that XNNPACK runs, and of operators outside of them.

    Raises:
        Failure: the model cannot be traced, or ExecuTorch does not take it.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    from lighten.export.executorch.parts import Partitioner

    vocab = model.get_output_embeddings().out_features
    most = chunk(vocab, context)
    told = {
        "get_max_seq_len": most,
        "get_max_context_len": context,
        "get_vocab_size": vocab,
        "get_bos_id": ends[0],
        "get_eos_ids": ends[1],
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_weight_bits": bits,
    }
    try:
        with quiet(), torch.no_grad(), _shapes_alone():
            report("tracing")
            ids, place = torch.zeros((1, _SAMPLE), dtype=torch.int64), torch.tensor([_START])
            shapes = ({1: torch.export.Dim("tokens", min=1, max=most)}, None)
            traced = torch.export.export(Cached(model, context), (ids, place), dynamic_shapes=shapes, strict=False)
            report("lowering")
            lowered = to_edge_transform_and_lower(
                traced,
                partitioner=[Partitioner()],
                constant_methods=told,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
            targets = [node.target for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
            report("writing")
            # the inputs stay where the caller has them
            memory = MemoryPlanningPass(alloc_graph_input=False)
            done = lowered.to_executorch(
                ExecutorchBackendConfig(extract_delegate_segments=True, memory_planning_pass=memory)
            )
            with out.open("wb") as file:
                done.write_to_file(file)
    except Failure:
        raise
    except Exception as error:  # torch and executorch raise errors without a common class
        raise Failure(
            f"{type(model).__name__} cannot be made an ExecuTorch program ({_reason(error)}): write it as GGUF, or as "
            "ONNX for onnxruntime on the device"
        ) from error
    names = [getattr(target, "__name__", str(target)) for target in targets]
    parts = sum("executorch_call_delegate" in name for name in names)
    return {"xnnpack_parts": parts, "operators_outside": sum("getitem" not in name for name in names) - parts}


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """Lets torchao's operators tell the shapes of their results without twenty other operators that compute them.

    ExecuTorch asks for the shapes in each of its passes, so they are most of the time of a conversion.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torchao.quantization import quant_primitives as own

    names = ("_quantize_affine_no_dtype_cast", "_dequantize_affine_no_dtype_check")
    kept = {name: getattr(own, name) for name in names}

    def alone(compute: Callable[..., Any]) -> Callable[..., Any]:
        def found(input: Any, *others: Any, **named: Any) -> Any:
            return input.float() if isinstance(input, FakeTensor) else compute(input, *others, **named)

        return found

    for name, each in kept.items():
        setattr(own, name, alone(each))
    try:
        yield
    finally:
        for name, each in kept.items():
            setattr(own, name, each)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
