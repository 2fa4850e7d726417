"""ExecuTorch's package with the operators of language models, which are registered by their import."""

from __future__ import annotations

from typing import Any

from lighten.errors import Failure, missing_extra

PROGRAM = "model.pte"
FORWARD = "forward"
BACKEND = "XnnpackBackend"


def load(purpose: str) -> Any:
    """Returns the runtime of ExecuTorch (`executorch.runtime.Runtime`), its operators for caches and codes registered.

    Raises:
        RequestError: executorch is not installed.
        Failure: the installed one was built without XNNPACK.
    """
    try:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime
    except ImportError as error:
        raise missing_extra("executorch", str(error.name or "executorch"), purpose) from error
    except OSError as error:  # its operators were built for another torch
        raise Failure(f"executorch cannot load its operators: {' '.join(str(error).split())[:200]}") from error
    runtime = Runtime.get()
    if not runtime.backend_registry.is_available(BACKEND):
        raise Failure("the installed executorch was built without XNNPACK: pip install --force-reinstall executorch")
    return runtime
