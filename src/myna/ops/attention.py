"""Attention over a token tree: a token sees its ancestors and itself, nothing is computed twice.

Owns which products of queries and keys a tree needs (`TreeLayout`), and their forward and backward
(`tree_attention`). Short segments are padded together into a few batched products; a long segment,
or a long prefix with many descendants, is multiplied as it lies and merged by log-sum-exp. Where
segments come from is `data`'s, how a model comes to call this is `models/packed.py`'s.

Dimensions: T tokens of the pack, H query heads, K key/value heads, G = H / K, D head size,
N blocks of a bucket, Q queries and L keys of a block.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

_HIDDEN = -1e30
"""Added to a score that is not to be seen. Finite: a padded row sees nothing and is not NaN."""

_LOG2_E = math.log2(math.e)
"""Probabilities are made by exp2, as 2^(s * log2 e), and log-sum-exps kept in base 2: torch's exp
on a CPU takes 4 times as long, and 27 times where scores are hidden (the slow path of MKL)."""

_MAX_PADDED = 1.3
"""Padded area of all buckets over the real one, at most."""

_DENSE_TOKENS = 2048
"""Gathered key tokens that cost about as much as one product more (its operations are small)."""


@dataclass(frozen=True)
class _Sizes:
    """How the work is cut, by device. Scores of a product take heads * area * 4 bytes."""

    area: int
    """Queries times keys of one bucket, about."""
    tile: int
    """Queries, and keys, of one product at most."""
    long_segment: int
    """Longer segments are multiplied one by one, in tiles, which spares the half of the square that
    causality hides."""


# With 16 heads 2 MB of scores, about the second-level cache of a core; 8 MB were no faster, and the
# backward pass of 16 MB took twice as long.
_SIZES = {"cpu": _Sizes(area=1 << 15, tile=256, long_segment=256)}
# Unmeasured: a GPU wants few and large products.
_SIZES_ELSEWHERE = _Sizes(area=1 << 22, tile=2048, long_segment=1024)

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Bucket:
    """Short blocks, padded to one size and multiplied as one batch."""

    queries: Tensor
    """(N, Q) int64 tokens; padding is token 0."""
    keys: Tensor
    """(N, L) int64 tokens; padding is token 0."""
    bias: Tensor
    """(N, 1, 1, Q, L) float32, 0 where the query sees the key."""


@dataclass(frozen=True)
class _Product:
    """Queries against a run of keys that lie together: nothing is copied but the queries."""

    queries: Tensor
    """(Q,) int64 tokens, each once."""
    first_key: int
    last_key: int
    """The keys are tokens `first_key` to `last_key`, the latter not included."""
    masked: bool
    """Whether some query does not see some key."""


@dataclass(frozen=True)
class _Places:
    """Where tokens lie in the buckets, row by row as the buckets are laid out one after another.

    Head h of the token of occurrence i is row `start[i] * heads + h * width[i] + column[i]`. The
    last occurrence is none: its row is the one after all buckets.
    """

    start: Tensor
    width: Tensor
    column: Tensor

    def rows(self, occurrences: Tensor, heads: int) -> Tensor:
        """Rows of `occurrences` (A, ...), shape (A, heads, ...)."""
        shape = [1, heads] + [1] * (occurrences.ndim - 1)
        head = torch.arange(heads, device=occurrences.device).view(shape)
        start, width, column = (x[occurrences].unsqueeze(1) for x in self._parts())
        return start * heads + head * width + column

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        # The row of "none" has width 0, so that every head finds the same row.
        return self.start, self.width, self.column


@dataclass(frozen=True)
class _Plan:
    """The products of one tree under one window."""

    buckets: tuple[_Bucket, ...]
    products: tuple[_Product, ...]
    query_places: _Places
    query_of_token: Tensor
    """(T,) occurrence of each token among the queries of the buckets."""
    key_places: _Places
    key_sums: tuple[tuple[Tensor, Tensor], ...]
    """(A,) tokens and (A, M) their occurrences among the keys, filled up with none: the gradient of
    a key is a sum of M rows. Tokens are grouped by M, so that at most half of it is filling."""


@dataclass(frozen=True)
class _Rows:
    """A plan's indices into (T * heads, D) for a number of heads."""

    queries: tuple[Tensor, ...]
    """Of each bucket, (N * H * Q,)."""
    keys: tuple[Tensor, ...]
    """Of each bucket, (N * K * L,)."""
    of_query: Tensor
    """(T * H,) rows of the buckets' queries, laid out one after another."""
    key_sums: tuple[tuple[Tensor, int], ...]
    """Rows of the buckets' keys to be added up (A * K * M,), and M."""
    products: tuple[Tensor, ...]
    """Of each product's queries, (H * Q,)."""


