"""Tiny models for the tests of `lora`, built in memory."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture
def make_model() -> MakeModel:
    """The same model every time it is called: two layers, grouped heads, untied head."""

    def make(
        dtype: torch.dtype = torch.float32, *, tied: bool = False, attention_bias: bool = False
    ) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            attention_bias=attention_bias,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return LlamaForCausalLM(config).to(dtype).eval()

    return make
