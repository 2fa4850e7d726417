"""A Hugging Face model directory as an ONNX directory, by the model builder of onnxruntime-genai.

The builder lays out the graph and rounds the weights that are not rounded yet. Two things are done here afterwards:
weights of GPTQ and AWQ checkpoints replace the builder's, and embedding and head stay at 8 bits. The same input gives
the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.onnx.builder import expected
from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.step import Context, Report

if TYPE_CHECKING:
    from lighten.export.onnx.settings import Onnx
    from lighten.export.onnx.weights import Packed, Quantized

GRAPH = "model.onnx"
DATA = "model.onnx.data"
CONFIG = "genai_config.json"
EMBEDDING, HEAD = "/model/embed_tokens/Gather", "/lm_head/MatMul"
_BLOCK = {"attn": anatomy.ATTENTION, "mlp": anatomy.MLP}
"""What the builder calls the halves of a layer, and what they are called in a checkpoint."""
_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")


def write(source: Path, out: Path, step: Onnx, context: Context) -> dict[str, Any]:
    """Writes a causal language model into the existing directory `out`, and returns its facts.

    Raises:
        RequestError: a setting that this model cannot have.
        Failure: the builder failed, or a quantized linear has no place in its graph.
    """
    from lighten.model import tokenizer_files
    from lighten.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(source)
    facts = checkpoint.facts
    precision = step.resolved_precision(facts)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        scratch = Path(folder)
        start, quantized = source, None
        if checkpoint.quantization:
            from lighten.export.onnx.weights import Quantized

            start, quantized = scratch / "plain", Quantized(checkpoint)
            _without_codes(quantized, start)
        elif facts.architecture.startswith("Gemma"):
            start = scratch / "wide"
            _widened(source, checkpoint.config, start)
        options = _options(step, facts, precision, quantized, context.trust_remote_code)
        target = precision if quantized is None else ("fp32" if step.provider == "cpu" else "fp16")
        with _quiet(context.report, facts.layers):
            build(start, scratch / "graph", target, step.provider, options)
        told = finish(scratch / "graph", out, step, precision, quantized, facts.hidden)
        for file in sorted((scratch / "graph").iterdir()):
            if file.is_file() and file.name not in (GRAPH, DATA):
                shutil.copyfile(file, out / file.name)
        tokenizer_files.write_templates(tokenizer_files.chat_templates(source), out)
    _write_config(checkpoint.config, out)
    return {
        "format": "onnx",
        "graph": "genai",
        "precision": precision,
        "provider": step.provider,
        **({} if quantized is None else {"weights": f"kept from {quantized.method}"}),
        **told,
    }


def build(source: Path, out: Path, precision: str, provider: str, options: dict[str, Any]) -> None:
    """Calls the builder on a model directory. Nothing is fetched.

    Raises:
        RequestError: the builder refuses the model or a setting.
    """
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise missing_extra("onnx", str(error.name or "onnxruntime-genai"), "ONNX export") from error
    cache = out.with_name("cache")
    try:
        builder.check_extra_options(None, str(source), str(out), precision, provider, str(cache), options)
        expected(options["hf_details"]["hf_config"])
        builder.create_model(None, str(source), str(out), precision, provider, str(cache), **options)
    except (ValueError, NotImplementedError) as error:
        raise RequestError(f"onnxruntime-genai's builder refuses {source.name}: {error}") from error
    except (KeyError, AttributeError, TypeError, IndexError, RuntimeError) as error:
        raise Failure(
            f"onnxruntime-genai's builder failed ({type(error).__name__}: {error}); graph: plain may do instead"
        ) from error


def _options(
    step: Onnx, facts: ModelFacts, precision: str, quantized: Quantized | None, trusted: bool
) -> dict[str, Any]:
    """Returns the builder's options."""
    # caches of the length of a window would need a runtime that knows when to wrap them around
    options: dict[str, Any] = {"hf_token": "false", "hf_remote": trusted, "windowed_kv_cache": False}
    if quantized is not None:
        return {**options, "fuse_qkv": _alike(quantized, facts.layers)}
    if precision in ("int4", "int8"):
        options |= {"block_size": step.block_size, "is_symmetric": step.symmetric, "algo_config": step.algorithm}
        options["accuracy_level"] = step.accuracy_level
        kept = _kept_nodes(step.ignore, facts.layers)
        if precision == "int8" or step.embedding != "int4":
            kept += [HEAD, EMBEDDING]
        if kept:
            options["nodes_to_exclude"] = kept
    return options


