import pytest
import torch

from lighten.model.grams import BLOCK, Gram, GramWriter, read_diagonals, read_index, read_layer
from lighten.observe.gram import LayerInputs, accumulate, exact_products


@pytest.mark.parametrize("width", [8, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_to_the_brute_force_gram(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(2, 50, width, generator=generator).to(dtype) for _ in range(3)]
    gram = Gram.empty(width, "cpu")
    for batch in batches:
        accumulate(gram, batch)
    rows = torch.cat([batch.reshape(-1, width) for batch in batches]).double()
    exact = rows.t() @ rows
    assert gram.tokens == 300
    assert (gram.matrix() - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert torch.equal(gram.matrix(), gram.matrix().t())
    assert torch.equal(gram.diagonal(), gram.matrix().diagonal())
    assert torch.equal(gram.absmax, rows.abs().amax(0).float())


def test_products_of_bfloat16_are_as_exact_as_float32() -> None:
    """Strongly correlated channels: a Gram summed in bfloat16 would not be positive definite."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, 1, generator=generator)
    inputs = (shared + 0.01 * torch.randn(4096, 96, generator=generator)).to(torch.bfloat16)
    gram = Gram.empty(96, "cpu")
    accumulate(gram, inputs[None])
    exact = inputs.double().t() @ inputs.double()
    assert ((gram.matrix() - exact).norm() / exact.norm()) < 2e-6
    careless = (inputs.t() @ inputs).float()
    assert ((careless - exact).norm() / exact.norm()) > 1e-4


def test_precision_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with exact_products(torch.bfloat16):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_linears_that_read_the_same_tensor_share_a_gram(tmp_path) -> None:
    inputs = LayerInputs("cpu")
    for _ in range(2):
        shared, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
        inputs.collect("q", shared)
        inputs.collect("k", shared)
        inputs.collect("o", other)
        inputs.end_batch()
    assert inputs.read_by == {"q": "q", "k": "q", "o": "o"}
    assert {name: gram.tokens for name, gram in inputs.grams.items()} == {"q": 6, "o": 6}

    writer = GramWriter(tmp_path, [f"model.layers.{n}." for n in range(8)], {"samples": 2})
    writer.add(inputs.grams, inputs.read_by)
    writer.close(torch.zeros(1, 8), [])
    grams, read_by = read_layer(tmp_path, 0)
    assert read_by == inputs.read_by
    assert torch.equal(grams["q"].matrix(), inputs.grams["q"].matrix())
    assert read_index(tmp_path)["samples"] == 2
    diagonals = {name: (values, tokens) for name, values, tokens in read_diagonals(tmp_path)}
    assert set(diagonals) == {f"model.layers.0.{name}.weight" for name in ("q", "k", "o")}
    assert diagonals["model.layers.0.k.weight"][1] == 6
