"""Attention by request against transformers' own, over all requests at once."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.utils import build_attention_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from myna.inference.server.by_request import attend_by_request

HEADS, WIDTH = 4, 8


class Filled(PagedAttentionCache):
    """Has read the keys and values of all requests."""

    def __init__(self, keys: Tensor, values: Tensor, bounds: Tensor) -> None:
        self.found = keys, values
        self.bounds = bounds

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        kwargs["cu_seq_lens_k"] = self.bounds
        return self.found


@pytest.mark.parametrize("window", [1, 6], ids=["whole", "window"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 9), (1, 1), (1, 30), (1, 4)],  # all at their next token
        [(7, 7), (3, 3), (12, 12)],  # all at their beginning
        [(5, 5), (1, 17), (4, 21), (1, 2), (9, 9)],  # parts of prompts between them
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_each_request_sees_what_it_would_see_among_all(
    lengths: list[tuple[int, int]], groups: int, window: int
) -> None:
    """`lengths`: new tokens and all tokens of each request. A window of 1 is none."""
    torch.manual_seed(5)
    new = [0, *accumulate(tokens for tokens, _ in lengths)]
    all_ = [0, *accumulate(tokens for _, tokens in lengths)]
    query = torch.randn(1, HEADS, new[-1], WIDTH)
    keys, values = torch.randn(2, 1, groups, all_[-1], WIDTH)
    mask = torch.full((1, 1, new[-1], all_[-1]), torch.finfo(torch.float32).min)
    build_attention_mask(mask, new, all_, window)

    module = nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, HEADS // groups
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=0.3)

    attend_by_request()
    attend_by_request()  # which changes nothing
    attend = AttentionInterface()["sdpa"]
    assert attend is not sdpa_attention_forward and attend._theirs is sdpa_attention_forward
    cache = Filled(keys, values, torch.tensor(all_))
    new_keys = torch.zeros(1, groups, new[-1], WIDTH)  # which the cache has taken
    found, _ = attend(
        module, query, new_keys, new_keys, mask,
        scaling=0.3, dropout=0.0, cache=cache, cu_seq_lens_q=torch.tensor(new),
        is_causal=False,
    )  # fmt: skip
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_such_a_cache_nothing_is_another() -> None:
    attend_by_request()
    module = nn.Module()
    query, keys, values = torch.randn(3, 2, HEADS, 5, WIDTH)
    found, _ = AttentionInterface()["sdpa"](module, query, keys, values, None)
    expected, _ = sdpa_attention_forward(module, query, keys, values, None)
    assert torch.equal(found, expected)
