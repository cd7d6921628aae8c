"""Losses of base and adapter against transformers and peft, row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from myna.errors import NonFiniteError
from myna.evaluation.losses import SIDES, losses_of, side_of
from myna.inference.speaker import Speaker

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "What is 1?", "completion": "It is 7!"},
    {"prompt": "你好", "completion": "你好呀，皇上。"},
]
DIALOGUE: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "c, of course", "weight": 0.5},
        ]
    }
]


def textbook(model: Any, example: Any) -> tuple[float, int]:
    """Mean loss of transformers' own forward with labels on the answer, and their number."""
    ids = [*example.prompt_ids, *example.completion_ids]
    labels = [-100] * len(example.prompt_ids) + list(example.completion_ids)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return output.loss.item(), len(example.completion_ids)


@pytest.mark.parametrize("rows", [QUESTIONS, DIALOGUE, [{"text": "Once upon a time 很久."}]])
def test_losses_are_those_of_transformers_with_peft(
    rows: list[dict[str, Any]], adapted: Any, speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(adapted.base)
    theirs = PeftModel.from_pretrained(base, adapted.folder).eval()
    examples = [row.example for row in rows_from(rows).rows]
    found = losses_of(speaker.model, examples, pad_id=speaker.pad_id)
    sums = {side: 0.0 for side in SIDES}
    weights = 0.0
    for number, example in enumerate(examples):
        with theirs.disable_adapter():
            expected = {"base": textbook(theirs, example)[0]}
        expected["adapter"], tokens = textbook(theirs, example)
        if not example.prompt_ids:  # nothing predicts the first token of a text without BOS
            tokens -= 1
        assert found.of_row(number) == pytest.approx(expected, rel=1e-5)
        for side in SIDES:
            sums[side] += example.weight * tokens * expected[side]
        weights += example.weight * tokens
    assert abs(sums["base"] - sums["adapter"]) > 0.01
    mean = {side: sums[side] / weights for side in SIDES}
    assert found.mean() == pytest.approx(mean, rel=1e-5)
    assert found.tokens == sum(len(e.completion_ids) - (not e.prompt_ids) for e in examples)


def test_switching_the_adapter_off_leaves_no_trace(
    adapted: Any, speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    model, ids = speaker.model, torch.tensor([rows_from(QUESTIONS).rows[0].prompt_ids])
    plain = AutoModelForCausalLM.from_pretrained(adapted.base)
    with torch.no_grad():
        before = model(ids).logits
        with side_of(model, "base"):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, before)
        with side_of(model, "adapter"):
            assert torch.equal(model(ids).logits, before)
        with pytest.raises(KeyError), side_of(model, "base"):
            raise KeyError
        assert torch.equal(model(ids).logits, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_no_number_names_row_and_side(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    for name, parameter in speaker.model.named_parameters():
        if "layers.1" in name and "lora_B" in name:
            parameter.data.fill_(float("inf"))
    rows = rows_from(QUESTIONS).rows
    with pytest.raises(NonFiniteError) as refused:
        losses_of(speaker.model, [row.example for row in rows], pad_id=speaker.pad_id)
    assert str(refused.value) == (
        "rows.jsonl line 1: the loss of the adapter is nan.\n  The weights of the base or of the "
        "adapter are broken, or dtype: float32 is needed."
    )
