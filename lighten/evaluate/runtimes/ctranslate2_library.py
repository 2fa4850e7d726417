"""CTranslate2 itself: a model of a directory, on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError, missing_extra
from lighten.evaluate import machine
from lighten.model import accelerator
from lighten.model.ctranslate2_source import compute_type_of


def open_library(model: str, folder: Path, device: str) -> Any:
    """Returns a `ctranslate2.Generator` or `ctranslate2.Translator` of a directory.

    Weights are computed with in the type that config.json names, else in that which they are stored in; or in the
    nearest one that the device computes.

    Raises:
        RequestError: CTranslate2 is missing, or has no support for the device, or does not know the type.
        Failure: it cannot load the model.
    """
    try:
        import ctranslate2
    except ImportError as error:
        raise missing_extra("ctranslate2", "ctranslate2", "running a model of CTranslate2") from error
    kind = "cpu" if device == "cpu" else "cuda"
    if kind == "cuda" and not ctranslate2.get_cuda_device_count():
        raise RequestError("CTranslate2 finds no CUDA device here: leave out the device")
    ctranslate2.set_log_level(40)
    products = compute_type_of(folder)
    if products in ("float16", "bfloat16") and products not in ctranslate2.get_supported_compute_types(kind):
        products = "float32"
    place = {"device_index": accelerator.index(device)} if kind == "cuda" else {"intra_threads": machine.cores()}
    try:
        return getattr(ctranslate2, model)(str(folder), device=kind, compute_type=products, inter_threads=1, **place)
    except (RuntimeError, ValueError) as error:
        raise Failure(f"CTranslate2 cannot load {folder}: {' '.join(str(error).split())[:400]}") from error
