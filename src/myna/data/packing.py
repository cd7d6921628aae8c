"""Packing: the rows of one optimizer step as few flat token trees, each within a token budget.

Owns which rows are computed together, which prefix is computed again where a tree must be cut, and
where in a pack which token is predicted with what weight. Trees are `tree.py`'s, the rows of a
step `loader.py`'s, the choice of a budget is the memory planner's. How a step is cut changes what
it costs, never its loss: every trained token of every row is in exactly one pack.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from myna.data.store import Example
from myna.data.tree import count_tokens, sorted_prefixes, token_tree


@dataclass(frozen=True)
class Pack:
    """Some rows of one step as a flat token tree (T tokens, S segments, N predictions)."""

    rows: tuple[int, ...]
    """Indices of the rows in the training set, in the order of the step."""
    input_ids: Tensor
    """(T,) int64, segments one after the other, every parent before its children."""
    position_ids: Tensor
    """(T,) int64, depth in the tree, from 0."""
    segment_offsets: Tensor
    """(S + 1,) int64: segment s is the tokens from offset s to offset s + 1, at least one."""
    parents: Tensor
    """(S,) int64: index of the parent segment, -1 for a root."""
    positions: Tensor
    """(N,) int64 into the T tokens: where a trained token is predicted, one before it."""
    targets: Tensor
    """(N,) int64, the trained tokens; no (position, target) occurs twice."""
    weights: Tensor
    """(N,) float32: the sum of the weights of the rows that train this token here."""
    real_tokens: int
    """Sum of the rows' lengths."""
    computed_tokens: int
    """T."""

    def to(self, device: torch.device) -> "Pack":
        """The same pack on `device`."""
        return Pack(
            self.rows,
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.segment_offsets.to(device),
            self.parents.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.weights.to(device),
            self.real_tokens,
            self.computed_tokens,
        )


def pack_step(
    examples: Sequence[Example], rows: Sequence[int], *, token_budget: int | None
) -> list[Pack]:
    """The rows `rows` of `examples` in few packs of at most `token_budget` computed tokens each.

    Largest pack first, so that a lack of memory shows at once. A row that is longer than the budget
    has a pack without any other token; None means no limit, so one pack. A row may be named more
    than once and counts as often. Rows of one token, which compute nothing, stand in the first
    pack; where there are no others, there is no pack.

    The result is a function of the arguments alone.
    """
    assert token_budget is None or token_budget >= 1, f"a budget of {token_budget} tokens"
    ids = [_token_ids(examples[row]) for row in rows]
    computed = [at for at in range(len(rows)) if len(ids[at]) > 1]
    if not computed:
        return []
    groups = [computed]
    if token_budget is not None:
        groups = [
            [computed[at] for at in group]
            for group in _cut([ids[at] for at in computed], token_budget)
        ]
    groups[0] = sorted(groups[0] + [at for at in range(len(rows)) if len(ids[at]) <= 1])
    return [
        _pack(
            tuple(rows[at] for at in group),
            [ids[at] for at in group],
            [len(examples[rows[at]].prompt_ids) for at in group],
            [examples[rows[at]].weight for at in group],
        )
        for group in groups
    ]


def filled(pack: Pack, multiple: int) -> Pack:
    """The pack with a root of idle tokens at its end that makes T a multiple of `multiple`.

    They see and are seen by nothing, and predict nothing, so loss and gradients stay.
    """
    idle = -pack.computed_tokens % multiple
    if not idle:
        return pack
    return replace(
        pack,
        input_ids=torch.cat([pack.input_ids, pack.input_ids[:1].expand(idle)]),
        position_ids=torch.cat([pack.position_ids, torch.arange(idle)]),
        segment_offsets=torch.cat([pack.segment_offsets, pack.segment_offsets[-1:] + idle]),
        parents=torch.cat([pack.parents, torch.tensor([-1])]),
        computed_tokens=pack.computed_tokens + idle,
    )


def packed_tokens(examples: Sequence[Example], rows: Sequence[int]) -> int:
    """Tokens computed for these rows in one pack; beside their lengths, what sharing saves."""
    return count_tokens([_token_ids(examples[row]) for row in rows])


def _token_ids(example: Example) -> tuple[int, ...]:
    return (*example.prompt_ids, *example.completion_ids)