@dataclass(frozen=True)
class TreeLayout:
    """A token tree and the products that its attention needs; made once per pack, by `tree_layout`.

    Plans for further windows are added when a layer first asks for one.
    """

    offsets: _Ints
    """(S + 1,): segment s is tokens `offsets[s]` to `offsets[s + 1]`."""
    parents: _Ints
    """(S,): -1 for a root."""
    depth: Tensor
    """(T,) int64, distance from the root of the tree: the position of a token in its row."""
    max_depth: int
    device: torch.device
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.offsets[-1])

    def plan(self, window: int | None) -> _Plan:
        """The products under `window`; a window that hides nothing shares the plan of None."""
        if window is not None and window > self.max_depth:
            window = None
        if window not in self._plans:
            self._plans[window] = _Planner(self, window).plan()
        plan: _Plan = self._plans[window]
        return plan

    def varlen(self, window: int | None) -> "_VarlenPlan":
        """Every segment with all its keys, for the flash kernel."""
        place = ("varlen", window)
        if place not in self._plans:
            self._plans[place] = _Planner(self, window).varlen_plan()
        plan: _VarlenPlan = self._plans[place]
        return plan

    def rows(self, window: int | None, heads: int, key_heads: int) -> tuple[_Plan, _Rows]:
        """The plan and its indices for `heads` query and `key_heads` key/value heads."""
        plan = self.plan(window)
        place = (id(plan), heads, key_heads)
        if place not in self._plans:
            self._plans[place] = _rows(plan, heads, key_heads)
        return plan, self._plans[place]


