"""Rounds the weights of a plain graph to 8 bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lighten.export.onnx.quiet import quiet


def round_weights(path: Path) -> None:
    """Rounds the weights of products to 8 bits by onnxruntime; their inputs are rounded as they come.

    `DynamicQuantizeLinear` and `MatMulInteger` are operators of ONNX itself.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_name(f"rounded-{path.name}")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with quiet():
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
    """Writes a graph again under the name `target`, and removes the old one."""
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
