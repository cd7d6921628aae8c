"""Cross-entropy of a frozen output head, without its logits.

Owns the loss of hidden states against target ids and its gradient to the hidden states, both made
in the forward and in one pass over the head. Which positions are trained, and the final norm before
the head, are the caller's.

Dimensions: N rows (positions with a target), D hidden, V vocabulary, C columns of a tile.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = math.log2(math.e)
"""Exponentials are made by exp2: torch's exp on a CPU takes 4 times as long."""

_MAX_ROWS = {"cpu": 512, "cuda": 4096}
_TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits of a tile. On a CPU 2 MB in float32, so that a tile and its part of the head stay in the
second-level caches (`benchmarks/ops.py`); on CUDA (unmeasured) 256 MB, few kernels."""


def frozen_head_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`sum_n weights[n] * (logsumexp(z[n]) - z[n, targets[n]])`, a float32 scalar.

    z = softcap * tanh(a / softcap) with a = logit_scale * (hidden @ head_weightᵀ + bias). hidden
    (N, D) gets a gradient; head_weight (V, D) in the same dtype and bias (V,) do not. targets (N,)
    int64, weights (N,) or None for ones. Products are in hidden's dtype, the softmax in float32
    (float64 for float64). A row may stand there several times. Differentiable once.
    """
    assert not head_weight.requires_grad, "not frozen"
    assert hidden.dtype == head_weight.dtype, f"{hidden.dtype} against {head_weight.dtype}"
    return _FrozenHeadCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call] # torch's apply has no types
        hidden, head_weight, targets, weights, softcap, logit_scale, bias
    )


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Loss and d(hidden) in one pass over tiles of C vocabulary entries.

    As attention is computed without its scores (Dao et al. 2022, "FlashAttention", section 3.1),
    with hidden as queries and the head as keys and values. Kept per row are m, the greatest logit
    so far; l, the sum of exp(z - m); and the unfinished gradient G. Per tile W (C, D):

        a = scale (hidden Wᵀ + bias)        (N, C)
        z = c tanh(a / c)                   (N, C)    with a cap, z = a without
        m' = max(m, rowmax z)               (N, 1)
        e = exp(z - m')                     (N, C)
        l = l exp(m - m') + rowsum e        (N, 1)
        G = G exp(m - m') + (e * f) W       (N, D)    f = dz/da = 1 - (z / c)², without a cap 1

    Afterwards lse = m + log l and, with t the target and w the row's weight,

        loss = sum w (lse - z_t)
        d(hidden) = w scale (G / l - f_t W_t)         (N, D)

    The target's own e is left out of the tile and its term (exp(z_t - lse) - 1) f_t W_t made in
    float32: for a token that the model knows, rounding both parts to bfloat16 would leave noise.
    The code has z, m and lse in base 2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        logit_scale: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See the class."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        w = hidden.new_ones(len(targets), dtype=exact) if weights is None else weights.to(exact)
        needs_grad = ctx.needs_input_grad[0]
        grads = torch.empty_like(hidden) if needs_grad else None
        loss = hidden.new_zeros((), dtype=exact)
        most = _MAX_ROWS.get(hidden.device.type, _MAX_ROWS["cuda"])
        for start in range(0, len(hidden), most):
            rows = slice(start, start + most)
            losses, grad = _rows(
                hidden[rows], head_weight, targets[rows], softcap, logit_scale, bias, needs_grad
            )
            loss += losses @ w[rows]
            if grads is not None and grad is not None:
                torch.mul(grad, w[rows, None], out=grad)
                grads[rows] = grad
        if grads is not None:
            ctx.save_for_backward(grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the forward, times the caller's."""
        (grads,) = ctx.saved_tensors
        return (grads * grad.to(grads.dtype), *[None] * 6)


def _rows(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float | None,
    bias: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (N,) and d(losses)/d(hidden) (N, D) of some rows, in float32."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    n = len(hidden)
    scale = 1.0 if logit_scale is None else logit_scale
    elements = _TILE_ELEMENTS.get(hidden.device.type, _TILE_ELEMENTS["cuda"])
    columns = min(len(head_weight), max(256, elements // n // 256 * 256))
    products = hidden.new_empty(n * columns)
    tile = hidden.new_empty(n * columns, dtype=exact)
    column = targets[:, None]  # (N, 1)
    m = hidden.new_full((n, 1), -torch.inf, dtype=exact)
    total = hidden.new_zeros((n, 1), dtype=exact)
    z_target = hidden.new_zeros((n, 1), dtype=exact)
    G = hidden.new_zeros(hidden.shape, dtype=exact) if needs_grad else None

    for first in range(0, len(head_weight), columns):
        W = head_weight[first : first + columns]
        area = n * len(W)
        a = torch.mm(hidden, W.T, out=products[:area].view(n, -1))
        z = tile[:area].view(n, -1)
        slope = None
        if softcap is None and bias is None:
            greatest = (a if scale >= 0 else -a).amax(1, keepdim=True).to(exact) * abs(scale)
            before, m = m, torch.maximum(m, greatest * _LOG2_E)
            # Converted apart: torch is slow at adding two dtypes.
            widened = a if a.dtype == exact else z.copy_(a)
            torch.add(-m, widened, alpha=scale * _LOG2_E, out=z)  # z - m
        else:
            z.copy_(a)
            if bias is not None:
                z += bias[first : first + columns]
            z *= scale
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = (1 - z * z) if G is not None else None
                z *= softcap
            z *= _LOG2_E
            before, m = m, torch.maximum(m, z.amax(1, keepdim=True))
            z -= m
        at = (column - first).clamp(0, len(W) - 1)
        here = (column >= first) & (column < first + len(W))
        z_target += torch.where(here, z.gather(1, at) + m, 0)
        e = z.exp2_()
        shrink = (before - m).exp2_()
        total.mul_(shrink).add_(e.sum(1, keepdim=True))
        if G is None:
            continue
        e.scatter_(1, at, torch.where(here, 0, e.gather(1, at)))
        if slope is not None:
            e *= slope
        G *= shrink
        if e.dtype == hidden.dtype:
            G.addmm_(e, W)
        else:
            # The products are done with: their memory takes e in the head's dtype.
            G += a.copy_(e) @ W

    lse = m + total.log2()
    losses = ((lse - z_target) / _LOG2_E).squeeze(1)
    if G is None:
        return losses, None
    G /= total
    slope_target = scale * ((z_target - lse).exp2() - 1)
    G *= scale
    if softcap is not None:
        slope_target *= 1 - (z_target / _LOG2_E / softcap) ** 2
    G.addcmul_(head_weight[targets].to(exact), slope_target)
    return losses, G
