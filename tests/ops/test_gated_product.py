"""Against torch's own composition in float64, and against finite differences."""

import pytest
import torch
from torch import Tensor, nn

from myna.ops.gated_product import gated_product


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    gate, up, grad = (torch.randn(3, 17, generator=draw) * 4 for _ in range(3))
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)]
)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    gate, up, grad = tensors(dtype)
    y = gated_product(gate, up)
    found = torch.autograd.grad(y, (gate, up), grad)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    product = nn.functional.silu(wide[0]) * wide[1]
    wanted = torch.autograd.grad(product, wide, grad.double())
    for ours, reference in zip((y, *found), (product, *wanted), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - reference).norm() / reference.norm() < tolerance


def test_the_gradients_are_those_of_finite_differences() -> None:
    gate, up, _ = tensors(torch.float64)
    assert torch.autograd.gradcheck(gated_product, (gate, up))


def test_only_gate_and_up_are_kept() -> None:
    gate, up, _ = tensors(torch.float32)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_product(gate, up)
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}