def tree_layout(
    segment_offsets: Tensor,
    parents: Tensor,
    *,
    device: torch.device | str,
    window: int | None = None,
) -> TreeLayout:
    """Layout of the tree whose segment s is tokens `segment_offsets[s]:segment_offsets[s + 1]`.

    `segment_offsets` (S + 1,) rises from 0, so no segment is empty; `parents` (S,) holds the index
    of each segment's parent, smaller than its own, or -1. The plan for `window` is made at once.
    """
    offsets = segment_offsets.cpu().numpy().astype(np.int64)
    above = parents.cpu().numpy().astype(np.int64)
    lengths = np.diff(offsets)
    assert len(offsets) == len(above) + 1 and len(above), "one offset more than segments"
    assert offsets[0] == 0 and (lengths > 0).all(), "segments follow one another, none is empty"
    assert (above < np.arange(len(above))).all() and (above >= -1).all(), "parents come first"
    first_depth = np.zeros(len(above), dtype=np.int64)
    for segment, parent in enumerate(above):
        if parent >= 0:
            first_depth[segment] = first_depth[parent] + lengths[parent]
    depth = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first_depth, lengths)
    device = torch.device(device)
    layout = TreeLayout(
        offsets, above, torch.from_numpy(depth).to(device), int(depth.max()), device
    )
    layout.plan(window)
    return layout


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q kᵀ) v, where a token sees itself and its ancestors in the tree.

    q (H, T, D), k (K, T, D), v (K, T, Dv), with K a divisor of H; out (H, T, Dv) in their dtype.
    The softmax is computed in float32 or better. With `softcap` c, scores s become c * tanh(s / c)
    (Gemma Team 2024, "Gemma 2", section 2). With `window` W a token at depth d sees depths above
    d - W, as in transformers. Once differentiable; kept for the backward pass are q, k, v, out and
    T * H log-sum-exps, whatever the tree. The order of sums is fixed.
    """
    assert q.shape[1] == k.shape[1] == v.shape[1] == layout.num_tokens, "a layout of other tokens"
    varlen = _varlen_kernel() if _serves_varlen(q, v, softcap) else None
    if varlen is not None:
        out: Tensor = _VarlenAttention.apply(  # type: ignore[no-untyped-call]  # as torch has it
            q, k, v, layout, scale, window, varlen
        )
    else:
        out = _TreeAttention.apply(  # type: ignore[no-untyped-call]  # as torch has it
            q, k, v, layout, scale, softcap, window
        )
    return out


class _TreeAttention(torch.autograd.Function):
    """The products of a plan, forward and backward.

    With scores S, cap c, P = exp(S - lse), lse over *all* keys of a query, and g = dLoss/dout:

        forward   S = scale * q kᵀ              (Q, L)
                  S = c * tanh(S / c)                        with a cap
                  out = P v                     (Q, Dv)
        backward  dv = Pᵀ g                     (L, Dv)
                  dP = g vᵀ                     (Q, L)
                  dS = P * (dP - delta)         (Q, L)       the softmax, where
                  delta = rowsum(g * out)       (Q, 1)       = rowsum(g * P v) = rowsum(P * dP)
                  dS *= 1 - (S / c)²                         with a cap, from tanh' = 1 - tanh²
                  dq = scale * dS k             (Q, D)
                  dk = scale * dSᵀ q            (L, D)

    Because P of the backward is made with the lse over all keys, it splits into products without
    any merging: each adds its part. In the forward a product knows its own keys only; parts (out_1,
    lse_1), (out_2, lse_2) merge to lse = logaddexp(lse_1, lse_2) and
    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.
    (Dao et al. 2022, "FlashAttention", sections 3.1 and B.4.) The code has S and lse in base 2.

    Queries of the G heads that share a key head are laid one below the other: (N * K, G * Q, D) by
    (N * K, L, D), so keys are never repeated and dk comes out summed over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TreeLayout,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """See the class."""
        work = _Work(q, k, v, layout, scale, softcap, window)
        heads, size = q.shape[0], v.shape[2]
        slots = sum(len(rows) for rows in work.rows.queries)
        out_slots = work.v.new_empty(slots + 1, size)
        lse_slots = work.v.new_empty(slots + 1, dtype=work.exact)
        out_slots[slots:], lse_slots[slots:] = 0, _HIDDEN  # of tokens that are in no bucket
        at = 0
        for bucket, q_rows, k_rows in work.buckets():
            block_k = work.key_batch(work.k.index_select(0, k_rows), bucket)
            scores, _ = work.scores(work.q.index_select(0, q_rows), block_k, bucket.bias)
            lse = _normalise(scores)
            block_v = work.key_batch(work.v.index_select(0, k_rows), bucket)
            p = work.as_batch(scores.to(v.dtype))
            to = at + len(q_rows)
            torch.bmm(p, block_v, out=out_slots[at:to].view(p.shape[0], p.shape[1], size))
            lse_slots[at:to] = lse.flatten()
            at = to
        out = out_slots.index_select(0, work.rows.of_query)  # (T * H, Dv)
        lse_all = lse_slots.index_select(0, work.rows.of_query)  # (T * H,)
        if work.plan.products:
            out = out.to(work.exact)
        for product, q_rows, block_k, block_v in work.products():
            scores, _ = work.scores(work.q.index_select(0, q_rows), block_k, work.bias(product))
            lse = _normalise(scores).flatten()  # (H * Q,)
            part = torch.bmm(work.as_batch(scores.to(v.dtype)), block_v)
            before = lse_all.index_select(0, q_rows)
            both = torch.logaddexp2(before, lse)
            lse_all[q_rows] = both
            merged = out.index_select(0, q_rows) * (before - both).exp2_()[:, None]
            out[q_rows] = merged.addcmul_(
                part.view(-1, size).to(work.exact), (lse - both).exp2_()[:, None]
            )
        out = out.to(v.dtype).view(-1, heads, size).transpose(0, 1)  # (H, T, Dv)
        ctx.save_for_backward(q, k, v, out, lse_all)
        ctx.given = layout, scale, softcap, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        q, k, v, out, lse_all = ctx.saved_tensors
        work = _Work(q, k, v, *ctx.given)
        g = _token_rows(grad)  # (T * H, Dv)
        delta = torch.linalg.vecdot(g.to(work.exact), _token_rows(out).to(work.exact))  # (T * H,)

        q_slots = sum(len(rows) for rows in work.rows.queries)
        k_slots = sum(len(rows) for rows in work.rows.keys)
        dq_slots = work.q.new_empty(q_slots + 1, q.shape[2])
        dk_slots = work.k.new_empty(k_slots + 1, k.shape[2])
        dv_slots = work.v.new_empty(k_slots + 1, v.shape[2])
        dq_slots[q_slots:], dk_slots[k_slots:], dv_slots[k_slots:] = 0, 0, 0
        q_at = k_at = 0
        for bucket, q_rows, k_rows in work.buckets():
            block_q, block_g = work.q.index_select(0, q_rows), g.index_select(0, q_rows)
            block_k = work.key_batch(work.k.index_select(0, k_rows), bucket)
            block_v = work.key_batch(work.v.index_select(0, k_rows), bucket)
            q_to, k_to = q_at + len(q_rows), k_at + len(k_rows)
            work.differentiate(
                (block_q, block_k, block_v, block_g),
                bucket.bias,
                lse_all.index_select(0, q_rows),
                delta.index_select(0, q_rows),
                dq_slots[q_at:q_to],
                dk_slots[k_at:k_to].view_as(block_k),
                dv_slots[k_at:k_to].view_as(block_v),
            )
            q_at, k_at = q_to, k_to
        dq = dq_slots.index_select(0, work.rows.of_query)  # (T * H, D)
        dk = work.key_gradient(dk_slots)  # (T, K, D)
        dv = work.key_gradient(dv_slots)
        if work.plan.products:
            dq, dk, dv = dq.to(work.exact), dk.to(work.exact), dv.to(work.exact)
        for product, q_rows, block_k, block_v in work.products():
            block_q, block_g = work.q.index_select(0, q_rows), g.index_select(0, q_rows)
            parts = torch.empty_like(block_q), torch.empty_like(block_k), torch.empty_like(block_v)
            work.differentiate(
                (block_q, block_k, block_v, block_g),
                work.bias(product),
                lse_all.index_select(0, q_rows),
                delta.index_select(0, q_rows),
                *parts,
            )
            keys = slice(product.first_key, product.last_key)
            dq[q_rows] = dq.index_select(0, q_rows) + parts[0]
            dk[keys] += parts[1].transpose(0, 1)
            dv[keys] += parts[2].transpose(0, 1)
        dq = dq.to(q.dtype).view(q.shape[1], q.shape[0], -1)
        return (
            dq.transpose(0, 1),
            dk.to(k.dtype).transpose(0, 1),
            dv.to(v.dtype).transpose(0, 1),
            None,
            None,
            None,
            None,
        )


