"""Packed forwards that end in some positions, against whole ones."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM
from myna.models.last_layer import shorten_last_layer
from myna.models.packed import packed_attention
from myna.ops.attention import tree_layout

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
PREDICTING = torch.tensor([10, 2, 5])
IDS = torch.arange(4, 16)[None]


def tiny(family: str, **more: Any) -> Any:
    torch.manual_seed(4)
    if family == "BlueLM":
        return BlueLMForCausalLM(BlueLMConfig(**SHAPE, use_stable_embedding=True))
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **more})
    return getattr(transformers, f"{family}ForCausalLM")(config)


def hidden(model: Any, **more: Tensor) -> Tensor:
    layout = tree_layout(torch.tensor([0, 5, 9, 12]), torch.tensor([-1, 0, 0]), device="cpu")
    with packed_attention(model):
        state: Tensor = model.get_decoder()(
            input_ids=IDS,
            position_ids=layout.depth[None],
            use_cache=False,
            tree=layout,
            **more,
        ).last_hidden_state
    return state


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "BlueLM"])
def test_hidden_states_and_gradients_at_the_positions_are_those_of_the_whole_layer(
    family: str,
) -> None:
    model = tiny(family).double()
    whole = copy.deepcopy(model)
    assert shorten_last_layer(model) and shorten_last_layer(model)
    expected = hidden(whole)[:, PREDICTING]
    got = hidden(model, predicting=PREDICTING)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden(model), hidden(whole))  # without the keyword: as before
    draw = torch.randn(expected.shape, dtype=torch.float64)
    for state, of in ((expected, whole), (got, model)):
        (state * draw).sum().backward()
        assert all(p.grad is not None for p in of.model.layers.parameters())
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_recomputed_activations_give_the_same() -> None:
    model = tiny("Llama").double().train()
    assert shorten_last_layer(model)
    wanted = torch.autograd.grad(
        hidden(model, predicting=PREDICTING).square().sum(),
        model.model.layers[0].mlp.up_proj.weight,
    )[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with packed_attention(model):  # the backward belongs inside: it computes forwards again
        loss = hidden(model, predicting=PREDICTING).square().sum()
        found = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Gemma2", {"head_dim": 8}),  # two norms more
        ("Granite", {"residual_multiplier": 0.2}),  # the same parts, put together otherwise
        ("GPTNeoX", {}),
    ],
)
def test_layers_that_are_built_otherwise_stay_as_they_are(family: str, more: Any) -> None:
    model = tiny(family, **more)
    before = [type(module) for module in model.modules()]
    assert not shorten_last_layer(model)
    assert [type(module) for module in model.modules()] == before


def test_dropout_on_the_residual_is_not_skipped() -> None:
    model = tiny("Phi3", resid_pdrop=0.5)
    assert any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    assert not shorten_last_layer(model)
