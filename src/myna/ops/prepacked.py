"""Frozen weights in the blocked layout of oneDNN's matrix products, for bfloat16 on CPUs.

Owns making the layouts, products with them, and the measurement whether they are faster: oneDNN
otherwise brings a weight into that layout anew for every product. Both directions take a copy of
the weight each. Who gets them is `lora/fused.py`'s.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDS = 9


@dataclass(frozen=True)
class Prepacked:
    """A weight W (O, I) for products with activations of any number of tokens."""

    forward: Tensor
    """Opaque: W, for `x Wᵀ`."""
    backward: Tensor
    """Opaque: Wᵀ, for `g W`."""


def can_prepack(weight: Tensor) -> bool:
    """Whether this torch has the layouts for `weight`: bfloat16 on a CPU that computes it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def prepack(weight: Tensor, tokens: int) -> Prepacked:
    """Both layouts of `weight` (O, I), best for products of about `tokens` rows."""
    weight = weight.detach()
    reorder: Any = torch.ops.mkldnn._reorder_linear_weight
    return Prepacked(reorder(weight, tokens), reorder(weight.T.contiguous(), tokens))


def linear(x: Tensor, layout: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` (T, I) times the transpose of the weight that `layout` holds, (T, O)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")
    return out


def gain(weight: Tensor, tokens: int) -> float:
    """How many times as fast forward and backward products are with layouts than without.

    Minima of interleaved rounds: what other programs take away falls out.
    """
    weight = weight.detach()
    packed = prepack(weight, tokens)
    x, g = (weight.new_ones(tokens, size) for size in (weight.shape[1], weight.shape[0]))

    def plain() -> None:
        torch.mm(x, weight.T)
        torch.mm(g, weight)

    def with_layouts() -> None:
        linear(x, packed.forward)
        linear(g, packed.backward)

    plain()  # what is made once
    with_layouts()
    rounds = [(_seconds(plain), _seconds(with_layouts)) for _ in range(_ROUNDS)]
    return min(before for before, _ in rounds) / min(after for _, after in rounds)


def _seconds(products: Callable[[], None]) -> float:
    started = time.perf_counter()
    products()
    return time.perf_counter() - started
