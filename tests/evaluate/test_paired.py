import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lighten.errors import Failure, RequestError
from lighten.evaluate import paired
from lighten.evaluate.accuracy.change import change as change_of_accuracy
from lighten.evaluate.perplexity.change import by_chunk
from lighten.evaluate.perplexity.change import change as change_of_perplexity
from lighten.evaluate.speed.change import change as change_of_speed


def write(folder: Path, result: dict[str, Any], **values: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    if values:
        save_file(values, folder / "values.safetensors")
    return folder


def ppl(folder: Path, nll: np.ndarray, ids: str = "same") -> Path:
    return write(folder, {"perplexity": {"protocol": {"ids_sha256": ids}}}, nll=nll.astype(np.float32))


def acc(folder: Path, choice: list[int], choice_norm: list[int], label: list[int]) -> Path:
    values = {"choice": choice, "choice_norm": choice_norm, "label": label}
    arrays = {name: np.array(value, dtype=np.int32) for name, value in values.items()}
    return write(folder, {"accuracy": {"task": "builtin"}}, **arrays)


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (40, 2.021)])
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert paired.student95(freedom) == pytest.approx(quantile, rel=0.03 if freedom == 2 else 0.01)


def test_a_constant_shift_is_found_exactly_whatever_the_chunks_do(tmp_path: Path) -> None:
    base = np.random.default_rng(0).normal(3, 1, (12, 20))
    found = change_of_perplexity(ppl(tmp_path / "v", base + 0.01), ppl(tmp_path / "b", base))
    assert found["relative"] == pytest.approx(math.expm1(0.01), rel=1e-4)
    assert found["ci95"] == pytest.approx([found["relative"]] * 2, abs=1e-6)
    expected = math.exp(base.mean() + 0.01) - math.exp(base.mean())
    assert found["absolute"] == pytest.approx(expected, rel=1e-3)


def test_the_interval_is_students_over_chunks() -> None:
    base = np.zeros((4, 5))
    change = np.array([0.1, 0.2, 0.3, 0.4])
    found = by_chunk(base + change[:, None], base)
    half = 3.182 * change.std(ddof=1) / 2
    assert found["ci95"] == pytest.approx([math.expm1(0.25 - half), math.expm1(0.25 + half)], abs=2e-3)
    assert by_chunk(base[:2] + 1, base[:2])["ci95"] is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        low, high = by_chunk(rng.normal(0.05, 0.1, (8, 1)), np.zeros((8, 1)))["ci95"]
        inside += low <= math.expm1(0.05) <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_accuracy_counts_the_tasks_that_flipped(tmp_path: Path) -> None:
    label = [0, 1, 2, 3, 0, 1, 2, 3]
    base = acc(tmp_path / "b", label, [0, 1, 2, 3, 1, 1, 1, 1], label)
    variant = acc(tmp_path / "v", [*label[:7], 0], [1, 1, 2, 3, 0, 1, 2, 2], label)
    found = change_of_accuracy(variant, base)
    change = np.array([-1, 0, 0, 0, 1, 0, 1, 0])
    half = 1.96 * change.std(ddof=1) / math.sqrt(8)
    assert (found["task"], found["gained"], found["lost"]) == ("builtin", 2, 1)
    assert found["acc"] == -1 / 8
    assert found["acc_norm"] == 1 / 8
    assert found["acc_norm_ci95"] == pytest.approx([1 / 8 - half, 1 / 8 + half], abs=1e-4)


def test_speed_is_compared_at_a_common_batch_size(tmp_path: Path) -> None:
    rows = [{"batch": 1, "decode_tok_s": 30.0}, {"batch": 4, "decode_tok_s": 90.0}]
    variant, base = (
        write(tmp_path / "v", {"speed": rows}),
        write(tmp_path / "b", {"speed": [rows[1] | {"decode_tok_s": 45.0}]}),
    )
    assert change_of_speed(variant, base) == {"decode_speed_ratio": 2.0}
    other = write(tmp_path / "o", {"speed": [{"batch": 2, "decode_tok_s": 1.0}]})
    assert change_of_speed(variant, other) == {"decode_speed_ratio": None}
    lengths = [rows[0] | {"prompt": prompt, "decode_tok_s": 3000.0 / prompt} for prompt in (100, 300)]
    long = write(tmp_path / "l", {"speed": lengths})
    assert change_of_speed(write(tmp_path / "s", {"speed": lengths[1:]}), long) == {"decode_speed_ratio": 1.0}


def test_measurements_of_different_things_are_not_compared(tmp_path: Path) -> None:
    nll = np.zeros((3, 4))
    with pytest.raises(RequestError, match="different tokens"):
        change_of_perplexity(ppl(tmp_path / "a", nll), ppl(tmp_path / "b", nll, "other"))
    with pytest.raises(RequestError, match="different tasks"):
        change_of_accuracy(acc(tmp_path / "c", [0], [0], [0]), acc(tmp_path / "d", [0], [0], [1]))
    with pytest.raises(Failure, match=r"result\.json"):
        change_of_speed(tmp_path / "nowhere", tmp_path / "a")
    (tmp_path / "a" / "values.safetensors").unlink()
    with pytest.raises(Failure, match=r"values\.safetensors"):
        change_of_perplexity(tmp_path / "a", tmp_path / "a")
