"""The product inside a gated MLP, `silu(gate) * up`, as one operation.

Owns forward and backward. Kept for the backward are gate and up; composed of torch's operations it
keeps silu(gate) as well. Which modules use it is `models/frozen.py`'s.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, in their dtype. Differentiable once.

    Shazeer 2020, "GLU Variants Improve Transformer", equation 6 (SwiGLU).
    """
    return _GatedProduct.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call] # torch's apply has no types


class _GatedProduct(torch.autograd.Function):
    """Forward and backward, with σ the logistic function and g = dLoss/dy.

    forward   y = gate σ(gate) up
    backward  dup = g silu(gate)
              dgate = g up σ(gate) (1 + gate (1 - σ(gate)))
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)