def _kept_nodes(patterns: Sequence[str], layers: int) -> list[str]:
    """Returns the nodes of the linears that patterns name.

    Raises:
        RequestError: a pattern names none.
    """
    names = {
        anatomy.layer(layer) + linear: f"/model/layers.{layer}/{part}/{anatomy.short(linear)}/MatMul"
        for layer in range(layers)
        for part, block in _BLOCK.items()
        for linear in anatomy.LINEARS
        if linear.startswith(f"{block}.")
    }
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith("re:"):
            matches = [node for name, node in names.items() if re.fullmatch(pattern[3:], name)]
        else:
            matches = [node for name, node in names.items() if fnmatch(name, pattern)]
        if not matches:
            raise RequestError(
                f"ignore: no linear is called {pattern!r}; names are such as {anatomy.layer(0)}{anatomy.DOWN}, "
                "and embedding and head are the setting `embedding`"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _alike(quantized: Quantized, layers: int) -> bool:
    """Returns whether queries, keys and values of every layer can share one operator."""
    names = set(quantized.names)
    for layer in range(layers):
        linears = [anatomy.layer(layer) + name for name in (anatomy.QUERY, anatomy.KEY, anatomy.VALUE)]
        present = [name for name in linears if name in names]
        if present and (len(present) < 3 or len({quantized.layout(name) for name in linears}) > 1):
            return False
    return True


def _without_codes(quantized: Quantized, out: Path) -> None:
    """Writes a checkpoint with empty weights in place of quantized ones. The builder only needs their shapes."""
    import torch

    from lighten.model.shards import ShardWriter

    checkpoint = quantized.checkpoint
    out.mkdir()
    inside = tuple(f"{name}.{part}" for name in quantized.names for part in ("qweight", "qzeros", "scales", "g_idx"))
    others = sorted(set(checkpoint.weight_map) - set(inside))
    with ShardWriter(out, len(checkpoint.weight_map)) as writer:
        for name in others:
            writer.add(name, checkpoint.tensor(name))
        for name in quantized.names:
            writer.add(f"{name}.weight", torch.zeros(quantized.shape(name), dtype=torch.bfloat16))
    checkpoint.write_others(out, _plain(checkpoint.config))


def _widened(source: Path, config: dict[str, Any], out: Path) -> None:
    """Writes links to the files of a model that the builder is to load in float32.

    It adds 1 to the weights of Gemma's norms in the type that they are loaded in, and bfloat16 has 8 bits for the sum.
    """
    out.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (out / file.name).symlink_to(file.resolve())
    wide = {key: value for key, value in config.items() if key != "torch_dtype"}
    (out / "config.json").write_text(json.dumps({**wide, "dtype": "float32"}))


def finish(
    folder: Path, out: Path, step: Onnx, precision: str, quantized: Quantized | None, hidden: int
) -> dict[str, Any]:
    """Puts kept weights, embedding and head into the builder's graph, and writes it; returns facts."""
    import onnx_ir as ir

    from lighten.export.onnx.graph import Surgery

    model = ir.load(folder / GRAPH)
    surgery = Surgery(model, step.accuracy_level)
    told: dict[str, Any] = {}
    surgery.scale_embedding(hidden**0.5)
    if quantized is not None:
        _place(surgery, quantized)
    if precision in ("int4", "int8") or quantized is not None:
        kind = "int8" if precision == "int8" and step.embedding == "int4" else step.embedding
        told = surgery.embed(kind, step.block_size)
    model.producer_version = _builder_version()
    ir.save(model, out / GRAPH, external_data=DATA, size_threshold_bytes=256)
    return told


def _builder_version() -> str:
    """Returns the version of the builder from its package.

    The builder itself adds the commit of the repository around its environment. Then the bytes of a file would depend
    on an unrelated checkout.
    """
    import onnxruntime_genai

    commit = str(getattr(onnxruntime_genai, "__commit__", None) or "")[:7]
    return f"{onnxruntime_genai.__version__}{'+' if commit else ''}{commit}"


def _place(surgery: Any, quantized: Quantized) -> None:
    """Replaces products of the graph by a checkpoint's quantized linears."""
    left = set(quantized.names)
    for node in surgery.products():
        names = _linears(node, left)
        if names:
            surgery.replace(node, _packed(quantized, names))
            left -= set(names)
    if left:
        raise Failure(
            f"{min(left)} is quantized, but the builder's graph has no place for it: set graph: plain, which unpacks "
            "the weights, or export its source"
        )


def _linears(node: str, quantized: set[str]) -> list[str]:
    """Returns the quantized linears that a product of the graph stands for."""
    if node == HEAD:
        return [anatomy.HEAD] if anatomy.HEAD in quantized else []
    found = _NODE.fullmatch(node)
    if not found:
        return []
    layer, part, name = found.groups()
    inside = f"{anatomy.layer(int(layer))}{_BLOCK[part]}."
    names = [inside + name]
    if name == "qkv_proj" and names[0] not in quantized:
        names = [anatomy.layer(int(layer)) + each for each in (anatomy.QUERY, anatomy.KEY, anatomy.VALUE)]
    return [each for each in names if each in quantized]


def _packed(quantized: Quantized, names: list[str]) -> Packed:
    from lighten.export.onnx.weights import join, pack

    parts = [pack(quantized.codes(name), name) for name in names]
    return parts[0] if len(parts) == 1 else join(parts)


def _write_config(config: dict[str, Any], out: Path) -> None:
    """Writes the model's config.json, from which sizes are read again."""
    (out / "config.json").write_text(json.dumps(_plain(config), indent=2) + "\n")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


class _Listener(io.TextIOBase):
    """Takes the builder's output and reports progress: the layers it has read."""

    def __init__(self, report: Report, layers: int) -> None:
        self._report, self._layers = report, layers

    def write(self, text: str) -> int:
        if found := re.search(r"Reading layer (\d+)", text):
            self._report(int(found.group(1)) + 1, self._layers + 1, "layers read")
        return len(text)


@contextlib.contextmanager
def _quiet(report: Report, layers: int) -> Iterator[None]:
    """Keeps the builder, its progress bars and onnxruntime's quantizer from printing."""
    from transformers.utils import logging as transformers_logging

    talkative = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    report(0, layers + 1, "opening")
    try:
        with contextlib.redirect_stdout(_Listener(report, layers)), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        talkative.setLevel(level)