class _Work:
    """One call's tensors as rows of (token, head), its plan, and the arithmetic of one product."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TreeLayout,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> None:
        self.q, self.k, self.v = _token_rows(q), _token_rows(k), _token_rows(v)
        self.heads, self.key_heads = q.shape[0], k.shape[0]
        self.num_tokens = q.shape[1]
        self.plan, self.rows = layout.rows(window, self.heads, self.key_heads)
        self.depth, self.window = layout.depth, window
        self.scale, self.softcap = scale, softcap
        self.exact = torch.promote_types(q.dtype, torch.float32)

    def buckets(self) -> Iterator[tuple[_Bucket, Tensor, Tensor]]:
        return zip(self.plan.buckets, self.rows.queries, self.rows.keys, strict=True)

    def products(self) -> Iterator[tuple[_Product, Tensor, Tensor, Tensor]]:
        """Each product, the rows of its queries, its keys (K, L, D) and values (K, L, Dv)."""
        known, k, v = None, self.k, self.v
        for product, rows in zip(self.plan.products, self.rows.products, strict=True):
            which = slice(product.first_key, product.last_key)
            if which != known:
                # Contiguous: oneDNN would copy a strided batch anew for every multiplication.
                known = which
                k, v = (
                    x.view(self.num_tokens, self.key_heads, -1)[which].transpose(0, 1).contiguous()
                    for x in (self.k, self.v)
                )
            yield product, rows, k, v

    def key_batch(self, rows: Tensor, bucket: _Bucket) -> Tensor:
        """Rows (N * K * L, D) as (N * K, L, D)."""
        return rows.view(-1, bucket.keys.shape[1], rows.shape[1])

    def as_batch(self, scores: Tensor) -> Tensor:
        """(N, K, G, Q, L) as (N * K, G * Q, L)."""
        return scores.view(-1, scores.shape[2] * scores.shape[3], scores.shape[4])

    def bias(self, product: _Product) -> Tensor | None:
        """(Q, L), made anew: for all layers at once it would take the square of a row's length."""
        if not product.masked:
            return None
        keys = self.depth[product.first_key : product.last_key]
        queries = self.depth[product.queries][:, None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return hidden.to(self.exact).mul_(_HIDDEN)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Masked scores (N, K, G, Q, L) in float32 or better, in base 2, and with a cap S / c.

        q (N * H * Q, D) rows; k (N * K, L, D).
        """
        q = q.view(k.shape[0], -1, q.shape[1])
        factor = self.scale * _LOG2_E if self.softcap is None else self.scale / self.softcap
        scores = _scaled_bmm(q, k.transpose(1, 2), factor).to(self.exact)
        scores = scores.view(-1, self.key_heads, self.heads // self.key_heads, *self._area(scores))
        if self.softcap is None:
            return scores if bias is None else scores.add_(bias), None
        capped = scores.tanh_()
        factor = self.softcap * _LOG2_E
        return capped * factor if bias is None else torch.add(bias, capped, alpha=factor), capped

    def _area(self, scores: Tensor) -> tuple[int, int]:
        """Q and L of scores (N * K, G * Q, L)."""
        return scores.shape[1] * self.key_heads // self.heads, scores.shape[2]

    def differentiate(
        self,
        blocks: tuple[Tensor, Tensor, Tensor, Tensor],
        bias: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Write dq (N * H * Q, D), dk (N * K, L, D) and dv (N * K, L, Dv) of one product.

        `blocks` are q (N * H * Q, D), k (N * K, L, D), v (N * K, L, Dv), g (N * H * Q, Dv); `lse`
        and `delta` (N * H * Q,).
        """
        q, k, v, g = blocks
        p, capped = self.scores(q, k, bias)  # (N, K, G, Q, L)
        per_query = (*p.shape[:-1], 1)
        p.sub_(lse.view(per_query)).exp2_()
        q, g = q.view(k.shape[0], -1, q.shape[1]), g.view(k.shape[0], -1, g.shape[1])
        torch.bmm(self.as_batch(p.to(v.dtype)).transpose(1, 2), g, out=dv)
        ds = torch.bmm(g, v.transpose(1, 2)).to(self.exact).view(p.shape)  # dP
        ds.sub_(delta.view(per_query)).mul_(p)
        if capped is not None:
            ds.addcmul_(ds * capped, capped, value=-1)
        ds_batch = self.as_batch(ds.to(q.dtype))  # (N * K, G * Q, L)
        _scaled_bmm(ds_batch, k, self.scale, out=dq.view(q.shape))
        _scaled_bmm(ds_batch.transpose(1, 2), q, self.scale, out=dk)

    def key_gradient(self, slots: Tensor) -> Tensor:
        """Gradients of the buckets' keys (rows, D), the last row 0, as those of the tokens."""
        sums = [
            (tokens, *rows)
            for (tokens, _), rows in zip(self.plan.key_sums, self.rows.key_sums, strict=True)
        ]
        return _sum_per_token(slots, sums, self.num_tokens, self.key_heads)


class _VarlenAttention(torch.autograd.Function):
    """The same by torch's variable-length flash attention: every segment with all its keys.

    Unmeasured and, for want of a GPU, tested against a stand-in for the kernel only; the check at
    the start of a run (`models/packed.py`) compares it with the model's own attention. K and V are
    gathered for the time of the call; kept are q, k and v. The backward runs the forward again,
    because the kernel's own backward is not public.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TreeLayout,
        scale: float,
        window: int | None,
        varlen: Callable[..., Any],
    ) -> Tensor:
        """See the class."""
        ctx.save_for_backward(q, k, v)
        ctx.given = layout, scale, window, varlen
        plan = layout.varlen(window)
        tensors = _token_first(q), _gathered(k, plan), _gathered(v, plan)
        return _run_varlen(varlen, tensors, plan, scale, window).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        q, k, v = ctx.saved_tensors
        layout, scale, window, varlen = ctx.given
        plan = layout.varlen(window)
        tensors = tuple(
            x.detach().requires_grad_()
            for x in (_token_first(q), _gathered(k, plan), _gathered(v, plan))
        )
        with torch.enable_grad():
            out = _run_varlen(varlen, tensors, plan, scale, window)
        dq, *rest = torch.autograd.grad(out, tensors, _token_first(grad))
        found = []
        for gathered in rest:  # (keys, K, D)
            rows = torch.cat([gathered.flatten(1), gathered.new_zeros(1, gathered[0].numel())])
            total = _sum_per_token(rows, plan.sums, q.shape[1], 1)
            found.append(total.view(-1, *gathered.shape[1:]).transpose(0, 1))
        return (dq.transpose(0, 1), *found, None, None, None, None)


@dataclass(frozen=True)
class _VarlenPlan:
    """Segments with all their keys, one after another."""

    keys: Tensor
    """Tokens, path by path."""
    query_offsets: Tensor
    key_offsets: Tensor
    """(S + 1,) int32."""
    most_queries: int
    most_keys: int
    sums: tuple[tuple[Tensor, Tensor, int], ...]
    """As `_sum_per_token` wants them."""


def _serves_varlen(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and q.shape[2] == v.shape[2] <= 256
        and q.shape[2] % 8 == 0
    )


@cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, if this release's takes what a tree needs; signatures have changed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


def _run_varlen(
    varlen: Callable[..., Any],
    tensors: Sequence[Tensor],
    plan: _VarlenPlan,
    scale: float,
    window: int | None,
) -> Tensor:
    """(T, H, Dv) of q (T, H, D) and gathered k, v (keys, K, D)."""
    q, k, v = tensors
    out: Tensor = varlen(
        q,
        k,
        v,
        plan.query_offsets,
        plan.key_offsets,
        plan.most_queries,
        plan.most_keys,
        scale=scale,
        # Causal, the last query aligned with the last key. A window of W counts the token itself.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _token_first(x: Tensor) -> Tensor:
    """(heads, T, D) as (T, heads, D)."""
    return x.transpose(0, 1).contiguous()


def _gathered(x: Tensor, plan: _VarlenPlan) -> Tensor:
    """x (K, T, D) at the plan's keys, (keys, K, D)."""
    return x.transpose(0, 1).index_select(0, plan.keys)


def _sum_per_token(
    rows: Tensor, sums: Sequence[tuple[Tensor, Tensor, int]], num_tokens: int, heads: int
) -> Tensor:
    """(num_tokens, heads, D), of each token the sum of some of `rows` (A, D); the last row is 0.

    `sums` are tokens (B,), row numbers (B * heads * M,) and M. Not by index_add: on a GPU that adds
    in whatever order threads arrive.
    """
    size = rows.shape[1]
    total = rows.new_zeros(num_tokens, heads, size)
    exact = torch.promote_types(rows.dtype, torch.float32)
    for tokens, chosen, number in sums:
        parts = rows.index_select(0, chosen).view(len(tokens), heads, number, size)
        total[tokens] = parts.sum(2, dtype=exact).to(rows.dtype) if number > 1 else parts.squeeze(2)
    return total


def _scaled_bmm(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor * a b, the factor at no cost."""
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def _token_rows(x: Tensor) -> Tensor:
    """(heads, T, D) as (T * heads, D); free for what a linear layer wrote."""
    return x.transpose(0, 1).reshape(-1, x.shape[2])


def _normalise(scores: Tensor) -> Tensor:
    """Make scores (..., L) of base 2 probabilities in place; their log-sum-exp (...), base 2."""
    highest = scores.amax(-1, keepdim=True)
    total = scores.sub_(highest).exp2_().sum(-1, keepdim=True)
    scores.div_(total)
    return highest.add_(total.log2_()).squeeze(-1)


def _rows(plan: _Plan, heads: int, key_heads: int) -> _Rows:
    def spread(tokens: Tensor, heads: int) -> Tensor:
        head = torch.arange(heads, device=tokens.device)[:, None]
        return (tokens[..., None, :] * heads + head).flatten()

    return _Rows(
        tuple(spread(bucket.queries, heads) for bucket in plan.buckets),
        tuple(spread(bucket.keys, key_heads) for bucket in plan.buckets),
        plan.query_places.rows(plan.query_of_token, heads).flatten(),
        tuple(
            (plan.key_places.rows(occurrences, key_heads).flatten(), occurrences.shape[1])
            for _, occurrences in plan.key_sums
        ),
        tuple(spread(product.queries, heads) for product in plan.products),
    )


class _Planner:
    """Decides what is multiplied with what."""

    def __init__(self, layout: TreeLayout, window: int | None) -> None:
        self.offsets, self.parents = layout.offsets, layout.parents
        self.depth: _Ints = layout.depth.cpu().numpy()
        self.window, self.device = window, layout.device
        self.sizes = _SIZES.get(layout.device.type, _SIZES_ELSEWHERE)
        self.lengths: _Ints = np.diff(self.offsets)
        self.is_long = self.lengths > self.sizes.long_segment
        self.is_dense = self._dense()

    def plan(self) -> _Plan:
        blocks = [self._block(s) for s in np.flatnonzero(~self.is_long).tolist()]
        groups = _bucketed([(len(q), len(k)) for q, k in blocks], self.sizes.area)
        buckets = [self._bucket([blocks[i] for i in group]) for group in groups]
        queries = _Occurrences(self.device)
        keys = _Occurrences(self.device)
        for group in groups:
            queries.add([blocks[i][0] for i in group])
            keys.add([blocks[i][1] for i in group])
        products = [*self._own_products(), *self._prefix_products()]
        return _Plan(
            tuple(buckets),
            tuple(products),
            queries.places(),
            queries.single(len(self.depth)),
            keys.places(),
            keys.sums(len(self.depth)),
        )

    def _tokens(self, segment: int) -> _Ints:
        return np.arange(self.offsets[segment], self.offsets[segment + 1])

    def _dense(self) -> NDArray[np.bool_]:
        """Which segments meet their short descendants in products of their own.

        The others are gathered into the keys of each descendant: a copy per descendant segment, but
        no further product and no merging.
        """
        below = np.zeros(len(self.parents), dtype=np.int64)  # short descendant segments
        queries = np.zeros(len(self.parents), dtype=np.int64)  # and their tokens
        for segment in range(len(self.parents) - 1, -1, -1):
            parent = self.parents[segment]
            if parent >= 0:
                short = not self.is_long[segment]
                below[parent] += below[segment] + short
                queries[parent] += queries[segment] + short * self.lengths[segment]
        copies = below * self.lengths
        gain = copies - queries
        dense: NDArray[np.bool_] = gain > _DENSE_TOKENS
        # Whatever the tree, copies take no more than a few times the room of the tokens.
        room = 8 * len(self.depth) + _DENSE_TOKENS
        for segment in np.argsort(-gain, kind="stable"):
            if copies[~dense].sum() <= room:
                break
            dense[segment] = True
        return dense

    def varlen_plan(self) -> _VarlenPlan:
        paths = [self._block(s, whole=True)[1] for s in range(len(self.parents))]
        counts = np.array([len(path) for path in paths])
        occurrences = _Occurrences(self.device)
        for path in paths:
            occurrences.add([path])
        places = occurrences.places()
        offsets = [self.offsets, np.concatenate([[0], np.cumsum(counts)])]
        query_offsets, key_offsets = (
            torch.from_numpy(x.astype(np.int32)).to(self.device) for x in offsets
        )
        return _VarlenPlan(
            torch.from_numpy(np.concatenate(paths)).to(self.device),
            query_offsets,
            key_offsets,
            int(self.lengths.max()),
            int(counts.max()),
            tuple(
                (tokens, places.rows(chosen, 1).flatten(), chosen.shape[1])
                for tokens, chosen in occurrences.sums(len(self.depth))
            ),
        )

    def _block(self, segment: int, *, whole: bool = False) -> tuple[_Ints, _Ints]:
        """Tokens of a segment, and the keys gathered for it: its path, then itself.

        With `whole` the path holds dense segments too.
        """
        own = self._tokens(segment)
        parts = [own]
        above = self.parents[segment]
        while above >= 0:
            if whole or not self.is_dense[above]:
                parts.append(self._tokens(above))
            above = self.parents[above]
        keys = np.concatenate(parts[::-1])
        if self.window is not None:
            keys = keys[self.depth[keys] > self.depth[own[0]] - self.window]
        return own, keys

    def _bucket(self, blocks: Sequence[tuple[_Ints, _Ints]]) -> _Bucket:
        queries = _padded([q for q, _ in blocks])
        keys = _padded([k for _, k in blocks])
        query_depth = self.depth[queries][:, :, None]
        key_depth = self.depth[keys][:, None, :]
        hidden = (key_depth > query_depth) | (queries < 0)[:, :, None] | (keys < 0)[:, None, :]
        if self.window is not None:
            hidden |= key_depth <= query_depth - self.window
        bias = torch.from_numpy(np.where(hidden, np.float32(_HIDDEN), np.float32(0)))
        return _Bucket(
            torch.from_numpy(queries.clip(0)).to(self.device),
            torch.from_numpy(keys.clip(0)).to(self.device),
            bias[:, None, None].to(self.device),
        )

    def _own_products(self) -> Iterator[_Product]:
        """Long segments with themselves."""
        tile = self.sizes.tile
        for segment in np.flatnonzero(self.is_long).tolist():
            tokens = self._tokens(segment)
            for first in range(0, len(tokens), tile):
                yield from self._tiles(tokens[first:], tokens[first : first + tile])

    def _prefix_products(self) -> Iterator[_Product]:
        """Segments with those descendants that do not gather them."""
        descendants: dict[int, list[_Ints]] = {}
        for segment in range(len(self.parents)):
            above = self.parents[segment]
            while above >= 0:
                if self.is_dense[above] or self.is_long[segment]:
                    descendants.setdefault(int(above), []).append(self._tokens(segment))
                above = self.parents[above]
        for segment, found in sorted(descendants.items()):
            keys = self._tokens(segment)
            queries = np.concatenate(found)
            for first in range(0, len(keys), self.sizes.tile):
                yield from self._tiles(queries, keys[first : first + self.sizes.tile])

    def _tiles(self, queries: _Ints, keys: _Ints) -> Iterator[_Product]:
        """The products of many queries with a tile of keys."""
        if self.window is not None:
            queries = queries[self.depth[queries] - self.window < self.depth[keys[-1]]]
        for start in range(0, len(queries), self.sizes.tile):
            yield from self._product(queries[start : start + self.sizes.tile], keys)

    def _product(self, queries: _Ints, keys: _Ints) -> Iterator[_Product]:
        """The product of these, less keys at the start that none of the queries sees."""
        query_depth = self.depth[queries]
        if self.window is not None:
            keys = keys[self.depth[keys] > query_depth.min() - self.window]
        key_depth = self.depth[keys]
        masked = bool(key_depth[-1] > query_depth.min())
        if self.window is not None:
            masked |= bool(key_depth[0] <= query_depth.max() - self.window)
        yield _Product(
            torch.from_numpy(queries).to(self.device), int(keys[0]), int(keys[-1]) + 1, masked
        )


class _Occurrences:
    """Collects where tokens lie while buckets are laid out one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens: list[_Ints] = []
        self.parts: list[tuple[_Ints, _Ints, _Ints]] = []
        self.total = 0

    def add(self, blocks: Sequence[_Ints]) -> None:
        """A bucket of `blocks`."""
        width = max(map(len, blocks))
        for tokens in blocks:
            self.tokens.append(tokens)
            number = len(tokens)
            self.parts.append(
                (np.full(number, self.total), np.full(number, width), np.arange(number))
            )
            self.total += width

    def places(self) -> _Places:
        none = (np.array([self.total]), np.array([0]), np.array([0]))
        joined = [np.concatenate(arrays) for arrays in zip(*self.parts, none, strict=True)]
        start, width, column = (torch.from_numpy(array).to(self.device) for array in joined)
        return _Places(start, width, column)

    def single(self, num_tokens: int) -> Tensor:
        """(T,) the occurrence of each token, of which there is one or none."""
        number = sum(map(len, self.tokens))
        occurrence = np.full(num_tokens, number)
        if self.tokens:
            occurrence[np.concatenate(self.tokens)] = np.arange(number)
        return torch.from_numpy(occurrence).to(self.device)

    def sums(self, num_tokens: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """`_Plan.key_sums`."""
        if not self.tokens:
            return ()
        tokens = np.concatenate(self.tokens)
        order = np.argsort(tokens, kind="stable")
        counts = np.bincount(tokens, minlength=num_tokens)
        firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        found = []
        width = 1
        while (chosen := np.flatnonzero((counts > width // 2) & (counts <= width))).size or (
            width < counts.max()
        ):
            if chosen.size:
                column = np.arange(width)
                place = np.minimum(firsts[chosen][:, None] + column, len(order) - 1)
                occurrence = np.where(column < counts[chosen][:, None], order[place], len(order))
                found.append(
                    (
                        torch.from_numpy(chosen).to(self.device),
                        torch.from_numpy(occurrence).to(self.device),
                    )
                )
            width *= 2
        return tuple(found)


def _padded(rows: Sequence[_Ints]) -> _Ints:
    """(N, longest), filled with -1."""
    filled = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for line, row in zip(filled, rows, strict=True):
        line[: len(row)] = row
    return filled


def _bucketed(sizes: Sequence[tuple[int, int]], area: int) -> list[list[int]]:
    """Indices of `sizes` (Q, L) in few groups; padded areas sum to at most 1.3 times the real ones.

    Groups are runs of the sorted sizes, sorted by queries or by keys, whichever needs fewer. A
    group of several takes no more than `area`.
    """
    if not sizes:
        return []
    queries, keys = np.array(sizes, dtype=np.int64).T
    orders = np.lexsort((keys, queries)), np.lexsort((queries, keys))
    best: list[list[int]] | None = None
    for order in orders:
        groups = []
        for start, stop in _runs(queries[order], keys[order]):
            chosen = order[start:stop]
            one = queries[chosen].max() * keys[chosen].max()
            step = max(1, int(area // one))
            groups += [chosen[i : i + step].tolist() for i in range(0, len(chosen), step)]
        if best is None or len(groups) < len(best):
            best = groups
    assert best is not None
    return best


def _runs(queries: _Ints, keys: _Ints) -> list[tuple[int, int]]:
    """Fewest runs whose padded areas sum to at most 1.3 times the real ones, as (start, stop)."""
    # Runs that waste next to nothing are never cut, so that many segments stay few units.
    units = [0]
    for stop in range(1, len(queries) + 1):
        part = slice(units[-1], stop)
        wide = (stop - units[-1]) * queries[part].max() * keys[part].max()
        if wide > 1.05 * (queries[part] * keys[part]).sum():
            units.append(stop - 1)
    units.append(len(queries))
    edges = np.array(units)
    number = len(edges) - 1
    tallest = np.maximum.reduceat(queries, edges[:-1])
    widest = np.maximum.reduceat(keys, edges[:-1])
    # cost[i, j]: padded area of a run from unit i to unit j, both included.
    cost = np.full((number, number), np.inf)
    for i in range(number):
        height = np.maximum.accumulate(tallest[i:])
        width = np.maximum.accumulate(widest[i:])
        cost[i, i:] = (edges[i + 1 :] - edges[i]) * height * width
    allowed = _MAX_PADDED * float((queries * keys).sum())
    # least[j]: padded area of the units up to j, in as many runs as rounds so far.
    least = cost[0]
    cuts: list[_Ints] = []
    while least[-1] > allowed:
        joined = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        cuts.append(joined.argmin(0))
        least = joined.min(0)
    stop = number
    found = []
    for cut in reversed(cuts):
        start = int(cut[stop - 1])
        found.append((int(edges[start]), int(edges[stop])))
        stop = start
    found.append((0, int(edges[stop])))
    return found[::-1]
