"""A measurement that is asked for: all that the process needs to know that does the work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.evaluate.measurement import MEASUREMENTS, Measurement


@dataclass(frozen=True)
class Reference:
    """The baseline as it was measured: its distributions are what a divergence is taken from."""

    measurement: Path
    """Directory of its perplexity measurement, with the hidden states."""
    model: Path


@dataclass(frozen=True)
class Request:
    """One measurement of one model; built once, and sent through the wall between processes once."""

    settings: Measurement
    model: Path
    """A model directory, a .gguf or an .onnx file."""
    tokenizer: Path
    """The model whose tokenizer gives the ids, unless its vocabulary is another than the model's own."""
    out: Path
    """An existing empty directory, for what was measured."""
    device: str
    trust_remote_code: bool
    """Whether code that lies beside the weights may run: the person's word, and no default."""
    draft: Path | None = None
    """A second model, which proposes tokens to the first."""
    arithmetic: str | None = None
    """What quality is measured in, the same for all models that are compared; None for what the device does best."""
    reference: Reference | None = None
    save_hidden: bool = False
    """Whether the measurement is to serve as a reference."""
    vocab: int | None = None
    """Size of the vocabulary that its logits should have; None for what its config says."""

    @property
    def own_tokenizer(self) -> bool:
        """Whether the ids are the model's own."""
        return self.tokenizer == self.model

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
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Request:
        """Returns the request that `payload` was made from."""
        draft, against = payload["draft"], payload["reference"]
        return cls(
            MEASUREMENTS.load(payload["measurement"]).model_validate(payload["settings"]),
            model=Path(payload["model"]),
            tokenizer=Path(payload["tokenizer"]),
            out=Path(payload["out"]),
            device=payload["device"],
            trust_remote_code=payload["trust_remote_code"],
            draft=Path(draft) if draft else None,
            arithmetic=payload["arithmetic"],
            reference=Reference(Path(against["measurement"]), Path(against["model"])) if against else None,
            save_hidden=payload["save_hidden"],
            vocab=payload["vocab"],
        )
