"""What enters the keys of exports stays the same: an old store's objects are found again.

The keys of ONNX have changed once: its graphs are others since version 3 of the step.
"""

from typing import Any

import pytest

from lighten.pipeline.steps import step_class
from lighten.store.files import stage_key


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"format": "gguf"}, "86732b502496187a5a61efbdf37ab6c2c0d22b5ab37bb0f96a6180088cb5d73e"),
        ({"format": "gguf", "type": "F16"}, "bb84571f1f7f05e404be141d52e06bccca8b67252fd9dea5fbc622136cad5ffb"),
        ({"format": "gguf", "budget": "bits=4.5"}, "3cd792ce3705ae0629a378d8ffec1904ea19d1fa006ff12f13daebe34094fd2e"),
        (
            {"format": "gguf", "type": "Q4_K_M", "imatrix": True, "split": "1GB"},
            "258ca96e44f63300a7c3bf00616074e5f0379f783c0bc0d5a038c6a8ac4f6717",
        ),
        ({"format": "onnx"}, "cb686d8db5b0ee9f1fc34527db1df84f4dc85271c6856d1b8bc63cc221879dfe"),
        (
            {"format": "onnx", "graph": "plain", "precision": "int8"},
            "7d437418fc09c33d572d368575c13c1be95e35ff8bcccd89585abb21d711e39c",
        ),
        ({"format": "bundle", "target": "rpi5"}, "a05285215665a70f686f5d288627182705a78840a9e2e56cb80b889b122229bb"),
        (
            {"format": "gguf", "parity": {"top1": 0.9}},
            "e8a5021fe8025b9560d1521f8118e87a166a8003c14147ed0e604953d74546ec",
        ),
    ],
)
def test_a_step_has_the_key_that_it_always_had(settings: dict[str, Any], key: str) -> None:
    step = step_class("export", settings).model_validate(settings)
    assert stage_key(step.kind, step.version, step.key_config(), ["source"]) == key
