"""The translation model that is trained where it is needed says what its phrases say."""

from pathlib import Path

import sacrebleu
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lighten.data import phrases
from lighten.model.translator.making import train


def test_the_demo_model_translates(tmp_path: Path) -> None:
    """Two minutes of training: the whole plan, as `demo:phrases` is made."""
    train(tmp_path, lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    pairs = phrases.some("test", 100)
    inputs = tokenizer([pair.source for pair in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=60, num_beams=1)
    found = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert sacrebleu.corpus_bleu(found, [[pair.target for pair in pairs]]).score > 80
