"""Token trees: rows with common beginnings as one trie, every distinct prefix held once.

Owns which tokens of a set of rows are computed and where each of them lies: the trie laid out
flat, in segments (its edges, runs of tokens without a branch), of any depth. The token that ends a
row predicts nothing in that row and is left out, unless another row goes on through it. Knows
nothing of labels, budgets or tensors: those are `packing.py`'s.

A node per token would be slow in Python. Sorted lexicographically, a row shares most with the row
before it, so the length of that common prefix is all there is to know: what comes after it is
appended, and the trie in pre-order is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import ne


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A forest of token ids laid out flat: T computed tokens in S segments, parents first."""

    token_ids: list[int]
    """(T,) segments one after the other, in pre-order."""
    depths: list[int]
    """(T,) tokens before this one in its row: the position id."""
    segment_offsets: list[int]
    """(S + 1,) segment s is the tokens from offset s to offset s + 1; none is empty."""
    parents: list[int]
    """(S,) the segment that a segment goes on from, always an earlier one; -1 for a root."""
    paths: list[list[int]]
    """For every row, in the order they were given: where its tokens lie, all but its last."""


def sorted_prefixes(rows: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """The rows' lexicographic order, and how many tokens each has in common with earlier ones.

    The second list stands in that order too: `shared[i]` leading tokens of row `order[i]` are
    computed for a row before it, and the rest of it, less its last token, is new.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared: list[int] = []
    previous: tuple[int, ...] = ()
    for index in order:
        row = rows[index]
        # Only computed tokens of the row before count, hence not its last. The same bound for this
        # row holds by itself: it ends no earlier, and where both are equal they end together.
        longest = max(len(previous) - 1, 0)
        shared.append(next(compress(count(), map(ne, previous[:longest], row)), longest))
        previous = row
    return order, shared


def count_tokens(rows: Sequence[tuple[int, ...]]) -> int:
    """T of the tree of these rows, without building it."""
    order, shared = sorted_prefixes(rows)
    return sum(max(len(rows[index]) - 1, 0) for index in order) - sum(shared)


def token_tree(rows: Sequence[tuple[int, ...]]) -> TokenTree:
    """The tree of `rows` of token ids.

    A segment ends where rows part, not where one of them ends. The same rows in another order give
    the same tree. A row of one token has an empty path.
    """
    order, shared = sorted_prefixes(rows)
    token_ids: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = [[]] * len(rows)
    came_from: dict[int, int] = {}  # first token of a segment -> the token before it, or -1
    path: list[int] = []
    for index, num_shared in zip(order, shared, strict=True):
        row, start = rows[index], len(token_ids)
        end = len(row) - 1
        if num_shared < end:
            branch = path[num_shared - 1] if num_shared else -1
            if branch != start - 1 or branch < 0:
                came_from[start] = branch
                if branch >= 0:  # what follows the branch becomes a segment, if it is none yet
                    came_from.setdefault(branch + 1, branch)
            token_ids += row[num_shared:end]
            depths += range(num_shared, end)
        path = path[:num_shared] + list(range(start, len(token_ids)))
        paths[index] = path
    starts = sorted(came_from)
    segment_at = {start: number for number, start in enumerate(starts)}
    # A parent ends at the token its child came from, so the segment after it starts just behind.
    parents = [
        segment_at[came_from[start] + 1] - 1 if came_from[start] >= 0 else -1 for start in starts
    ]
    return TokenTree(token_ids, depths, [*starts, len(token_ids)], parents, paths)
