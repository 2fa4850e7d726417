"""`lighten doctor --calibration` as a person calls it, and every piece of its advice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.data.text import builtin_text
from lighten.doctor import advice
from lighten.doctor.diagnose import diagnose
from lighten.pipeline.stage import Stage
from lighten.pipeline.watcher import Silent
from lighten.store.gc import collect
from lighten.store.store import Store
from tests.cli.test_main import recipe, refused
from tests.command import lighten

RECIPE = """name: tiny
model: {model}
calibration: {{data: text.txt, samples: 8, length: 32}}
variants:
  int4: [{{quantize: {{bits: 4, group_size: 32}}}}]
evaluate:
  perplexity: {{data: test.txt, length: 32}}
  accuracy: {{task: builtin, limit: 4}}
"""


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a model that has a chat template, a text that leaks, and a recipe."""
    model = Path(shutil.copytree(tiny(dtype=torch.bfloat16), tmp_path / "model"))
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "text.txt").write_text(builtin_text("calibration")[:640])
    (tmp_path / "test.txt").write_text(builtin_text("calibration")[:600] + builtin_text("perplexity")[:3000])
    recipe(tmp_path, model, RECIPE)
    return tmp_path


def test_the_doctor_examines_a_recipe_and_shares_its_sweep(folder: Path) -> None:
    done = lighten("doctor", "--calibration", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    for words in (
        "perplexity test.txt: ",
        "calibrate on other text",
        "8 samples of 32 tokens asked for, 8 found: 256 tokens",
        "self_attn.q_proj: width 256, rank ",
        "fewer than 4 tokens per rank: the Grams are noisy; use at least 32 samples",
        "Loss of 4-bit GPTQ on held-out text (test.txt)",
        "2 samples: ",
        "4 samples: ",
        "from 4 to 8 samples: ",
        "the model has one (<|im_start|> <|im_end|>), and the text uses none",
        "apply_chat_template",
    ):
        assert words in done.stdout
    assert "sweep of 2 samples" in done.stderr

    planned = json.loads(lighten("plan", "tiny.yaml", "--json", cwd=folder).stdout)["stages"]
    assert {stage["name"]: stage["cached"] for stage in planned if stage["name"] in ("source", "sweep")} == {
        "source": True,
        "sweep": True,
    }
    again = lighten("doctor", "--calibration", "tiny.yaml", "--json", cwd=folder)
    assert again.stderr == ""
    found = json.loads(again.stdout)
    assert [finding["name"] for finding in found["findings"]] == [
        "overlap", "text", "dead channels", "rank", "loss", "chat",
    ]  # fmt: skip
    assert {each["samples"] for each in found["losses"]} == {2, 4, 8}
    assert {(each["layer"], each["input"]) for each in found["inputs"]} == {
        (layer, name)
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    assert all(0 < each["rank"] <= 256 for each in found["inputs"])


class Collector(Silent):
    """Calls gc after each stage."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        assert [name for name, _ in collect(self.store) if len(name) == 64] == []


def test_gc_beside_the_doctor_takes_nothing_from_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    store = Store(folder / "artifacts")
    assert diagnose("tiny.yaml", artifacts=store.root, watcher=Collector(store)).findings
    assert collect(store), "nobody needs them when it has ended"


def test_little_text(folder: Path) -> None:
    """One sample, and held-out text of less than one: nothing to compare, and no crash."""
    (folder / "text.txt").write_text("Hello <|im_start|> there, dear reader of short texts. " * 4)
    (folder / "test.txt").write_text("Yes.")
    text = (folder / "tiny.yaml").read_text().replace("samples: 8", "samples: 9")
    (folder / "tiny.yaml").write_text(text)
    done = lighten("doctor", "--calibration", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "too little held-out text, to compare" in done.stdout
    assert "and the text uses <|im_start|>" in done.stdout
    assert "the text is too short: give a longer one, or ask for" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("text.txt", "missing.txt"), ["missing.txt", "check the path"]),
        (("length: 32}", "length: 5000}"), ["shorter than one sample", "smaller length"]),
        (("[{quantize: {bits: 4, group_size: 32}}]", "[{export: {format: gguf, type: F16}}]"),
         ["no variant of tiny uses the calibration text", "imatrix: true"]),
    ],
)  # fmt: skip
def test_wrong_requests(folder: Path, change: tuple[str, str], words: list[str]) -> None:
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace(*change, 1))
    refused(lighten("doctor", "--calibration", "tiny.yaml", cwd=folder), 2, *words)


def test_a_missing_recipe(tmp_path: Path) -> None:
    refused(lighten("doctor", "--calibration", "nowhere", cwd=tmp_path), 2, "no recipe 'nowhere'", "quickstart")


CALIBRATION: dict[str, Any] = {
    "asked": 64, "samples": 64, "length": 512, "tokens": 32768, "distinct": 5000, "vocabulary": 49152, "overlap": [],
}  # fmt: skip
INPUT = {"layer": 0, "input": "mlp.down_proj", "width": 1000, "tokens": 32768, "dead": 0, "nearly_dead": 0, "rank": 990}


def losses(*values: float | None) -> list[dict[str, Any]]:
    return [{"layer": 0, "input": "q", "samples": 16 << i, "loss": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "finding",
    [
        advice.about_overlap(CALIBRATION),
        advice.about_text(CALIBRATION),
        advice.about_dead_channels([INPUT, {**INPUT, "nearly_dead": 9}]),
        advice.about_rank([INPUT], 512),
        advice.about_loss(losses(0.03, 0.0201, 0.02), CALIBRATION, "builtin"),
        advice.about_loss(losses(0.03, 0.02, 0.021), CALIBRATION, "builtin"),
        advice.about_chat({"template": False, "tokens": [], "used": []}),
        advice.about_chat({"template": True, "tokens": [], "used": []}),
        advice.about_chat({"template": True, "tokens": ["<s>"], "used": ["<s>"]}),
    ],
)
def test_what_is_fine_says_so(finding: advice.Finding) -> None:
    assert finding.verdict == "fine"
    assert finding.lines


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (advice.about_text({**CALIBRATION, "distinct": 600}), "add text of other kinds"),
        (advice.about_dead_channels([{**INPUT, "dead": 3}]), "never uses 3 channels"),
        (advice.about_dead_channels([{**INPUT, "nearly_dead": 30}]), "nearly dead"),
        (advice.about_rank([{**INPUT, "tokens": 2048}], 512), "use at least 8 samples"),
        (advice.about_loss(losses(0.03, 0.025, 0.02), CALIBRATION, "builtin"), "try samples: 128"),
        (advice.about_loss(losses(0.03, 0.02), {**CALIBRATION, "samples": 40}, "builtin"), "twice as long"),
        (advice.about_loss(losses(None, 0.02), CALIBRATION, "builtin"), "larger damp_percent"),
    ],
)
def test_what_is_not_says_what_to_do(finding: advice.Finding, words: str) -> None:
    assert words in finding.advice


def test_a_wide_input_says_which_layers_were_looked_at() -> None:
    wide = [{**INPUT, "layer": layer, "rank": 990 - layer if layer % 2 == 0 else None} for layer in range(5)]
    assert advice.about_rank(wide, 512).lines == (
        "mlp.down_proj: width 1,000, rank 986 to 990 (layers 0, 2, 4 only); 33.1 tokens per rank",
    )