def _pack(
    rows: tuple[int, ...],
    ids: list[tuple[int, ...]],
    prompt_lengths: list[int],
    weights: list[float],
) -> Pack:
    tree = token_tree(ids)
    predictions: defaultdict[tuple[int, int], float] = defaultdict(float)
    for row_ids, path, prompt_length, weight in zip(
        ids, tree.paths, prompt_lengths, weights, strict=True
    ):
        # The token at t is predicted from t - 1; the first of a row is predicted from nothing.
        first = max(prompt_length, 1)
        for prediction in zip(path[first - 1 :], row_ids[first:], strict=True):
            predictions[prediction] += weight
    return Pack(
        rows,
        torch.tensor(tree.token_ids, dtype=torch.int64),
        torch.tensor(tree.depths, dtype=torch.int64),
        torch.tensor(tree.segment_offsets, dtype=torch.int64),
        torch.tensor(tree.parents, dtype=torch.int64),
        torch.tensor([position for position, _ in predictions], dtype=torch.int64),
        torch.tensor([target for _, target in predictions], dtype=torch.int64),
        torch.tensor(list(predictions.values()), dtype=torch.float32),
        sum(map(len, ids)),
        len(tree.token_ids),
    )


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A path of the tree from its root to an end, and the rows that need no token beside it."""

    members: tuple[int, ...]
    length: int
    shared: int
    """Leading tokens in common with the leaf before; leaves stand in lexicographic order."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """Leaves by pack, and the computed tokens of each pack."""

    groups: list[list[int]]
    tokens: list[int]

    def cost(self) -> tuple[int, int]:
        """Fewer packs first: each reads all weights once more. Then fewer tokens."""
        return len(self.groups), sum(self.tokens)


def _cut(ids: list[tuple[int, ...]], budget: int) -> list[list[int]]:
    """Indices into `ids` by pack, largest pack first; every row has two tokens or more."""
    leaves = _leaves(ids)
    if len(leaves) == 1 or sum(leaf.length - leaf.shared for leaf in leaves) <= budget:
        return [list(range(len(ids)))]
    # Neighbours have most in common, but rows that share little pack tighter by their lengths.
    # Neither is always better, and both are quick.
    apart = _Cut([[at] for at in range(len(leaves))], [leaf.length for leaf in leaves])
    runs = _cut_between_neighbours(leaves, budget)
    cut = min((_best_fit(leaves, parts, budget) for parts in (runs, apart)), key=_Cut.cost)
    by_size = sorted(range(len(cut.groups)), key=lambda at: (-cut.tokens[at], cut.groups[at]))
    return [
        sorted(member for leaf in cut.groups[at] for member in leaves[leaf].members)
        for at in by_size
    ]


def _leaves(ids: list[tuple[int, ...]]) -> list[_Leaf]:
    order, shared = sorted_prefixes(ids)
    leaves: list[_Leaf] = []
    members: list[int] = []
    lowest = 0
    for at, index in enumerate(order):
        members.append(index)
        lowest = min(lowest, shared[at])
        length = len(ids[index]) - 1
        if at + 1 == len(order) or shared[at + 1] < length:
            leaves.append(_Leaf(tuple(members), length, lowest))
            members, lowest = [], length
    return leaves


def _cut_between_neighbours(leaves: list[_Leaf], budget: int) -> _Cut:
    """The cheapest of all cuts into runs of neighbouring leaves, by dynamic programming.

    A leaf over the budget stands alone and does not part its neighbours.
    """
    fitting, alone, lowest = [], [], 0
    for number, leaf in enumerate(leaves):
        lowest = min(lowest, leaf.shared)
        if leaf.length > budget:
            alone.append(number)
        else:
            fitting.append((number, leaf.length, lowest))
            lowest = leaf.length
    best = [(0, 0, 0)]  # for the leaves so far: packs, their tokens, start of the last pack
    for end in range(len(fitting)):
        tokens, choices = 0, []
        for start in range(end, -1, -1):
            _, length, _ = fitting[start]
            tokens += length - (fitting[start + 1][2] if start < end else 0)
            if tokens > budget:
                break
            packs, before, _ = best[start]
            choices.append((packs + 1, before + tokens, start))
        best.append(min(choices))
    cut = _Cut([[number] for number in alone], [leaves[number].length for number in alone])
    end = len(fitting)
    while end:
        _, tokens, start = best[end]
        cut.groups.append([number for number, _, _ in fitting[start:end]])
        cut.tokens.append(tokens - best[start][1])
        end = start
    return cut


def _best_fit(leaves: list[_Leaf], parts: _Cut, budget: int) -> _Cut:
    """Join `parts`, runs of neighbouring leaves, into fewer packs.

    Largest part first, each to the pack where it adds fewest tokens, then leaves least room. No two
    packs of the result fit into one: the later of them was begun where the earlier had no room.
    """
    joined = _Cut([], [])
    pack_of: list[int | None] = [None] * len(leaves)
    # What all leaves share, every pack has: a forest of one root need not be walked to its ends.
    floor = min(leaf.shared for leaf in leaves[1:])
    for part in sorted(range(len(parts.groups)), key=lambda at: -parts.tokens[at]):
        run, tokens = parts.groups[part], parts.tokens[part]
        saved = _shared_with_packs(leaves, pack_of, run, floor)
        fits = [
            (tokens - saved.get(pack, floor), -before, pack)
            for pack, before in enumerate(joined.tokens)
            if before + tokens - saved.get(pack, floor) <= budget
        ]
        if fits:
            added, _, pack = min(fits)
            joined.tokens[pack] += added
            joined.groups[pack] += run
        else:
            pack = len(joined.groups)
            joined.tokens.append(tokens)
            joined.groups.append(list(run))
        for leaf in run:
            pack_of[leaf] = pack
    return joined


def _shared_with_packs(
    leaves: list[_Leaf], pack_of: list[int | None], run: list[int], floor: int
) -> dict[int, int]:
    """Tokens that a run of leaves and a pack have in common, for packs with more than `floor`.

    That is what the run's ends share with the pack's nearest leaves before and behind, less what
    these two share with each other, which the pack has once already.
    """
    before = _shared_on_side(leaves, pack_of, run[0], -1, floor)
    behind = _shared_on_side(leaves, pack_of, run[-1], 1, floor)
    if not before or not behind:
        return before or behind
    through = min(
        (leaves[at].shared for at in range(run[0] + 1, run[-1] + 1)), default=leaves[run[0]].length
    )
    return {
        pack: left + right - min(left, right, through)
        for pack in before | behind
        for left, right in [(before.get(pack, floor), behind.get(pack, floor))]
    }


def _shared_on_side(
    leaves: list[_Leaf], pack_of: list[int | None], at: int, step: int, floor: int
) -> dict[int, int]:
    """Leading tokens, if more than `floor`, that a leaf shares with packs in one direction.

    The nearest leaf of a pack shares most.
    """
    shared: dict[int, int] = {}
    common = leaves[at].length
    while 0 <= at + step < len(leaves):
        common = min(common, leaves[max(at, at + step)].shared)
        if common <= floor:
            break
        at += step
        pack = pack_of[at]
        if pack is not None:
            shared.setdefault(pack, common)
    return shared
