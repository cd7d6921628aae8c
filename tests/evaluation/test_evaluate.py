"""Judging: both sides answer as they would alone, and what is written is what was found."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from myna.errors import ConfigError, OutOfMemoryError
from myna.evaluation.evaluate import HeldOutJudge, answer_rows, evaluate, usual_limit, work
from myna.evaluation.metrics import Judged, Metric, parse_metrics
from myna.evaluation.rows import JudgedRow
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker, open_speaker
from myna.models.packed import packed_attention

SHORT = Sampling(max_new_tokens=6, temperature=0.0)
QUESTIONS = [
    {"prompt": "What is 1?", "completion": "It is 7!"},
    {"prompt": "你好", "completion": "你好呀，皇上。"},
    {"prompt": "a longer question than the others", "completion": "yes"},
]


def length() -> Metric:
    return Metric("length", lambda each: len(each.answer) + 1000 * each.stopped)


def test_both_sides_answer_as_they_do_alone(
    adapted: Any, speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    rows = rows_from(QUESTIONS).rows
    calls = []
    found = evaluate(
        speaker,
        rows,
        [length(), *parse_metrics(["exact_match"])],
        data="FILE",
        sampling=SHORT,
        batch_size=2,
        advance=lambda: calls.append(1),
    )
    assert len(calls) == work(rows) == 12
    alone = {
        "base": open_speaker(str(adapted.base), device="cpu", dtype="float32"),
        "adapter": open_speaker(str(adapted.folder), device="cpu", dtype="float32"),
    }
    prompts = [row.prompt_ids for row in rows]
    values: dict[str, list[float]] = {}
    for side, one in alone.items():
        answers = dict(one.answer_all(prompts, SHORT, batch_size=1))
        assert [each.answers[side].text for each in found.rows] == [
            answers[i].text for i in range(3)
        ]
        values[side] = [len(answers[i].text.strip()) + 1000 * answers[i].stopped for i in range(3)]
        assert [each.metrics["length"][side] for each in found.rows] == values[side]
    assert [each.answers["base"].text for each in found.rows] != [
        each.answers["adapter"].text for each in found.rows
    ]
    assert found.metrics["length"] == pytest.approx(
        {side: sum(of_side) / 3 for side, of_side in values.items()}
    )
    assert found.metrics["exact_match"] == {"base": 0, "adapter": 0}


def test_what_is_written(speaker: Speaker, rows_from: Callable[..., Any]) -> None:
    rows = rows_from(QUESTIONS[:1]).rows
    metrics = parse_metrics(["chrf", "json"])
    found = evaluate(speaker, rows, metrics, data="held-out rows of the run", sampling=SHORT)
    entry = found.to_json()
    (row,) = entry.pop("rows")
    assert found.loss is not None
    assert entry == {
        "data": "held-out rows of the run",
        "rows_judged": 1,
        "loss": found.loss,
        "perplexity": {side: math.exp(loss) for side, loss in found.loss.items()},
        "trained_tokens": len(rows[0].example.completion_ids),
        "metrics": {"chrf": found.metrics["chrf"], "json": {"base": 0.0, "adapter": 0.0}},
        "scale": {"chrf": 100, "json": 1},
        "forgetting": None,
        "tasks": {},
    }
    assert row["loss"] == pytest.approx(found.loss)  # one row
    assert row["metrics"]["json"] == {"base": 0.0, "adapter": 0.0}
    assert {key: row[key] for key in ("place", "question", "reference")} == {
        "place": "rows.jsonl line 1",
        "question": "What is 1?",
        "reference": "It is 7!",
    }
    assert row["adapter"] == found.rows[0].answers["adapter"].text != row["base"]


def test_answers_are_waited_for_twice_as_long_as_the_rows_own(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    def limit(*answers: str) -> int:
        rows = rows_from([{"prompt": "a", "completion": answer} for answer in answers]).rows
        return usual_limit(rows)

    assert limit("b" * 19, "b" * 29) == 2 * 30  # bytes, and the stop token
    assert limit("b") == 32 and limit("b" * 200) == 256
    asked = JudgedRow("line 1", "a", None, (1, 2), None)
    assert usual_limit([asked]) == 256


def test_plain_texts_have_a_loss_and_no_answer(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    rows = rows_from([{"text": "Once upon a time."}]).rows
    entry = evaluate(speaker, rows, [], data="FILE").to_json()
    assert entry["metrics"] == {} and entry["loss"]["base"] > 0
    assert entry["rows"][0]["base"] is None and entry["rows"][0]["adapter"] is None
    with pytest.raises(ConfigError) as refused:
        evaluate(speaker, rows, parse_metrics(["json"]), data="FILE")
    assert str(refused.value) == (
        "metric json judges answers, and the 1 rows are plain text: none of them asks for one.\n"
        "  Leave the metrics out; there is a loss only."
    )


def test_a_metric_with_a_fault_is_told_before_anything_is_computed(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    def fail(each: Judged) -> float:
        raise ConfigError(f"seen {each.answer} {each.reference} {each.place}")

    speaker.model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigError, match=r"^seen It is 7! It is 7! rows.jsonl line 1$"):
        evaluate(speaker, rows_from(QUESTIONS).rows, [Metric("bad", fail)], data="FILE")


def test_where_memory_runs_out_fewer_rows_are_answered_at_once(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    rows = rows_from(QUESTIONS).rows
    expected = answer_rows(speaker, rows, SHORT, 1)
    most = 1

    def refuse(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    speaker.model.register_forward_pre_hook(refuse, with_kwargs=True)
    found = answer_rows(speaker, rows, SHORT, 2)
    assert list(found) == [0, 1, 2]
    assert [answer.text for answer in found.values()] == [a.text for a in expected.values()]
    most = 0
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu"):
        answer_rows(speaker, rows, SHORT, 1)


def test_a_model_in_training_is_judged_under_its_own_attention_and_left_as_it_was(
    speaker: Speaker, rows_from: Callable[..., Any]
) -> None:
    rows = rows_from(QUESTIONS[:2]).rows
    judge = HeldOutJudge(speaker, rows, [length()], sampling=SHORT)
    answers = answer_rows(speaker, rows, SHORT, 8)
    expected = sum(len(a.text.strip()) + 1000 * a.stopped for a in answers.values()) / 2
    assert judge() == {"length": expected}
    model = speaker.model.train()
    with packed_attention(model):
        configs = [module.__dict__.get("config") for module in model.modules()]
        state = torch.get_rng_state()
        assert judge() == {"length": expected}  # dropout off
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        after = [module.__dict__.get("config") for module in model.modules()]
        assert all(one is other for one, other in zip(configs, after, strict=True))
        with pytest.raises(RuntimeError, match="attention of packs was called without a tree"):
            model(input_ids=torch.tensor([[1, 2]]))
