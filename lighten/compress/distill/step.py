"""The `distill` step: trains a student, and writes its best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lighten.compress.distill import encoder_step, pair_step
from lighten.compress.distill.ends import changes_of
from lighten.compress.distill.settings import Distill
from lighten.compress.distill.student import Student, check_vocabularies
from lighten.compress.distill.teacher import Lessons, open_teacher
from lighten.compress.distill.training import Trainer
from lighten.errors import Failure, RequestError
from lighten.model import accelerator
from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Distill, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Trains a student, and writes its weights from when it did best on the held-out text.

    Raises:
        RequestError: the vocabularies differ, or the text is shorter than a batch.
        Failure: the loss is no number.
    """
    checkpoint = Checkpoint(source.path)
    if checkpoint.facts.task == "seq2seq":
        return pair_step.run(step, source, out, context)
    if checkpoint.facts.task != "causal":
        return encoder_step.run(step, source, out, context)
    accelerator.deterministic(context.device)
    if checkpoint.quantization:
        raise RequestError(f"this model is {source.format}: distil the one that it was made from")
    assert context.teacher and context.lessons and context.scratch
    check_vocabularies(source.path, context.teacher)
    student = Student(step, source.path, context)
    teacher = open_teacher(context.teacher, context, checkpoint.facts.vocab) if step.runs_along else None
    lessons = Lessons(context.lessons)
    if (largest := int(lessons.ids.max())) >= checkpoint.facts.vocab:
        raise RequestError(f"the text has the token {largest}, for which the student has no row: take another text")
    trainer = Trainer(step, student, lessons, teacher, context, context.scratch)
    trainer.run()
    best = context.scratch / "best.safetensors"
    if not best.exists():
        raise Failure("no step did better than nothing: the perplexity was never a number; lower lr")
    weights = load_file(best)
    with ShardWriter(out, len(weights)) as writer:
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise Failure(f"{name} is not finite after training: lower lr, or take precision: fp32")
            writer.add(name, tensor)
    checkpoint.write_others(out, {**checkpoint.config, **changes_of(step, checkpoint)})
    zeros = {name: student.show(name, module.weight.data) == 0 for name, module in student.linears.items()}
    gone = sum(int(mask.sum()) for mask in zeros.values()) if student.kept else 0
    total = sum(mask.numel() for mask in zeros.values())
    return {
        "format": "hf",
        "dtype": "bfloat16",
        "params": sum(tensor.numel() for tensor in weights.values()),
        "steps": trainer.steps,
        "tokens": trainer.steps * step.batch * step.length,
        "precision": str(trainer.dtype).removeprefix("torch."),
        "validation_perplexity": trainer.best,
        **({"sparsity": gone / total} if student.kept else {}),
        "training": {"curve": trainer.curve, "validation": trainer.checks},
    }
