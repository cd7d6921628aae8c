"""Against torch's own composition in float64, and against finite differences."""

import pytest
import torch
from torch import Tensor

from myna.ops.rms_norm import rms_norm


def composed(x: Tensor, weight: Tensor, eps: float, weight_offset: bool) -> Tensor:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return n * (1 + weight if weight_offset else weight)


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 24, generator=draw) * 3 + 0.5
    weight, grad = torch.randn(24, generator=draw), torch.randn(2, 5, 24, generator=draw)
    return x.to(dtype).requires_grad_(), weight.to(dtype), grad.to(dtype)


@pytest.mark.parametrize("weight_offset", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)]
)
def test_values_and_gradient_are_those_of_float64(
    dtype: torch.dtype, tolerance: float, weight_offset: bool
) -> None:
    x, weight, grad = tensors(dtype)
    y = rms_norm(x, weight, 1e-6, weight_offset=weight_offset)
    (dx,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    wanted = composed(wide, weight.double(), 1e-6, weight_offset)
    (wanted_dx,) = torch.autograd.grad(wanted, wide, grad.double())
    assert y.dtype == dx.dtype == dtype
    assert (y.double() - wanted).norm() / wanted.norm() < tolerance
    assert (dx.double() - wanted_dx).norm() / wanted_dx.norm() < tolerance


@pytest.mark.parametrize("weight_offset", [False, True])
def test_the_gradient_is_that_of_finite_differences(weight_offset: bool) -> None:
    x, weight, _ = tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows: rms_norm(rows, weight, 1e-2, weight_offset=weight_offset), x
    )


def test_the_input_is_left_alone_and_nothing_as_large_is_kept_beside_it() -> None:
    x, weight, _ = tensors(torch.float32)
    before = x.detach().clone()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6)
    assert torch.equal(x, before)
    others = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(t.numel() for t in others) == 10  # one number a row


def test_a_row_of_zeros_is_finite() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    (dx,) = torch.autograd.grad(y, x, torch.ones(1, 8))
    assert torch.equal(y, torch.zeros(1, 8)) and torch.isfinite(dx).all()
