import pytest

from lighten.evaluate.roofline.cost import cost


def test_a_million_tokens_at_the_fastest_shape() -> None:
    rows = [
        {"batch": 1, "prompt": 128, "prefill_tok_s": 1000.0, "decode_tok_s": 50.0},
        {"batch": 8, "prompt": 128, "prefill_tok_s": 900.0, "decode_tok_s": 200.0},
    ]
    found = cost(rows, 0.40, "EUR")
    assert found is not None
    assert found["per_million_tokens"] == pytest.approx({"prefill": 0.4 / 3.6, "decode": 0.4 / 3600 / 200 * 1e6})
    assert "prefill at batch size 1" in found["note"] and "decode at batch size 8" in found["note"]
    assert (found["price_per_hour"], found["currency"]) == (0.40, "EUR")


def test_no_speed_no_price() -> None:
    assert cost([], 1.0, "USD") is None
    assert cost([{"batch": 1, "prompt": 1, "decode_tok_s": None}], 1.0, "USD") is None
