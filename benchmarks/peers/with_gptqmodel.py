"""GPTQModel: `python with_gptqmodel.py TASK.json` quantizes with `method` gptq or awq. See task.py."""

from __future__ import annotations

import os
from typing import Any

import task

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # with its default it fails on a machine of two cores


def work(asked: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    if not asked["method"]:
        return
    # the scheme of gptq is fixed, so that every peer has the same; for awq it is left to the library
    scheme = {"sym": True, "desc_act": False} if asked["method"] == "gptq" else {}
    config = QuantizeConfig(method=asked["method"], bits=asked["bits"], group_size=asked["group_size"], **scheme)
    model = GPTQModel.load(asked["model"], config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.ids(asked)])
    model.save(asked["out"])


if __name__ == "__main__":
    task.main(work, "gptqmodel")
