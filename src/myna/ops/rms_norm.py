"""Root-mean-square normalisation with a frozen weight, as one operation.

Owns forward and backward in both roundings that models use. Kept for the backward are the input
(the caller's own tensor, which the residual connection holds anyway) and one number a row; composed
of torch's operations it keeps two float32 copies of the input beside. Which modules use it is
`models/frozen.py`'s.

Dimensions: N rows, D features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: bool = False) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight`, shape (..., D), in x's dtype.

    x (..., D), weight (D,) frozen. The norm is computed in float32 (float64 for float64). With
    `weight_offset` the factor is `1 + weight` and the product is rounded once, as Gemma has it;
    without, the normalised rows are rounded to x's dtype before the product, as Llama has it.
    Differentiable once.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 3.
    """
    assert not weight.requires_grad, "not frozen"
    return _RmsNorm.apply(x, weight, eps, weight_offset)  # type: ignore[no-any-return, no-untyped-call] # torch's apply has no types


class _RmsNorm(torch.autograd.Function):
    """Forward and backward, with f the factor per feature.

        forward   r = 1 / sqrt(mean(x²) + eps)          (N, 1)   kept
                  n = x r                               (N, D)
                  y = n f                               (N, D)
        backward  with g = dLoss/dy                     (N, D)
                  h = g f                               (N, D)
                  dx = r (h - n mean(h n))              (N, D)
    from dn/dx = r (1 - n nᵀ / D), as n = x r and dr/dx = -r³ x / D.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: bool) -> Tensor:
        """See the class."""
        exact = torch.promote_types(x.dtype, torch.float32)
        n = x.to(exact, copy=True)
        r = torch.linalg.vecdot(n, n).div_(n.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        n.mul_(r)
        ctx.save_for_backward(x, weight, r)
        ctx.weight_offset = weight_offset
        if weight_offset:
            return n.mul_(1 + weight.to(exact)).to(x.dtype)
        return n.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        x, weight, r = ctx.saved_tensors
        n = x.to(r.dtype, copy=True).mul_(r)
        if ctx.weight_offset:
            h = grad.to(r.dtype) * (1 + weight.to(r.dtype))
        else:
            h = (grad * weight).to(r.dtype)
        h.addcmul_(n, torch.linalg.vecdot(h, n).div_(n.shape[-1]).unsqueeze(-1), value=-1)
        return h.mul_(r).to(x.dtype), None, None, None
