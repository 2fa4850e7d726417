"""What enters the keys of exports stays the same: an old store's objects are found again.

The keys of ONNX have changed once: its graphs are others since version 3 of the step. So have those of GGUF: since
version 4 a Modelfile lies beside the file.
"""

from typing import Any

import pytest

from lighten.pipeline.steps import step_class
from lighten.store.files import stage_key


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"format": "gguf"}, "084eb17317ad0421db4338586cda171b4d24a88e41408968b22a481e3fc725c9"),
        ({"format": "gguf", "type": "F16"}, "438856327afbcad20ccba0da8b9e526b7de7c98b5a7b524c14428beb72180874"),
        ({"format": "gguf", "budget": "bits=4.5"}, "dc50147a246f221f9e636b707ceff839cf7fb64f5546b2e4432590101fff5577"),
        (
            {"format": "gguf", "type": "Q4_K_M", "imatrix": True, "split": "1GB"},
            "e8992267d1ffe6b69cba4920e460f456fa8c7f2b11f9d04281adc5319f32f95e",
        ),
        ({"format": "onnx"}, "cb686d8db5b0ee9f1fc34527db1df84f4dc85271c6856d1b8bc63cc221879dfe"),
        (
            {"format": "onnx", "graph": "plain", "precision": "int8"},
            "7d437418fc09c33d572d368575c13c1be95e35ff8bcccd89585abb21d711e39c",
        ),
        ({"format": "bundle", "target": "rpi5"}, "a05285215665a70f686f5d288627182705a78840a9e2e56cb80b889b122229bb"),
        (
            {"format": "gguf", "parity": {"top1": 0.9}},
            "222ab365ed85f9495ba24574356d2a7b33171ceb1c2df4504c4e414bec7bdc27",
        ),
    ],
)
def test_a_step_has_the_key_that_it_always_had(settings: dict[str, Any], key: str) -> None:
    step = step_class("export", settings).model_validate(settings)
    assert stage_key(step.kind, step.version, step.key_config(), ["source"]) == key
