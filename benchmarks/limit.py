"""The least arithmetic that a step's loss and gradients need, and how fast this machine multiplies.

Owns the formulas: counts of a step (tokens, distinct tokens, trained positions), FLOPs of its
limit with and without sharing of prefixes, and the measured rate of matrix products (the ceiling)
that turns FLOPs into seconds. Knows nothing of trainers; who is measured against the limit is
`reference_job.py`'s.

Symbols: T tokens of a step's rows, N rows, U distinct tokens after sharing prefixes and leaving out
each row's last token (its output predicts nothing), S positions with a trained next token, h hidden
size, f MLP size, V vocabulary, L layers, P parameters of the layers' linear weights, P_L those of
the adapter.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from myna.data.loader import num_targets
from myna.data.packing import pack_step
from myna.data.store import Example

MOST_ROWS = 2048
"""Products are measured with at most so many rows: more do not multiply faster, but take longer."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a decoder of Llama's kind, as far as its arithmetic goes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    rank: int
    """Of the adapter, on all seven linear layers."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of a layer's seven linear weights."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    def weights(self, *names: str) -> int:
        """Parameters of these linear weights of one layer, all seven if none is named."""
        linears = self.linears
        return sum(inner * outer for inner, outer in (linears[n] for n in names or linears))

    @property
    def adapter(self) -> int:
        """P_L: A (rank, in) and B (out, rank) on every linear weight."""
        return self.layers * self.rank * sum(map(sum, self.linears.values()))


@dataclass(frozen=True)
class Counts:
    """What a step has to compute under one way of sharing."""

    positions: int
    """Token positions computed: U with sharing, T - N without."""
    supervised: int
    """S: positions among them with a trained next token."""
    context: int
    """Sum over positions of the tokens each attends to, itself included."""
    supervised_context: int
    """The same over the supervised positions."""


def shared_counts(examples: Sequence[Example], rows: Sequence[int]) -> Counts:
    """Every distinct prefix of the step once (U)."""
    (pack,) = pack_step(examples, rows, token_budget=None)
    supervised = pack.positions.unique()
    depth = pack.position_ids + 1
    return Counts(
        pack.computed_tokens,
        supervised.numel(),
        int(depth.sum()),
        int(depth[supervised].sum()),
    )


def unshared_counts(examples: Sequence[Example], rows: Sequence[int]) -> Counts:
    """Every row on its own, without padding and without its last token (T - N)."""
    positions = supervised = context = supervised_context = 0
    for example in (examples[row] for row in rows):
        computed = len(example.prompt_ids) + len(example.completion_ids) - 1
        trained = num_targets(example)
        positions += computed
        supervised += trained
        context += _one_to(computed)
        # Trained positions are the last ones of the row.
        supervised_context += _one_to(computed) - _one_to(computed - trained)
    return Counts(positions, supervised, context, supervised_context)


def _one_to(number: int) -> int:
    return number * (number + 1) // 2


def limit_flops(sizes: Sizes, counts: Counts) -> int:
    """FLOPs below which no exact step can go: F_limit of the project's notes.

    With U positions (or T - N, for those who do not share):

        U 4P                        forward and dX of the frozen weights; no dW
        - U 2 (q, k, v)             dX of the first layer's q, k, v: nothing below them learns
        - (U - S) 4 (q, o, MLP)     the last layer is needed at supervised positions only,
                                    but for its keys and values
        + S 4 V h                   head forward and dX
        + U 6 P_L                   adapter: forward, dA and dB, dX
        + attention                 scores and weighted sum forward (2 products), dV, dP, dQ, dK
                                    backward (4), for real contexts; last layer as above

    A flash kernel computes the scores again (5 products backward); the limit does not have to.
    Norms, softmax, rotary embedding and the optimizer count nothing.
    """
    everywhere, supervised = counts.positions, counts.supervised
    base = everywhere * 4 * sizes.layers * sizes.weights()
    first = everywhere * 2 * sizes.weights("q_proj", "k_proj", "v_proj")
    last = sizes.weights("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    head = supervised * 4 * sizes.vocabulary * sizes.hidden
    contexts = (sizes.layers - 1) * counts.context + counts.supervised_context
    # A product of one query with its context: 2 FLOPs per head dimension and token; 6 of them.
    attention = 6 * 2 * sizes.heads * sizes.head_dim * contexts
    return (
        base
        - first
        - (everywhere - supervised) * 4 * last
        + head
        + everywhere * 6 * sizes.adapter
        + attention
    )


def shapes_of_step(
    sizes: Sizes, positions: int, supervised: int
) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, in, out, times) of the matrix products of a step's frozen weights."""
    times: dict[tuple[int, int], list[str]] = {}
    for name, shape in sizes.linears.items():
        times.setdefault(shape, []).append(name.removesuffix("_proj"))
    return [
        ("+".join(names), positions, inner, outer, sizes.layers * len(names))
        for (inner, outer), names in times.items()
    ] + [("head", supervised, sizes.hidden, sizes.vocabulary, 1)]


def measure_ceiling(
    sizes: Sizes,
    positions: int,
    supervised: int,
    dtypes: Sequence[str],
    *,
    device: str,
    seconds_each: float = 0.3,
) -> dict[str, Any]:
    """FLOP/s of matrix products at the process's number of threads, median within `seconds_each`.

    `square`: best of large squares, by dtype; the fraction of the limit is quoted against it.
    `shapes`: forward (X W^T) and dX (G W) of each frozen weight at the step's own number of rows.
    `own`: all of a step's products, each as often as the step needs it, at those rates.
    `seconds_each` of 0 takes the shortest possible look, at a small square.
    """
    import torch

    squares = (1024, 2048, 4096) if device == "cpu" else (4096, 8192)
    squares = squares if seconds_each else (128,)
    result: dict[str, Any] = {"square": {}, "shapes": {}, "own": {}}
    for name in dtypes:
        dtype = getattr(torch, name)
        result["square"][name] = max(
            2 * size**3 / _seconds(size, size, size, dtype, device, "forward", seconds_each)
            for size in squares
        )
        flops = taken = 0.0
        rates: dict[str, dict[str, float]] = {}
        for label, rows, inner, outer, times in shapes_of_step(sizes, positions, supervised):
            measured = min(rows, MOST_ROWS)
            rates[f"{label} {measured}x{inner}x{outer}"] = shape_rates = {}
            for direction in ("forward", "dX"):
                each = _seconds(measured, inner, outer, dtype, device, direction, seconds_each)
                shape_rates[direction] = 2 * measured * inner * outer / each
                flops += times * 2 * rows * inner * outer
                taken += times * each * rows / measured
        result["shapes"][name] = rates
        result["own"][name] = flops / taken
    return result


def _seconds(
    rows: int, inner: int, outer: int, dtype: Any, device: str, direction: str, at_least: float
) -> float:
    """Median seconds of one product; the first, which sets the library up, is not counted."""
    import torch

    weight = torch.randn(outer, inner, device=device).to(dtype)
    given = torch.randn(rows, inner if direction == "forward" else outer, device=device).to(dtype)
    out = torch.empty(rows, outer if direction == "forward" else inner, dtype=dtype, device=device)
    times: list[float] = []
    started = time.perf_counter()
    for repeat in itertools.count():
        if repeat > 3 and time.perf_counter() - started > at_least:
            return statistics.median(times[1:])
        before = time.perf_counter()
        torch.mm(given, weight.T if direction == "forward" else weight, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    raise AssertionError("count() does not end")
