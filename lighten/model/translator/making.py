"""Making the translation model: its tokenizer, and its weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lighten.data import phrases
from lighten.model.depth import repeated
from lighten.model.empty import quiet
from lighten.model.pair_training import IGNORED, Batch, PairSet, batches, losses_by_step
from lighten.model.translator import BATCH, FILES, FOLDER, PAIRS, SEED, STAGES
from lighten.step import Report

SPECIAL = ("</s>", "<unk>", "<pad>")
VOCABULARY = 512


def make_tokenizer() -> Any:
    """Returns the `tokenizers.Tokenizer` of the model: byte pairs of the training phrases, and single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token=SPECIAL[1]))
    digits, marks = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits, marks])
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator((text for pair in phrases.some("train", 4000) for text in pair), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[0]}", pair=f"$A $B {SPECIAL[0]}", special_tokens=[(SPECIAL[0], 0)]
    )
    return made


def train(out: Path, report: Report, *, stages: Sequence[tuple[int, int, float]] = STAGES, count: int = PAIRS) -> None:
    """Writes the model with trained weights into the existing directory `out`. Takes minutes.

    A model of few layers is trained first. Each of its layers is then repeated, as in Gong et al., "Efficient Training
    of BERT by Progressively Stacking" (2019): layers that are normalised after their sum learn slowly when they are
    many and random.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(FOLDER, local_files_only=True)
    config.encoder_layers = config.decoder_layers = stages[0][0]
    model: Any = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                weight.mul_(0.5)  # a sum begins near its first part
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    pairs = PairSet.read(tokenizer, phrases.some("train", count), config)
    before, total = 0, sum(steps for _, steps, _ in stages)
    for layers, steps, rate in stages:
        model = repeated(model, layers).train()
        for done, loss in enumerate(_trained(model, pairs, steps, rate), before + 1):
            report(done, total, f"training the demo model, step {done}/{total}, loss {loss:.3f}")
        before += steps
    with quiet():
        model.eval().save_pretrained(out)
    for name in FILES[1:]:
        shutil.copyfile(FOLDER / name, out / name)


def _trained(model: Any, pairs: PairSet, steps: int, rate: float) -> Iterator[float]:
    """Yields the loss of each step of a training."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def loss(batch: Batch) -> torch.Tensor:
        logits = model(**batch.inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)

    plan = islice(batches(pairs, BATCH, SEED), steps)
    yield from losses_by_step(plan, loss, optimizer, weights, rate=rate, steps=steps)
