"""Products with prepacked weights against plain ones; whether they are faster is no test's."""

import pytest
import torch
from torch import Tensor

from myna.ops.lora_linear import lora_linear
from myna.ops.prepacked import can_prepack, gain, linear, prepack


def weight_or_skip(out_features: int = 96, in_features: int = 64) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=draw).bfloat16()
    if not can_prepack(weight):
        pytest.skip("this CPU or torch has no prepacked bfloat16 products")
    return weight


@pytest.mark.parametrize("tokens", [1, 7, 40, 300])
def test_products_are_those_of_the_weight_for_any_number_of_tokens(tokens: int) -> None:
    weight = weight_or_skip()
    packed = prepack(weight, 40)
    x, g = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, 96).bfloat16()
    bias = torch.randn(96).bfloat16()
    for found, exact in (
        (linear(x, packed.forward), x.double() @ weight.double().T),
        (linear(x, packed.forward, bias), x.double() @ weight.double().T + bias.double()),
        (linear(g, packed.backward), g.double() @ weight.double()),
    ):
        assert (found.double() - exact).norm() / exact.norm() < 4e-3  # one rounding to bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_lora_layer_gives_what_it_gives_without(dropout: float) -> None:
    weight = weight_or_skip()
    x = torch.randn(2, 9, 64).bfloat16().requires_grad_()
    A, B = torch.randn(4, 64).requires_grad_(), torch.randn(96, 4).requires_grad_()
    grad = torch.randn(2, 9, 96).bfloat16()
    found = []
    for packed in (None, prepack(weight, 18)):
        y = lora_linear(x, weight, None, A, B, 0.5, dropout, 11, packed)
        found.append((y, *torch.autograd.grad(y, (x, A, B), grad)))
    for plain, other in zip(*found, strict=True):
        assert other.shape == plain.shape and other.dtype == plain.dtype
        assert (other.float() - plain.float()).norm() / plain.float().norm() < 1e-2


def test_float32_is_not_prepacked() -> None:
    assert not can_prepack(torch.zeros(8, 8))


def test_a_gain_is_measured() -> None:
    assert 0 < gain(weight_or_skip(), 16) < 100
