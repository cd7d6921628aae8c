"""Packed logits against those of transformers, row by row, on tiny random models."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from myna.models import packed
from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM
from myna.models.packed import (
    CannotPackError,
    check_packing,
    longrope_boundary,
    packed_attention,
)
from myna.ops.attention import TreeLayout, tree_layout

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
GROUPED = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": GROUPED,
    "Mistral": {"sliding_window": 6},
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 2.0},
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"sliding_window": 6},
    "Glm4": GROUPED,
    "BlueLM": {"use_stable_embedding": True, "num_key_value_heads": 4},
}

# Lengths and parents: flat rows, a shared prefix, three levels. Rows of up to 40 tokens.
FLAT = (9, 40, 1, 23), (-1, -1, -1, -1)
SHARED = (12, 5, 28, 1, 17), (-1, 0, 0, 0, 0)
THREE_LEVELS = (8, 7, 25, 4, 1, 6, 3), (-1, 0, 1, 1, 0, -1, 5)
TREES = [FLAT, SHARED, THREE_LEVELS]


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A model of `family` with weights so large that attention is far from uniform."""
    shape = {**SHAPE, **FAMILIES.get(family, {}), **changes}
    torch.manual_seed(1)
    if family == "BlueLM":
        model: Any = BlueLMForCausalLM(BlueLMConfig(**shape))
    else:
        name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, name)(**shape, attn_implementation="eager")
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def layout_of(tree: tuple[Sequence[int], Sequence[int]]) -> TreeLayout:
    offsets = torch.tensor([0, *tree[0]]).cumsum(0)
    return tree_layout(offsets, torch.tensor(tree[1]), device="cpu")


def rows_of(tree: tuple[Sequence[int], Sequence[int]]) -> list[Tensor]:
    """The tokens of every path from a root to a segment."""
    lengths, parents = tree
    paths: list[list[int]] = []
    for segment, parent in enumerate(parents):
        start = sum(lengths[:segment])
        own = list(range(start, start + lengths[segment]))
        paths.append([*(paths[parent] if parent >= 0 else []), *own])
    return [torch.tensor(path) for path in paths]


def pack(model: nn.Module, input_ids: Tensor, layout: TreeLayout) -> Tensor:
    with packed_attention(model):
        output = model(
            input_ids=input_ids[None],
            position_ids=layout.depth[None],
            use_cache=False,
            tree=layout,
        )
    return output.logits[0]


