"""Tiny random models with real tokenizers, made once per run."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lighten.model import tokenizer_table
from lighten.process.isolate import Nursery

# processes find the tests' own functions, and the package that is tested, from any directory
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).strip(
    ":"
)
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import of openvino would send it

TEXT = "".join(
    file.read_text() for file in sorted((Path(__file__).parents[1] / "lighten/data/builtin/calibration").glob("*.txt"))
)[:40000]
TEXT += " naïve café — 日本語テスト । हिन्दी ไทย 🙂👩‍👩‍👧 ½ Ⅷ ٣٤٥ ﬀ ß Été БвёЁ Σςα عربى é 한국어" * 60
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "yarn-factor": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "attention_factor": 0.8,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


@cache
def byte_level(pre: str) -> dict[str, Any]:
    """Returns a byte-level BPE tokenizer.json with one of the table's pre-tokenizers."""
    entry = tokenizer_table.TABLE[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = json.loads(tokenizer.to_str()) | {"pre_tokenizer": entry.json()}
    tokenizer = Tokenizer.from_str(json.dumps(spelled))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_tokens(["<think>"])
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


@cache
def sentencepiece() -> dict[str, Any]:
    """Returns a BPE tokenizer.json with byte fallback and every merge that SentencePiece would try."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    counts = Counter(TEXT.replace(" ", "▁").replace("\n", ""))
    known = sorted(counts, key=lambda letter: (-counts[letter], letter))[:90]  # the trainer breaks ties at random
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>"],
        initial_alphabet=known,
        limit_alphabet=len(known),
        show_progress=False,
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    learned = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])][1:]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "▁▁", "▁▁▁▁"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab and not token.startswith("<")
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


def write_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> int:
    """Writes the tokenizer's files; returns the number of its tokens."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    spm = tokenizer["model"]["byte_fallback"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if spm else {"eos_token": "<|im_end|>"}
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "add_bos_token": spm, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_str(json.dumps(tokenizer)).get_vocab_size()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that makes a model directory: family, pre-tokenizer or "spm", sizes."""

    @cache
    def make(family: str = "llama", pre: str = "gpt-2", dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        vocab = write_tokenizer(folder, sentencepiece() if pre == "spm" else byte_level(pre))
        config_class, model_class, settings = FAMILIES[family]
        torch.manual_seed(1)
        config = config_class(**{**SIZES, **settings, **sizes, "vocab_size": vocab + 5}, eos_token_id=2, bos_token_id=1)
        model = model_class(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def to_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that exports a model directory to ONNX: its path, its format, settings."""
    pytest.importorskip("onnxruntime_genai")
    from lighten.export.onnx.settings import Onnx
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    @cache
    def make(source: Path, format: str = "hf", **settings: Any) -> Path:
        out = tmp_path_factory.mktemp("onnx")
        facts = Onnx(format="onnx", **settings).run(Artifact(source, {"format": format}), out, Context())
        (out / "facts.json").write_text(json.dumps(facts))
        return out

    return make


@pytest.fixture(scope="session")
def to_openvino(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that exports a model directory to OpenVINO: its path, its format, settings."""
    pytest.importorskip("openvino_genai")
    from lighten.export.openvino.settings import OpenVino
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    @cache
    def make(source: Path, format: str = "hf", **settings: Any) -> Path:
        out, context = tmp_path_factory.mktemp("openvino"), Context()
        facts = OpenVino(format="openvino", **settings).run(Artifact(source, {"format": format}), out, context)
        (out / "facts.json").write_text(json.dumps(facts))
        (out / "warnings.json").write_text(json.dumps(context.warnings))
        return out

    return make


@pytest.fixture(scope="session")
def to_executorch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that exports a model directory to ExecuTorch: its path, its format, settings."""
    pytest.importorskip("executorch.exir")
    from lighten.export.executorch.settings import ExecuTorch
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    @cache
    def make(source: Path, format: str = "hf", **settings: Any) -> Path:
        out, context = tmp_path_factory.mktemp("executorch"), Context()
        facts = ExecuTorch(format="executorch", **settings).run(Artifact(source, {"format": format}), out, context)
        (out / "facts.json").write_text(json.dumps(facts))
        (out / "warnings.json").write_text(json.dumps(context.warnings))
        return out

    return make


LONGEST = (
    "tests/real/test_quickstart.py",
    "tests/real/test_translate.py",
    "tests/cli/test_main.py",
    "tests/pipeline/test_run.py",
    "tests/compare/test_compare.py",
    "tests/campaign/test_campaign.py",
    "tests/pipeline/test_verbs.py",
    "tests/process/test_workers.py",
    "tests/evaluate/loaders/test_survey.py",
    "tests/evaluate/accuracy/harness/test_tasks.py",
    "tests/process/test_isolate.py",
    "tests/report/test_hub.py",
    "tests/pipeline/test_serving.py",
    "tests/pipeline/test_ladder.py",
)
"""Files that run whole recipes or start many processes: first, so that none is begun when the other worker is done."""


def pytest_configure(config: pytest.Config) -> None:
    """Gives each of several workers cores of its own.

    llama.cpp and onnxruntime take a thread for every core, and their threads wait for each other awake. On cores that
    another worker keeps busy, they would wait most of the time.
    """
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cores, count = sorted(os.sched_getaffinity(0)), worker["workercount"]
        number = int(worker["workerid"].removeprefix("gw")) % count
        if len(cores) >= count:
            os.sched_setaffinity(0, cores[number::count])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _forget_the_test()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    _forget_the_test()


def _forget_the_test() -> None:
    """Takes the test's name out of the environment.

    Isolated functions run in children of one process as long as the environment stays the same: a name that changes
    with every test would have each of them import torch and transformers anew.
    """
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@pytest.fixture(scope="session", autouse=True)
def nurseries() -> Iterator[None]:
    """Keeps the process in which isolated functions run while a test has an environment of its own.

    Such a test needs another process, and the next test one of the environment before. Each would import torch and
    transformers anew.
    """
    own, kept = Nursery.ready, list[Nursery]()

    def ready(kind: type[Nursery]) -> Nursery:
        here, other = Nursery.current, kept.pop() if kept else None
        if here and here.env != dict(os.environ):
            if other and other.env != dict(os.environ):
                other.close()
                other = None
            Nursery.current, other = other, here
        if other:
            kept.append(other)
        return own()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Nursery, "ready", classmethod(ready))
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names what was not tested, and what it lacked, in the lines that end the output."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped if report.longrepr)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"not tested here: {count} ({reason})")
