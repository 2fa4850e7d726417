"""The request for a measurement: everything that the measuring process needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lighten.errors import RequestError
from lighten.evaluate.measurement import MEASUREMENTS, Measurement

Asked = TypeVar("Asked", bound=Measurement, covariant=True)
"""Settings of the measurement that is asked for."""


@dataclass(frozen=True)
class Reference:
    """The measured baseline: divergence is computed from its distributions."""

    measurement: Path
    """Directory of its perplexity measurement, with the hidden states."""
    model: Path


@dataclass(frozen=True)
class Request(Generic[Asked]):
    """One measurement of one model. It is built once, and sent to another process once."""

    settings: Asked
    model: Path | str
    """A model directory, a .gguf or an .onnx file; as text the address of a model on a server."""
    tokenizer: Path | str
    """Model whose tokenizer gives the ids, unless its vocabulary differs from the model's own."""
    out: Path
    """Existing empty directory for the results."""
    device: str
    trust_remote_code: bool
    """Whether code beside the weights may run. Only the person decides, so there is no default."""
    draft: Path | None = None
    """Second model, which proposes tokens to the first."""
    arithmetic: str | None = None
    """Arithmetic of quality, the same for all compared models; None for the device's best."""
    reference: Reference | None = None
    save_hidden: bool = False
    """Whether the measurement will serve as a reference."""
    vocab: int | None = None
    """Expected size of the vocabulary of its logits; None for the size in its config."""
    server: dict[str, Any] | None = None
    """Facts about the server that lighten has started for it, at whose address `model` is; None without one."""

    @property
    def own_tokenizer(self) -> bool:
        """Whether the ids are the model's own."""
        return self.tokenizer == self.model

    @property
    def file(self) -> Path:
        """The model's directory or file.

        Raises:
            RequestError: it is on a server.
        """
        return self._file(self.model)

    @property
    def tokenizer_file(self) -> Path:
        """The directory or file of the model whose tokenizer is used. Errors are those of `file`."""
        return self._file(self.tokenizer)

    def _file(self, target: Path | str) -> Path:
        if isinstance(target, str):
            raise RequestError(f"{self.settings.name} needs the files of a model, and {target} is on a server")
        return target

    def payload(self) -> dict[str, Any]:
        """Returns the request as JSON."""
        against = self.reference
        return {
            "measurement": self.settings.name,
            "settings": self.settings.model_dump(mode="json"),
            "model": str(self.model),
            "tokenizer": str(self.tokenizer),
            "out": str(self.out),
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "draft": str(self.draft) if self.draft else None,
            "arithmetic": self.arithmetic,
            "reference": {"measurement": str(against.measurement), "model": str(against.model)} if against else None,
            "save_hidden": self.save_hidden,
            "vocab": self.vocab,
            "server": self.server,
        }

    @staticmethod
    def from_payload(payload: dict[str, Any]) -> Request[Measurement]:
        """Returns the request that `payload` was made from."""
        draft, against = payload["draft"], payload["reference"]
        return Request(
            MEASUREMENTS.load(payload["measurement"]).model_validate(payload["settings"]),
            model=_target(payload["model"]),
            tokenizer=_target(payload["tokenizer"]),
            out=Path(payload["out"]),
            device=payload["device"],
            trust_remote_code=payload["trust_remote_code"],
            draft=Path(draft) if draft else None,
            arithmetic=payload["arithmetic"],
            reference=Reference(Path(against["measurement"]), Path(against["model"])) if against else None,
            save_hidden=payload["save_hidden"],
            vocab=payload["vocab"],
            server=payload.get("server"),
        )


def _target(text: str) -> Path | str:
    return text if "://" in text else Path(text)
