"""Against softmax over an explicit (T, T) mask, made from the tree's definition in float64."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from myna.ops import attention
from myna.ops.attention import TreeLayout, tree_attention, tree_layout

Tree = tuple[list[int], list[int]]
"""Lengths and parents of the segments."""

TWO_LEVELS = [15, *[7, 9, 30, 22, 1, 12, 28, 25]], [-1, *[0] * 8]
LONG_PREFIX = [400, *[20, 35, 1, 50, 44, 20, 38, 29]], [-1, *[0] * 8]
THREE_LEVELS = [300, 270, 290, 9, 1, 30, 300, 14, 8], [-1, 0, 0, 1, 1, 1, 2, 2, -1]
LONG_ROWS = [700, 5, 300], [-1, 0, 0]
COMB = [3] * 60, [-1, *[i // 2 * 2 for i in range(59)]]
NOT_DEPTH_FIRST = [5, 6, 7, 3, 4, 2], [-1, -1, 0, 1, 2, 0]
TREES = {
    "one token": ([1], [-1]),
    "flat": ([12, 40, 1, 33], [-1] * 4),
    "two levels": TWO_LEVELS,
    "long prefix": LONG_PREFIX,
    "three levels": THREE_LEVELS,
    "long rows": LONG_ROWS,
    "comb": COMB,
    "not depth first": NOT_DEPTH_FIRST,
}


def layout_of(tree: Tree, window: int | None = None) -> TreeLayout:
    lengths, parents = tree
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return tree_layout(offsets, torch.tensor(parents), device="cpu", window=window)


def visible(tree: Tree, window: int | None) -> Tensor:
    """(T, T) bool: walks from every token to its root."""
    lengths, parents = tree
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for segment, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        path: list[int] = []
        above = segment
        while (above := parents[above]) >= 0:
            path = [*range(starts[above], starts[above] + lengths[above]), *path]
        for token in range(start, start + length):
            keys = [*path, *range(start, token + 1)]
            seen[token, keys if window is None else keys[-window:]] = True
    return seen


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def tensors(
    tree: Tree, heads: int, key_heads: int, size: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q, k, v as a model passes them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    num_tokens = sum(tree[0])
    made = [
        torch.randn(num_tokens, number, size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(0, 1)
        for number in (heads, key_heads, key_heads, heads)
    ]
    return tuple(made)


def run(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def distance(ours: Tensor, exact: Tensor, least: float = 1e-30) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=least)).item()


def agree(
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-6,
) -> None:
    given_ = tensors(tree, *heads, dtype=dtype)
    layout = layout_of(tree, window)
    ours = run(
        lambda q, k, v: tree_attention(q, k, v, layout, scale=0.3, softcap=softcap, window=window),
        *given_,
    )
    seen = visible(tree, window)
    exact = run(lambda q, k, v: dense(q, k, v, seen, 0.3, softcap), *(x.double() for x in given_))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        # Where every token sees itself only, q and k have no gradient: then the rounding of ours
        # is measured by what goes into it.
        assert distance(a, b, least=0.1 * given_[3].norm().item()) <= tolerance


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_output_and_gradients_are_those_of_the_mask(tree: Tree, window: int | None) -> None:
    agree(tree, window=window)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("tree", [TWO_LEVELS, THREE_LEVELS], ids=["two", "three"])
def test_grouped_heads_and_soft_cap(
    tree: Tree, heads: tuple[int, int], softcap: float | None
) -> None:
    agree(tree, heads=heads, softcap=softcap, window=9 if softcap else None)


@pytest.mark.parametrize("tree", [TWO_LEVELS, LONG_PREFIX, THREE_LEVELS], ids=["2", "long", "3"])
def test_bfloat16_loses_its_own_rounding_only(tree: Tree) -> None:
    agree(tree, dtype=torch.bfloat16, tolerance=1e-2)


@st.composite
def forests(draw: st.DrawFn) -> Tree:
    number = draw(st.integers(1, 12))
    sizes = st.one_of(st.integers(1, 4), st.integers(1, 40), st.sampled_from([257, 300]))
    parents = [draw(st.integers(-1, i - 1)) for i in range(number)]
    return [draw(sizes) for _ in parents], parents


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    forests(),
    st.sampled_from([None, 1, 2, 6, 40]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([(2, 2), (2, 1)]),
)
def test_any_forest(
    tree: Tree, window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    agree(tree, window=window, softcap=softcap, heads=heads)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_finite_differences(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that all kinds of products occur in a dozen tokens.
    monkeypatch.setitem(attention._SIZES, "cpu", attention._Sizes(area=64, tile=2, long_segment=3))
    monkeypatch.setattr(attention, "_DENSE_TOKENS", 0)
    tree = [3, 1, 2, 4, 1, 2], [-1, 0, 0, 1, 3, -1]
    layout = layout_of(tree, window)
    assert layout.plan(window).buckets and layout.plan(window).products
    q, k, v, _ = tensors(tree, 2, 1, size=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: tree_attention(*x, layout, scale=0.5, softcap=softcap, window=window),
        [x.detach().clone().requires_grad_() for x in (q, k, v)],
    )


def test_layers_of_several_windows_share_a_layout() -> None:
    layout = layout_of(TWO_LEVELS)
    given_ = tensors(TWO_LEVELS, 2, 2)
    for window in (6, None, 20, 10_000):
        ours = tree_attention(*given_[:3], layout, scale=0.3, window=window)
        exact = dense(*given_[:3], visible(TWO_LEVELS, window), 0.3, None)
        assert distance(ours, exact.double()) < 1e-6
    assert layout.plan(10_000) is layout.plan(None)


def test_values_of_another_head_size() -> None:
    q, k, v, _ = tensors(TWO_LEVELS, 2, 2)
    ours = tree_attention(q, k, v[..., :5], layout_of(TWO_LEVELS), scale=0.3)
    exact = dense(q, k, v[..., :5], visible(TWO_LEVELS, None), 0.3, None)
    assert distance(ours, exact.double()) < 1e-6


def saved_bytes(tree: Tree) -> int:
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.detach().clone().requires_grad_() for x in tensors(tree, 4, 2)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = tree_attention(*leaves, layout_of(tree), scale=0.3)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("prefix", [30, 1500])
def test_saved_bytes_grow_with_tokens_not_with_rows_times_prefix(rows: int, prefix: int) -> None:
    tree = [prefix, *[40] * rows], [-1, *[0] * rows]
    tokens = prefix + 40 * rows
    # float32: q and out of 4 heads, k and v of 2, head size 16; a log-sum-exp per query head.
    assert saved_bytes(tree) == tokens * 4 * (2 * 4 * 16 + 2 * 2 * 16 + 4)


@pytest.mark.parametrize("tree", [TWO_LEVELS, THREE_LEVELS], ids=["two", "three"])
def test_two_runs_are_equal_to_the_bit(tree: Tree) -> None:
    given_ = tensors(tree, 4, 2, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        layout = layout_of(tree)
        found.append(run(lambda q, k, v, x=layout: tree_attention(q, k, v, x, scale=0.3), *given_))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("seed", range(5))
def test_buckets_pad_little_and_are_few(seed: int) -> None:
    lengths = [random.Random(f"{seed}:{i}").randint(3, 60) for i in range(40)]
    plan = layout_of(([15, *lengths], [-1, *[0] * 40])).plan(None)
    padded = sum(b.bias.numel() for b in plan.buckets)
    real = 15 * 15 + sum(length * (length + 15) for length in lengths)
    assert padded <= 1.3 * real
    assert len(plan.buckets) <= 6


def test_a_long_prefix_is_not_copied_to_its_rows() -> None:
    plan = layout_of(([1500, *[80] * 16], [-1, *[0] * 16])).plan(None)
    assert sum(b.keys.numel() for b in plan.buckets) == 16 * 80
    seen = 1500 * 1501 // 2 + 16 * 80 * 1500
    computed = sum(len(p.queries) * (p.last_key - p.first_key) for p in plan.products)
    assert seen <= computed <= 1.1 * seen, "tiles spare the half that causality hides"


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of `varlen_attn`, sequence by sequence: aligned at the bottom right."""
    assert (q.shape[1] != k.shape[1]) == enable_gqa and window_size[1] == 0
    parts = []
    for (q0, q1), (k0, k1) in zip(
        cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        one = [x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        parts.append(dense(*one, seen, scale, None).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("tree", [TWO_LEVELS, THREE_LEVELS, NOT_DEPTH_FIRST], ids=["2", "3", "n"])
def test_the_flash_path_with_a_stand_in_for_the_kernel(
    tree: Tree, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_serves_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: flash)
    agree(tree, window=window)


@pytest.mark.parametrize("window", [None, 6])
def test_torchs_own_flash_kernel_takes_what_a_tree_gives_it(window: int | None) -> None:
    """As far as shapes, dtypes and arguments go, forward and backward: nothing is computed."""
    varlen = attention._varlen_kernel()
    if varlen is None:
        pytest.skip("this torch's varlen_attn lacks what a tree needs")
    layout = layout_of(THREE_LEVELS)
    plan = layout.varlen(window)
    moved = {
        field.name: value.to("meta")
        for field in dataclasses.fields(plan)
        if isinstance(value := getattr(plan, field.name), torch.Tensor)
    }
    given_ = [
        torch.empty(n, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n, heads in ((layout.num_tokens, 4), (len(plan.keys), 2), (len(plan.keys), 2))
    ]
    out = attention._run_varlen(varlen, given_, dataclasses.replace(plan, **moved), 0.125, window)
    assert out.shape == given_[0].shape
    found = torch.autograd.grad(out, given_, torch.empty_like(out))
    assert [x.shape for x in found] == [x.shape for x in given_]


def test_flash_is_for_half_precision_on_cuda_without_cap() -> None:
    meta = torch.empty(2, 3, 64, dtype=torch.bfloat16)
    assert not attention._serves_varlen(meta, meta, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
def test_cuda(dtype: torch.dtype, window: int | None) -> None:
    for tree in TREES.values():
        given_ = [x.cuda() for x in tensors(tree, 4, 2, size=64, dtype=dtype)]
        offsets = torch.tensor([0, *tree[0]]).cumsum(0)
        layout = tree_layout(offsets, torch.tensor(tree[1]), device="cuda", window=window)
        ours = run(
            lambda q, k, v, x=layout: tree_attention(q, k, v, x, scale=0.125, window=window),
            *given_,
        )
        seen = visible(tree, window)
        exact = run(
            lambda q, k, v, x=seen: dense(q, k, v, x, 0.125, None),
            *(x.cpu().double() for x in given_),
        )
        for a, b in zip(ours, exact, strict=True):
            assert distance(a.cpu(), b, least=1) < (1e-5 if dtype == torch.float32 else 2e-2)
