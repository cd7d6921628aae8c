"""Attention of continuous batching on a CPU: each request over its own keys and values.

transformers' engine lays the requests of a step behind one another, multiplies all their queries
with all their keys, repeated for grouped heads, and masks what is another request's: work that
grows with the square of the number of requests. Its flash kernels do not, but a CPU has none. Owns
the products alone: cache, pages and masks are the engine's.
"""

# mypy: untyped-calls-exclude="transformers"

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache

_NAME = "sdpa"
_LEFT_TO_THEIRS = ("position_bias", "softcap")


def attend_by_request() -> None:
    """Have the attention of that name look at each request alone, where it gets a paged cache.

    For the whole process, as transformers' register of attentions is; whatever is computed without
    such a cache is computed as before.
    """
    theirs = AttentionInterface()[_NAME]
    if not isinstance(theirs, _ByRequest):
        AttentionInterface.register(_NAME, _ByRequest(theirs))


class _ByRequest:
    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Query (1, H, Q, D) of all requests; their new keys and values (1, G, Q, D)."""
        cache = others.get("cache")
        if (
            not isinstance(cache, PagedAttentionCache)
            or attention_mask is None
            or query.device.type != "cpu"
            or any(others.get(name) is not None for name in _LEFT_TO_THEIRS)
        ):
            result: tuple[Tensor, None] = self._theirs(
                module, query, key, value, attention_mask, **others
            )
            return result
        del others["cache"]
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=others
        )
        answer = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        queries = pairwise(others["cu_seq_lens_q"].tolist())
        keys = pairwise(others["cu_seq_lens_k"].tolist())
        for (first, last), (first_key, last_key) in zip(queries, keys, strict=True):
            if first == last:
                continue
            found = _attend(
                query[:, :, first:last],
                key[:, :, first_key:last_key],
                value[:, :, first_key:last_key],
                attention_mask[:, :, first:last, first_key:last_key],
                others.get("scaling"),
            )
            answer[:, first:last] = found.transpose(1, 2)
        return answer, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """One request: query (1, H, q, D), keys and values (1, G, k, D), mask (1, 1, q, k)."""
    heads, tokens, groups = query.shape[1], query.shape[2], key.shape[1]
    if heads > groups and tokens == 1:
        # The heads of a group as if they were tokens, so that nothing is repeated.
        query = query.reshape(1, groups, heads // groups, query.shape[3])
    elif heads > groups:
        key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(1, heads, tokens, value.shape[3])
