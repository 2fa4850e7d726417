"""The `polish` step: trains the scales of a quantized model, and writes them into a copy of its files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lighten.compress.distill.teacher import Lessons
from lighten.compress.polish.coded import CodedLinear
from lighten.compress.polish.settings import Polish
from lighten.compress.polish.student import THE_EMBEDDING, THE_HEAD, Student
from lighten.compress.polish.training import Trainer
from lighten.errors import Failure
from lighten.model import accelerator
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf_header import within
from lighten.model.shards import ShardWriter
from lighten.step import Context
from lighten.store.artifact import Artifact

SCALES = ("scales", "weight_scale")
"""Endings of the names of scales: in the formats gptq and awq, and in compressed-tensors."""


def run(step: Polish, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the quantized model with the scales that did best on the held-out text; its own if none did better.

    Raises:
        RequestError: the text is shorter than a batch.
        Failure: the divergence is no number.
    """
    assert context.teacher and context.lessons and context.scratch
    accelerator.deterministic(context.device)
    trainer = Trainer(step, Lessons(context.lessons), context, context.scratch)
    student = trainer.run(source.path, context.teacher)
    changed = _write(source.path, student, out)
    before, after = trainer.looks[0]["kl"], min(look["kl"] for look in trainer.looks)
    if not changed:
        context.warnings.append(
            f"no step came nearer to the source than the scales that were there (KL {before:.4g}): they were kept"
        )
    context.warnings += _stayed(student.left)
    total = sum(theta.numel() for theta in student.scales().values())
    facts = {name: value for name, value in source.facts.items() if name not in ("training", "parity")}
    return {
        **facts,
        "format": source.format,
        "polish": {
            "kl_before": before,
            "kl_after": after,
            "held_out_tokens": len(trainer.held) * (trainer.ids.shape[1] - 1),
            "steps": trainer.done,
            "trained_tokens": trainer.done * trainer.batch * trainer.ids.shape[1],
            "scales_changed": {"count": changed, "of": total},
            "linears": student.linears,
            **({"left": student.left} if student.left else {}),
        },
        "training": {"curve": trainer.curve, "validation": trainer.looks},
    }


def _stayed(left: list[dict[str, str]]) -> list[str]:
    """Returns what the person should know of matrices that keep their scales, embedding and head aside."""
    reasons = Counter(each["why"] for each in left if each["why"] not in (THE_EMBEDDING, THE_HEAD))
    return [f"the scales of {count} quantized matrices stay: {why}" for why, count in reasons.items()]


def _write(quantized: Path, student: Student, out: Path) -> int:
    """Copies a quantized model with other scales. Returns the number of scales that changed.

    Raises:
        Failure: a scale is no number.
    """
    if file := within(quantized):
        from lighten.compress.polish.gguf_file import write_file  # needs the package gguf

        return write_file(file, student.trained, out)
    return _write_directory(Checkpoint(quantized), student.trained, out)


def _write_directory(checkpoint: Checkpoint, linears: dict[str, CodedLinear], out: Path) -> int:
    """Copies a model directory with other scales. Returns the number of scales that changed.

    Raises:
        Failure: a scale is no number.
    """
    changed = 0
    with ShardWriter(out, len(checkpoint.weight_map)) as writer:
        for name in checkpoint.weight_map:
            tensor = checkpoint.tensor(name)
            module, _, part = name.rpartition(".")
            if part in SCALES and module in linears:
                scales = linears[module].rounded().cpu()
                scales = scales.t() if part == "scales" else scales
                if not torch.isfinite(scales).all():
                    raise Failure(f"the scales of {module} are no numbers after training: lower lr")
                made = scales.to(tensor.dtype).contiguous()
                changed += int((made != tensor).sum())
                tensor = made
            writer.add(name, tensor)
    checkpoint.write_others(out, checkpoint.config)
    return changed
