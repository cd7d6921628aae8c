"""Weights of answers: the loss and its gradient against a sum made by hand, row by row."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from myna.data.conversation import Place
from myna.data.loader import loss_weight, num_targets, padded_batches
from myna.data.packing import pack_step
from myna.data.store import Example
from myna.training.computation import Computation, Packed, Padded
from myna.training.events import EventLog, read_events
from myna.training.fit import FitSettings, fit
from myna.training.validate import held_out_sums

CPU = torch.device("cpu")
PLACE = Place(Path("rows.jsonl"), 1, 1)
SHARED = (1, *range(10, 22))


def row(prompt: Sequence[int], completion: Sequence[int], weight: float) -> Example:
    return Example("", "", tuple(prompt), tuple(completion), PLACE, 1, weight=weight)


ROWS = [
    row(SHARED, (30, 31, 2), 0.25),
    row((*SHARED, 33), (34, 2), 3.0),  # goes on from a prefix of the first
    row(SHARED, (30, 31, 2), 2.0),  # the first again, with another weight
    row((1, 40), (2,), 1.0),
    row((), (5, 6, 2), 0.5),  # a plain text without start token: 5 is predicted from nothing
]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).eval()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_hand(model: PeftModel, rows: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
    """Sum of w * -log p over the trained tokens, over the sum of w; each row alone, in float64."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for example in rows:
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        log_p = exact(input_ids=ids).logits[0].log_softmax(-1)
        for at in range(max(1, len(example.prompt_ids)), ids.shape[1]):
            total = total - example.weight * log_p[at - 1, ids[0, at]]
            weights += example.weight
    loss = total / weights
    loss.backward()
    return loss.item(), gradients(exact)


def computed(
    model: PeftModel, computation: Computation, rows: Sequence[Example]
) -> tuple[float, dict[str, Tensor], int]:
    """(loss, gradients, number of pieces) as the training step makes them."""
    model.zero_grad()
    weight = sum(loss_weight(example) for example in rows)
    total, pieces = 0.0, computation.pieces(rows, range(len(rows)))
    with computation.prepared(model):
        for piece in pieces:
            loss = computation.summed_loss(model, piece) / weight
            loss.backward()
            total += loss.item()
    return total, gradients(model), len(pieces)


WAYS: list[tuple[Computation, int]] = [
    (Padded(8, 0, CPU), 1),
    (Padded(2, 0, CPU), 3),
    (Packed(CPU), 1),
    (Packed(CPU, fused_head=True), 1),
    (Packed(CPU, fused_head=True, token_budget=17), 2),
    (Packed(CPU, token_budget=15), 3),
    (Packed(CPU, fused_head=True, token_budget=15), 3),
]


@pytest.mark.parametrize(("way", "pieces"), WAYS)
def test_loss_and_gradient_are_those_made_by_hand(
    model: PeftModel, way: Computation, pieces: int
) -> None:
    wanted_loss, wanted = by_hand(model, ROWS)
    loss, found, number = computed(model, way, ROWS)
    assert number == pieces
    assert loss == pytest.approx(wanted_loss, rel=1e-5)  # the model is computed in float32
    assert found.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        assert (found[name].double() - gradient).norm() <= 1e-5 * gradient.norm(), name
    unweighted = [Example("", "", r.prompt_ids, r.completion_ids, PLACE, 1) for r in ROWS]
    assert abs(by_hand(model, unweighted)[0] - wanted_loss) > 1e-2 * wanted_loss


def test_a_weight_of_two_is_the_row_named_twice(model: PeftModel) -> None:
    one = [row(SHARED, (30, 31, 2), 2.0), ROWS[3]]
    two = [row(SHARED, (30, 31, 2), 1.0), ROWS[3]]
    way = Packed(CPU, fused_head=True)
    once, found, _ = computed(model, way, one)
    twice, wanted, _ = computed(model, way, [two[0], *two])
    assert once == pytest.approx(twice, rel=1e-6)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


def test_weights_of_positions_counted_by_hand() -> None:
    (pack,) = pack_step(ROWS[:3], [0, 1, 2], token_budget=None)
    found = {
        (position, target): weight
        for position, target, weight in zip(
            pack.positions.tolist(), pack.targets.tolist(), pack.weights.tolist(), strict=True
        )
    }
    # 13 tokens are shared; 30 31 stand behind them at 13 and 14, then 33 34 at 15 and 16.
    assert found == {(12, 30): 2.25, (13, 31): 2.25, (14, 2): 2.25, (15, 34): 3.0, (16, 2): 3.0}
    (batch,) = padded_batches(ROWS, [0, 4], micro_batch_size=2, pad_id=0)
    assert batch.weights.tolist() == [0.25, 0.25, 0.25, 0.5, 0.5]
    assert batch.weights.dtype == torch.float32
    assert [loss_weight(example) for example in ROWS] == [0.75, 6.0, 6.0, 1.0, 1.0]


WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 1.75, 4.0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            row,
            st.lists(st.integers(0, 2), max_size=5),
            st.lists(st.integers(0, 2), min_size=1, max_size=4),
            WEIGHTS,
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 30),
)
def test_no_weight_is_lost_however_a_step_is_cut(rows: list[Example], budget: int) -> None:
    """Weights are sums of quarters, so that float32 adds them exactly."""
    numbers = list(range(len(rows)))
    total = sum(r.weight * num_targets(r) for r in rows)
    packs = pack_step(rows, numbers, token_budget=budget)
    assert sum(pack.weights.sum().item() for pack in packs) == total
    batches = padded_batches(rows, numbers, micro_batch_size=3, pad_id=0)
    assert sum(batch.weights.sum().item() for batch in batches) == total


@pytest.mark.parametrize("way", [WAYS[1][0], WAYS[4][0]])
def test_a_run_reports_the_weighted_loss_and_the_number_of_tokens(
    model: PeftModel, way: Computation, tmp_path: Path
) -> None:
    wanted_loss, wanted = by_hand(model, ROWS)
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm().item()
    trained = copy.deepcopy(model)
    held_out = ROWS[:2]
    chosen = FitSettings(
        epochs=1, max_steps=1, batch_size=5, learning_rate=1e-12, schedule="constant",
        warmup_steps=0, warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0, seed=1,
        save_steps=100, keep_checkpoints=2, eval_steps=1,
    )  # fmt: skip
    with EventLog(tmp_path / "events.jsonl") as events:
        fit(trained, ROWS, held_out, chosen, computation=way, device=CPU, events=events)
    found = {event["event"]: event for event in read_events(tmp_path / "events.jsonl")}
    step, evaluation = found["step"], found["eval"]
    assert step["loss"] == pytest.approx(wanted_loss, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert step["trained_tokens"] == 3 + 2 + 3 + 1 + 2
    # The learning rate is so small that the model is the same after the step.
    assert evaluation["loss"] == pytest.approx(by_hand(model, held_out)[0], rel=1e-5)
    assert evaluation["tokens"] == 5
    with way.prepared(model):
        summed, weight = held_out_sums(model, held_out, computation=way, device=CPU).tolist()
    assert (weight, summed / weight) == (6.75, pytest.approx(evaluation["loss"], rel=1e-5))