def ids_of(tree: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    return torch.randint(3, 50, (sum(tree[0]),), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_the_rows(family: str) -> None:
    model = tiny(family)
    for tree in TREES:
        input_ids = ids_of(tree)
        with torch.no_grad():
            logits = pack(model, input_ids, layout_of(tree))
            for row in rows_of(tree):
                own = model(input_ids=input_ids[None, row], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check(family: str) -> None:
    model = tiny(family)
    before = torch.random.get_rng_state()
    assert check_packing(model) is None
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training and model.config._attn_implementation == (
        "sdpa" if family == "BlueLM" else "eager"
    )


def test_gradients_of_a_pack_are_those_of_its_rows() -> None:
    model = tiny("Gemma2")
    input_ids = ids_of(THREE_LEVELS)
    rows = rows_of(THREE_LEVELS)
    weight = torch.randn(len(input_ids), 50, generator=torch.Generator().manual_seed(4))

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    # A token in several rows is supervised in each of them.
    logits = pack(model, input_ids, layout_of(THREE_LEVELS))
    ours = gradients(torch.stack([(logits[row] * weight[row]).sum() for row in rows]).sum())
    model.double()
    losses = [
        (model(input_ids=input_ids[None, row], use_cache=False).logits[0] * weight[row]).sum()
        for row in rows
    ]
    for a, b in zip(ours, gradients(torch.stack(losses).sum()), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = get_peft_model(tiny("Llama"), LoraConfig(r=2, target_modules="all-linear")).train()
    layout = layout_of(SHARED)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with packed_attention(model):
            pack(model, ids_of(SHARED), layout).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, gradients(), before))


def test_the_check_looks_beyond_long_windows() -> None:
    assert check_packing(tiny("Mistral", sliding_window=4096)) is None


def test_a_window_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = packed.tree_attention

    def wrong(*given: Any, window: int | None, **options: Any) -> Tensor:
        return exact(*given, window=window and window + 1, **options)

    monkeypatch.setattr(packed, "tree_attention", wrong)
    assert check_packing(tiny("Llama")) is None
    for family in ("Mistral", "Gemma3"):
        reason = check_packing(tiny(family, sliding_window=4096))
        assert reason is not None
        assert reason.startswith("packed logits differ from its own by 0.")


def test_adapters_are_checked_with_their_base() -> None:
    model = get_peft_model(tiny("Llama"), LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    assert check_packing(model) is None
    assert all(module.training for module in model.modules())


def test_half_precision() -> None:
    assert check_packing(tiny("Qwen3").bfloat16()) is None


def cannot(family: str, **changes: Any) -> str | None:
    return check_packing(tiny(family, **changes))


def test_what_cannot_be_packed_gives_its_reason() -> None:
    llama4 = transformers.Llama4TextConfig(
        **SHAPE,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=8,
        attn_implementation="eager",
    )
    chunked = transformers.Llama4ForCausalLM(llama4)
    assert check_packing(chunked) == "layers of type chunked_attention"
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert check_packing(mamba) == "state-space layers, which carry a state from token to token"
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert cannot("Llama", rope_parameters=dynamic) == (
        "dynamic rotary scaling, which depends on the longest row of a forward"
    )
    assert cannot("Llama", attention_dropout=0.1) == "attention dropout 0.1"


def test_an_unknown_keyword_of_the_attention_is_a_reason() -> None:
    config = transformers.GptOssConfig(
        **SHAPE,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=6,
        attn_implementation="eager",
    )
    assert check_packing(transformers.GptOssForCausalLM(config)) == "attention keyword 's_aux'"


def test_hybrid_models_and_attention_outside_the_interface_give_a_reason() -> None:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    hybrid = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**SHAPE, **mamba))
    assert check_packing(hybrid) == "state-space layers, which carry a state from token to token"
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    reason = check_packing(transformers.BloomForCausalLM(bloom))
    assert reason is not None
    assert reason.startswith("packed logits differ from its own by ")


def test_a_model_that_drops_the_tree_gives_a_reason() -> None:
    config = transformers.StableLmConfig(**SHAPE)
    assert check_packing(transformers.StableLmForCausalLM(config)) == (
        "a packed forward fails: the attention of packs was called without a tree (a padded batch "
        "or a generation inside packed_attention, or a model that drops the keyword)"
    )


def test_the_block_leaves_the_model_and_its_twins_as_they_were() -> None:
    model = tiny("Mistral")
    twin = transformers.MistralForCausalLM(model.config)
    assert twin.config is model.config
    ids = ids_of(FLAT)[None]
    before = copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        expected, twin_expected = model(ids).logits, twin(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        with packed_attention(model):
            assert torch.equal(twin(ids).logits, twin_expected)
            with pytest.raises(RuntimeError, match="called without a tree"):
                model(ids, use_cache=False)
        pack(model, ids[0], layout_of(FLAT))
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert twin.config is model.config and before == model.config.to_dict()


def test_left_padded_generation_equals_single_rows_after_packs() -> None:
    model = tiny("Gemma3")
    pack(model, ids_of(SHARED), layout_of(SHARED))
    long, short = ids_of(FLAT)[:20], ids_of(FLAT)[20:31]
    batch = torch.stack([long, torch.cat([torch.zeros(9, dtype=torch.int64), short])])
    mask = (torch.arange(20) >= torch.tensor([[0], [9]])).long()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    for line, row in zip(together, (long, short), strict=True):
        assert torch.equal(line[20:], model.generate(row[None], **options)[0, len(row) :])


def test_transformers_builds_no_mask_and_finds_no_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Position ids of a tree look like many sequences to transformers; under sdpa it masks them."""
    assert packed.NAME not in transformers.AttentionMaskInterface._global_mapping
    found: list[Tensor] = []
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", found.append)
    model = tiny("Gemma3")
    with torch.no_grad():
        pack(model, ids_of(SHARED), layout_of(SHARED))
    assert not found
    model(ids_of(SHARED)[None], position_ids=layout_of(SHARED).depth[None], use_cache=False)
    assert found


def test_a_mask_in_a_pack_is_refused() -> None:
    layout = layout_of(FLAT)
    with packed_attention(model := tiny("Llama")), pytest.raises(CannotPackError, match="mask"):
        model(
            input_ids=ids_of(FLAT)[None],
            attention_mask=torch.zeros(1, 1, layout.num_tokens, layout.num_tokens),
            position_ids=layout.depth[None],
            use_cache=False,
            tree=layout,
        )


def test_longrope_changes_at_its_original_length() -> None:
    assert longrope_boundary(tiny("Llama")) is None
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    model = tiny(
        "Phi3",
        rope_parameters=scaling,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    assert longrope_boundary(model) == 64
    assert check_packing(model) is None
