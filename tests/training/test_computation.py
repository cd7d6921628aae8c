"""How steps are computed: found out by comparing with the model's own loss, on several families."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from myna.data.conversation import Place
from myna.data.store import Example
from myna.lora.fused import fuse
from myna.models.frozen import fuse_frozen
from myna.training.computation import (
    Packed,
    Padded,
    PiecesAhead,
    choose_computation,
    compile_layers,
    layers_to_recompute,
    recompute_activations,
)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def rows() -> list[Example]:
    place = Place(Path("rows"), 1, 1)
    shared = tuple(range(10, 22))
    return [
        Example("", "", (1, *shared), (30, 31, 2), place, 1),
        Example("", "", (1, *shared, 33), (34, 2), place, 1),
        Example("", "", (1, *shared), (30, 31, 2), place, 1),
        Example("", "", (1, 40), (2,), place, 1),
    ]


def tiny(name: str, **more: object) -> peft.PeftModel:
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**(SHAPE | more))
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.mark.parametrize(
    ("name", "more", "fused_head"),
    [
        ("Llama", {}, True),
        ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}, True),
        ("Mistral", {"sliding_window": 6}, True),
        ("Gemma2", {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0}, True),
        ("Granite", {"logits_scaling": 7.0}, False),
        ("Cohere", {"logit_scale": 0.1}, False),
    ],
)
def test_loss_and_gradients_are_those_of_padded_rows(
    name: str, more: dict[str, object], fused_head: bool
) -> None:
    model = tiny(name, **more)
    padded = Padded(2, 0, CPU)
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=2, pad_id=0, device=CPU
    )
    assert isinstance(computation, Packed) and computation.fused_head is fused_head, how
    for way in (padded, computation):
        model.zero_grad()
        with way.prepared(model):
            loss = torch.stack(
                [way.summed_loss(model, piece) for piece in way.pieces(rows(), [0, 1, 2, 3])]
            ).sum()
            loss.backward()
        found.append(
            (
                loss.item(),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
        fuse(model)  # the second way is computed by the fused layers
        fuse_frozen(model)
    (expected, gradients), (got, packed) = found
    assert got == pytest.approx(expected, rel=1e-5)
    assert packed.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        error = (packed[parameter] - gradient).norm() / gradient.norm()
        assert error < 1e-4, parameter


def test_packs_keep_to_the_rows_at_once_and_to_their_side_of_the_boundary() -> None:
    """Lengths of the rows are 16, 16, 16 and 3."""
    examples = [*rows(), *rows()[:1]]
    computation = Packed(CPU, micro_batch_size=2, length_boundary=10)
    pieces = computation.pieces(examples, [4, 3, 2, 1, 0])
    assert sorted(row for piece in pieces for row in piece.rows) == [0, 1, 2, 3, 4]
    assert sorted(len(piece.rows) for piece in pieces) == [1, 2, 2]
    assert [piece.rows for piece in pieces if 3 in piece.rows] == [(3,)]


def test_a_model_that_cannot_be_packed_trains_on_padded_batches_and_says_why() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)
    model = get_peft_model(
        transformers.MambaForCausalLM(config), LoraConfig(r=2, target_modules=["in_proj"])
    )
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=3, pad_id=0, device=CPU
    )
    assert computation == Padded(3, 0, CPU, limit_is_set=False)
    assert how.startswith("padded batches, because this model cannot be packed: state-space layers")


def gradients(model: nn.Module, computation: Packed, examples: list[Example]) -> dict[str, Tensor]:
    model.zero_grad()
    with computation.prepared(model):
        torch.manual_seed(11)
        for piece in computation.pieces(examples, range(len(examples))):
            computation.summed_loss(model, piece).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
def test_layers_that_recompute_have_the_same_gradients_dropout_included(fused: bool) -> None:
    model = tiny("Llama").train()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"] = nn.Dropout(0.1)
    if fused:
        assert fuse(model) == 14
    expected = gradients(model, Packed(CPU, fused_head=True), rows())
    assert len(layers_to_recompute(model)) == 2
    for number in (1, 2, 1, 0):  # also on the way back, as a re-plan in mid-run
        recompute_activations(model, number)
        found = gradients(model, Packed(CPU, fused_head=True), rows())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_cut_into_one_two_and_five_packs_has_the_same_gradient() -> None:
    draw = torch.Generator().manual_seed(2)
    place = Place(Path("rows"), 1, 1)
    examples = []
    for _ in range(10):
        ids = torch.randint(4, 64, (20,), generator=draw).tolist()
        examples.append(Example("", "", (1, 5, 6, *ids[:8]), tuple(ids[8:]), place, 1))
    model = tiny("Llama")
    whole = gradients(model, Packed(CPU, fused_head=True), examples)
    for budget, packs in ((10_000, 1), (100, 2), (45, 5)):
        computation = Packed(CPU, fused_head=True, token_budget=budget)
        pieces = computation.pieces(examples, range(10))
        assert len(pieces) == packs
        assert all(piece.computed_tokens <= budget for piece in pieces)
        for name, found in gradients(model, computation, examples).items():
            assert (found - whole[name]).norm() <= 2e-6 * whole[name].norm(), name


def test_pieces_made_ahead_are_those_that_are_asked_for() -> None:
    examples = rows()
    large, small = Packed(CPU), Packed(CPU, token_budget=17)
    with PiecesAhead(examples) as ahead:
        ahead.begin(large, [0, 1])
        assert [piece.rows for piece in ahead.take(large, [0, 1])] == [(0, 1)]
        assert [piece.rows for piece in ahead.take(large, [3])] == [(3,)]  # nothing was begun
        ahead.begin(large, [0, 1, 3])  # then a smaller plan is made
        assert sorted(piece.rows for piece in ahead.take(small, [0, 1, 3])) == [(0, 1), (3,)]
        ahead.begin(large, [99])
        with pytest.raises(IndexError):
            ahead.take(large, [99])


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_filled_packs_have_the_same_gradients(name: str) -> None:
    model = tiny(name, **({} if name == "Llama" else {"head_dim": 8, "sliding_window": 6}))
    fuse(model)
    plain = Packed(CPU, fused_head=True)
    wanted = gradients(model, plain, rows())
    (pack,) = replace(plain, multiple=32).pieces(rows(), [0, 1, 2, 3])
    assert pack.computed_tokens == 32 != plain.pieces(rows(), [0, 1, 2, 3])[0].computed_tokens
    found = gradients(model, replace(plain, multiple=32), rows())
    for parameter, gradient in wanted.items():
        assert (found[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@pytest.mark.full
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
# torch keeps what it compiled as pickles: as if it were for the first time.
@torch._inductor.config.patch(force_disable_caches=True)
def test_compiled_layers_have_the_same_gradients(dropout: float, multiple: int) -> None:
    model = tiny("Llama").train()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"] = nn.Dropout(dropout)
    fuse(model)
    fuse_frozen(model)
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=2, pad_id=0, device=CPU, multiple=multiple
    )
    assert isinstance(computation, Packed) and computation.short_last_layer, how
    examples = rows()
    wanted = [gradients(model, computation, examples[:number]) for number in (4, 2)]
    assert compile_layers(model, fixed_sizes=multiple > 1) == 2
    for expected, number in zip(wanted, (4, 2), strict=True):
        found = gradients(model, computation, examples[:number])
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
