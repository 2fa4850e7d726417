import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import find_opener, open_runtime, open_tokenizer
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.step import silent
from tests.conftest import TEXT
from tests.evaluate.conftest import score_alone
from tests.evaluate.runtimes.test_runtimes import questions

pytest.importorskip("executorch.exir")

Tiny = Callable[..., Path]
ToExecuTorch = Callable[..., Path]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(source: Path, to_executorch: ToExecuTorch) -> Path:
    return to_executorch(source, type="fp32")


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    opened = open_runtime(folder)
    assert (opened.name, opened.dtype, opened.device, opened.context) == ("executorch", "float32", "cpu", 512)
    yield opened
    opened.close()


def test_logits_are_those_of_transformers(source: Path, runtime: Runtime) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    for length in (300, 7):  # several calls; the second text begins anew
        ids = RNG.integers(0, 900, length)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        found = runtime.logits(ids)
        assert (found.dtype, found.shape) == (np.float32, (length, runtime.vocab))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_endings_score_as_if_alone(runtime: Runtime) -> None:
    asked = questions(4)
    for question, found in zip(asked, runtime.choose_many(asked, silent), strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)


def test_generate_writes_the_likeliest_tokens_and_times_them(source: Path, runtime: Runtime) -> None:
    prompt = RNG.integers(0, 900, (1, 10))
    timings = runtime.generate(prompt, 6)
    assert len(timings.token_s) == 5 and timings.ttft_s > 0 and min(timings.token_s) > 0
    model = AutoModelForCausalLM.from_pretrained(source)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert timings.ids is not None
    assert timings.ids[0].tolist() == model.generate(torch.from_numpy(prompt), **asked)[0, 10:].tolist()
    with pytest.raises(Failure, match="one row"):
        runtime.generate(np.repeat(prompt, 2, 0), 6)


def test_it_decodes_token_after_token(runtime: Runtime) -> None:
    ids = RNG.integers(0, 900, 5).tolist()
    decoding, written = runtime.decode(ids, 4), []
    logits = next(decoding)
    for _ in range(3):
        written.append(int(logits.argmax()))
        logits = decoding.send(written[-1])
    alone = runtime.logits(np.array(ids + written))
    assert np.abs(logits - alone[-1]).max() < 1e-3
    assert alone[len(ids) - 1 : -1].argmax(-1).tolist() == written


def test_executorchs_runner_writes_the_tokens_of_transformers(source: Path, folder: Path) -> None:
    llm = pytest.importorskip("executorch.extension.llm.runner")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(source)
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for word in TEXT.split():  # until a random model writes letters, which the runner's bindings can hand over
        ids = torch.tensor([tokenizer.encode(f"the {word}").ids])
        wanted = [tokenizer.decode([each]) for each in model.generate(ids, **asked)[0, ids.shape[1] :].tolist()]
        if all(each.isascii() and each.isprintable() for each in wanted):
            break
    written: list[str] = []
    runner = llm.TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    settings = llm.GenerationConfig(max_new_tokens=4, temperature=0.0, echo=False)
    runner.generate(f"the {word}", settings, written.append)
    assert "".join(written).startswith("".join(wanted))


def test_a_text_that_is_longer_than_the_cache(runtime: Runtime) -> None:
    with pytest.raises(Failure, match="512 positions"):
        runtime.logits(np.zeros(513, np.int64))


def test_the_file_itself_is_opened(folder: Path) -> None:
    assert find_opener(folder / "model.pte")[0].name == "executorch"
    assert open_tokenizer(folder / "model.pte").encode("the") == open_tokenizer(folder).encode("the")


def test_damaged_files_and_programs_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "cut")
    whole = (copy / "model.pte").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a program" * 100):
        (copy / "model.pte").write_bytes(damaged)
        with pytest.raises(Failure, match="cut short or damaged"):
            open_runtime(copy)
    from executorch.exir import to_edge

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    program = to_edge(torch.export.export(Twice(), (torch.zeros(2),))).to_executorch()
    (copy / "model.pte").write_bytes(program.buffer)
    with pytest.raises(RequestError, match="no causal language model"):
        open_runtime(copy)
