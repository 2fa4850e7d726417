"""llm-compressor: `python with_llmcompressor.py TASK.json` quantizes with `method` gptq, awq or rtn. See task.py.

Instead of bits and a group size, a task may have the name of a `scheme` of compressed-tensors, such as NVFP4A16.
"""

from __future__ import annotations

from typing import Any

import task


def work(asked: dict[str, Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if not asked["method"]:
        return
    rows = task.ids(asked)
    scheme: dict[str, Any] = {"ignore": ["lm_head"]}
    if "scheme" in asked:
        scheme |= {"targets": "Linear", "scheme": asked["scheme"]}
    else:
        weights = {
            "num_bits": asked["bits"],
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": asked["group_size"],
        }
        scheme["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if asked["method"] == "gptq":
        recipe: list[Any] = [GPTQModifier(**scheme)]
    elif asked["method"] == "rtn":
        recipe = [QuantizationModifier(**scheme)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    oneshot(
        model=asked["model"],
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        output_dir=asked["out"],
    )


if __name__ == "__main__":
    task.main(work, "llmcompressor")
