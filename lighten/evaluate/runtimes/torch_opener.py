"""What is known of transformers as a runtime, without torch: the memory of other runtimes is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lighten.errors import RequestError
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.runtime import Runtime


class TorchOpener(Opener[Path]):
    """Model directories of Hugging Face. It is asked last, so it says why no runtime opens a path."""

    name: ClassVar[str] = "torch"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "gptqmodel")
    weights: ClassVar[tuple[str, ...]] = (".safetensors",)
    compressible: ClassVar[bool] = True
    takes_options: ClassVar[bool] = True
    profiler: ClassVar[str | None] = "lighten.evaluate.profiling.torch:phases"
    tracer: ClassVar[str | None] = "lighten.evaluate.runtimes.trace:of_torch"

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`.

        Raises:
            RequestError: the path is no model directory.
        """
        if isinstance(target, str):
            return None
        if not target.is_dir():
            found = "is neither a .gguf file nor a model directory" if target.exists() else "does not exist"
            raise RequestError(f"cannot measure {target}: it {found}")
        if not any(target.glob("*.safetensors")) and not (target / "config.json").is_file():
            raise RequestError(f"{target} holds neither a config.json nor a .gguf file: not a model")
        return target

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`."""
        if not self.predicts_tokens(place):
            from lighten.evaluate.runtimes.torch_texts import TorchTexts

            return TorchTexts(place, conditions)
        from lighten.evaluate.runtimes.torch import TorchRuntime

        return TorchRuntime(
            place,
            conditions.device,
            conditions.dtype,
            conditions.trust_remote_code,
            conditions.options,
            conditions.arithmetic,
        )

    def open_exact(self, place: Path, trust_remote_code: bool) -> Runtime:
        """Opens a model in float32. Weights of 16 bits stay as they are stored."""
        import numpy as np

        from lighten.evaluate.runtimes.lean import open_lean, stored_short

        exact = Conditions(trust_remote_code=trust_remote_code)
        short = stored_short(place)
        if not short:
            return self.open(place, exact)
        lean = open_lean(place, short, trust_remote_code=trust_remote_code)
        try:
            lean.logits(np.arange(2))
        except (RuntimeError, TypeError):  # a module reads weights of another one, and finds them in 16 bits
            lean.close()
            return self.open(place, exact)
        return lean

    def served_in(self, device: str) -> str:
        """Returns the type of number that a device multiplies fastest."""
        from lighten.model.stream import fast_dtype

        return str(fast_dtype(device)).removeprefix("torch.")

    def multiplies_in(self, dtype: str, device: str) -> str:
        """See `Opener`: in the type that the model was opened in; quantized weights are unpacked to it."""
        return dtype

    def predicts_tokens(self, place: Path) -> bool:
        """See `Opener`."""
        from lighten.model.checkpoint import Checkpoint

        return Checkpoint(place).facts.task == "causal"
