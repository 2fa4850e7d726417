"""What enters the keys of exports stays the same: an old store's objects are found again."""

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
        ({"format": "onnx"}, "1853ae7bbb6e2d9037f9baaeb15833db59a0207684f4f75ddabb7b81908e5a8b"),
        (
            {"format": "onnx", "graph": "plain", "precision": "int8"},
            "9c73f23c902ce6786b604f052350d1f1dc15952922bccda06d47b2bc52434f2b",
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
