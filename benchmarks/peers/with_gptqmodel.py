"""GPTQModel: `python with_gptqmodel.py TASK.json` quantizes with `method` gptq, awq or awq-torch. See task.py.

awq is what it does when it is asked for AWQ and nothing else; awq-torch names the backend that packs without a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import task

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # with its default it fails on a machine of two cores


def work(asked: dict[str, Any]) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    if not asked["method"]:
        return
    method, _, backend = asked["method"].partition("-")
    # the scheme of gptq is fixed, so that every peer has the same; for awq it is left to the library
    scheme = {"sym": True, "desc_act": False} if method == "gptq" else {}
    config = QuantizeConfig(method=method, bits=asked["bits"], group_size=asked["group_size"], **scheme)
    model = GPTQModel.load(asked["model"], config)
    options = {"backend": BACKEND.AWQ_TORCH} if backend else {}
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.ids(asked)], **options)
    model.save(asked["out"])


if __name__ == "__main__":
    task.main(work, "gptqmodel")
