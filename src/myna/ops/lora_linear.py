"""Frozen linear layers with low-rank updates beside them, as one operation.

Owns `y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ`, its backward and its dropout mask, for one layer or for
several that read the same x. Kept for the backward are x (the caller's own tensor, so layers that
share an input share its memory) and r numbers a token; never a copy of x in another dtype, never a
mask. Which layers use it is `lora/fused.py`'s.

Dimensions: T tokens, I input features, O output features, R rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from myna.ops.prepacked import Prepacked, linear

_LEVELS = 1 << 16
"""A mask is drawn with 16 bits an element: 1 ms for 640 x 4096 on two Zen5 cores, where torch's own
bernoulli takes 11 ms and the layer's product 23 ms."""


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    prepacked: Prepacked | None = None,
) -> Tensor:
    """`x Wᵀ + b + scaling (drop(x) Aᵀ) Bᵀ`, shape (..., O), in x's dtype.

    x (..., I), weight (O, I) and bias (O,) have one dtype and get no gradient; A (R, I) and B
    (O, R) may be float32 beside a bfloat16 x and are rounded to its dtype for the products, which
    accumulate in float32; their gradients come in their own dtype. `drop` zeroes elements with
    probability `dropout_p` (to 1/65536) and divides by what is kept; the mask is a function of
    `seed` (0 or above) and the shape of x, for one kind of device. With `prepacked`, the layouts of
    this very weight, products with W use them. Differentiable once.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    (y,) = lora_linears(x, weight, bias, [(A, B, scaling)], dropout_p, [seed], prepacked)
    return y


def lora_linears(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    dropout_p: float = 0.0,
    seeds: Sequence[int] | None = None,
    prepacked: Prepacked | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several layers on one x, their frozen weights multiplied as one.

    weight (O₁ + O₂ + …, I) and bias hold the layers' rows one after the other; `adapters` has A, B
    and scaling of each, `seeds` the seed of its own dropout mask. One wide product keeps
    more of a GPU busy than several narrow ones. The results are views of one tensor.
    """
    assert not weight.requires_grad and not (bias is not None and bias.requires_grad), "not frozen"
    seeds = seeds or [0] * len(adapters)
    assert 0 <= dropout_p < 1 and min(seeds) >= 0, f"dropout {dropout_p}, seeds {seeds}"
    scalings = tuple(scaling for _, _, scaling in adapters)
    factors = [factor for A, B, _ in adapters for factor in (A, B)]
    return _LoraLinears.apply(  # type: ignore[no-any-return, no-untyped-call] # torch's apply has no types
        x, weight, bias, scalings, dropout_p, tuple(seeds), prepacked, *factors
    )


class _LoraLinears(torch.autograd.Function):
    """Forward and backward, with M the mask over what it keeps and c = s / kept of each layer.

        forward   d = M * x                     (T, I)   not kept
                  u = c A dᵀ                    (R, T)   kept
                  y = x Wᵀ + b + uᵀ Bᵀ          (T, O)
        backward  with g = dLoss/dy             (T, O)
                  dB = (u g)ᵀ                   (O, R)
                  v = c Bᵀ gᵀ                   (R, T)
                  dA = v d                      (R, I)   d again from x and the seed
                  dx = g W + M * (vᵀ A)         (T, I)   if x needs it
    The products with W are those of all layers at once. W and b are frozen: the (O, I) product
    gᵀ x of a full backward is not computed. Rank-thin products have the short side first:
    transposed they take up to twice as long on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scalings: tuple[float, ...],
        dropout_p: float,
        seeds: tuple[int, ...],
        prepacked: Prepacked | None,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        """See the class."""
        rows = x.reshape(-1, x.shape[-1])
        us = []
        for A, scaling, seed in zip(factors[0::2], scalings, seeds, strict=True):
            mask, kept = _mask(rows, dropout_p, seed)
            u = A.to(x.dtype) @ (rows if mask is None else rows * mask).T
            us.append(u.mul_(scaling / kept))
        if prepacked is not None:
            y = linear(rows, prepacked.forward, bias)
        else:
            y = torch.mm(rows, weight.T) if bias is None else torch.addmm(bias, rows, weight.T)
        sizes = [B.shape[0] for B in factors[1::2]]
        parts = [y] if len(sizes) == 1 else torch.split(y, sizes, dim=1)
        for part, u, B in zip(parts, us, factors[1::2], strict=True):
            part.addmm_(u.T, B.to(x.dtype).T)
        ctx.save_for_backward(x, weight, *us, *factors)
        ctx.given = scalings, dropout_p, seeds, prepacked
        return tuple(part.view(*x.shape[:-1], -1) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        scalings, dropout_p, seeds, prepacked = ctx.given
        count = len(scalings)
        x, weight, *kept_tensors = ctx.saved_tensors
        us, factors = kept_tensors[:count], kept_tensors[count:]
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        rows = x.reshape(-1, x.shape[-1])
        gs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx = None
        if needs_x:
            g = gs[0] if count == 1 else torch.cat(gs, dim=1)
            dx = g @ weight if prepacked is None else linear(g, prepacked.backward)
        results: list[Tensor | None] = []
        for at, (g, u, scaling, seed) in enumerate(zip(gs, us, scalings, seeds, strict=True)):
            A, B = factors[2 * at : 2 * at + 2]
            needs_A, needs_B = needs_factors[2 * at : 2 * at + 2]
            dA = None
            if needs_A or dx is not None:
                mask, kept = _mask(rows, dropout_p, seed)
                v = (B.to(x.dtype).T @ g.T).mul_(scaling / kept)
                if needs_A:
                    dA = (v @ (rows if mask is None else rows * mask)).to(A.dtype)
                if dx is not None:
                    if mask is None:
                        dx.addmm_(v.T, A.to(x.dtype))
                    else:
                        dx.addcmul_(v.T @ A.to(x.dtype), mask)
            results += [dA, (u @ g).T.to(B.dtype) if needs_B else None]
        return None if dx is None else dx.view(x.shape), *[None] * 6, *results


def _mask(rows: Tensor, dropout_p: float, seed: int) -> tuple[Tensor | None, float]:
    """Ones and zeros in the shape and dtype of `rows`, and the share of ones in expectation."""
    dropped = round(dropout_p * _LEVELS)
    if not dropped:
        return None, 1.0
    if rows.device.type == "cpu":
        raw = np.random.SFC64(seed).random_raw(-(-rows.numel() // 4)).view(np.int16)
        bits = torch.from_numpy(raw)[: rows.numel()].view(rows.shape)
    else:
        generator = torch.Generator(rows.device).manual_seed(seed)
        bits = torch.empty(rows.shape, dtype=torch.int16, device=rows.device)
        bits.random_(-_LEVELS // 2, _LEVELS // 2, generator=generator)
    # As bytes: torch converts bool to bfloat16 eight times slower.
    ones = (bits >= dropped - _LEVELS // 2).view(torch.int8)
    return ones.to(rows.dtype), 1 - dropped / _LEVELS
