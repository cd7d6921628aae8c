"""Answers equal those of the original BlueLM code and of a naive loop; limits, stops and seeds."""

import json
import logging.handlers
import threading
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from myna.data.conversation import Message, Place
from myna.data.store import Example
from myna.errors import ConfigError, DataError, NonFiniteError
from myna.inference.generate import Answer, Sampling, describe, settle, unknown_ids
from myna.inference.speaker import Speaker, open_speaker
from myna.lora.fused import fuse
from myna.lora.inject import inject
from myna.training.computation import Packed, choose_computation

from .conftest import HUB_LIKE, SPARE_ROWS, save_byte_level_model

GOLDEN = json.loads((HUB_LIKE / "expected.json").read_text(encoding="utf-8"))
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])


def drain(stream: Generator[str, None, Answer]) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def ask(speaker: Speaker, ids: Sequence[int], **sampling: object) -> Answer:
    return drain(speaker.stream(ids, Sampling(**sampling)))[1]


def prompt_ids(speaker: Speaker, text: str) -> tuple[int, ...]:
    return speaker.encoder.prompt([Message("user", text)]).ids


def naive_greedy(speaker: Speaker, ids: Sequence[int], length: int, penalty: float) -> list[int]:
    """The whole sequence computed anew for each id; CTRL's repetition penalty, prompt included."""
    sequence, stops = list(ids), {2, 3}
    while len(sequence) < len(ids) + length:
        with torch.no_grad():
            logits = speaker.model(torch.tensor([sequence])).logits[0, -1]
        for seen in set(sequence):
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        sequence.append(int(logits[: len(speaker.tokenizer)].argmax()))
        if sequence[-1] in stops:
            break
    return [token_id for token_id in sequence[len(ids) :] if token_id not in stops]


@CASES
def test_golden_prompt_to_golden_answer(bluelm: Speaker, case: dict[str, object]) -> None:
    pieces, answer = drain(bluelm.stream(case["prompt_ids"], Sampling(max_new_tokens=16)))
    assert list(answer.ids) == case["new_ids"]
    assert answer.text == case["decoded_new_skip_special"] == "".join(pieces)
    assert not answer.stopped
    assert answer.limit == 16


def test_the_golden_conversation_from_messages_to_text(bluelm: Speaker) -> None:
    case = next(case for case in GOLDEN["cases"] if case["name"] == "multi_turn_2")
    messages = [
        Message("user", "你好"),
        Message("assistant", "臣妾给皇上请安"),
        Message("user", "你是谁"),
    ]
    prompt = bluelm.encoder.prompt(messages)
    assert prompt.text == "<s>" + case["prompt"]
    assert list(prompt.ids) == case["prompt_ids"]
    assert ask(bluelm, prompt.ids, max_new_tokens=16).text == case["decoded_new_skip_special"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_golden_answers_are_the_same(bluelm: Speaker, batch_size: int) -> None:
    prompts = [case["prompt_ids"] for case in GOLDEN["cases"]]
    answers = dict(bluelm.answer_all(prompts, Sampling(max_new_tokens=16), batch_size=batch_size))
    assert sorted(answers) == list(range(len(prompts)))
    for index, case in enumerate(GOLDEN["cases"]):
        assert list(answers[index].ids) == case["new_ids"]
        assert answers[index].text == case["decoded_new_skip_special"]


def test_rows_without_a_token_are_never_drawn(speaker: Speaker, bluelm: Speaker) -> None:
    rows = speaker.model.config.vocab_size
    assert unknown_ids(speaker.model, speaker.tokenizer) == list(range(rows - SPARE_ROWS, rows))
    assert unknown_ids(bluelm.model, bluelm.tokenizer) == [4004, 4005, 4006, 4007]
    with torch.no_grad():  # the likeliest by far wherever it may be drawn
        head = speaker.model.get_output_embeddings().weight
        head[rows - 1] = 50 * head[5:].mean(0)
    for seed in range(4):
        answer = ask(speaker, prompt_ids(speaker, "hello"), temperature=5.0, top_k=0, seed=seed)
        assert max(answer.ids, default=0) < rows - SPARE_ROWS


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-7, 1e-45, 2.2e-308])
def test_answers_grow_cold_until_they_are_greedy(speaker: Speaker, temperature: float) -> None:
    ids = prompt_ids(speaker, "hello there")
    cold = ask(speaker, ids, temperature=temperature, top_k=0, seed=3)
    assert cold == ask(speaker, ids, temperature=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_equal_a_naive_loop(speaker: Speaker, penalty: float) -> None:
    prompts = [prompt_ids(speaker, text) for text in ("a", "hello there", "你好吗", "b" * 40)]
    sampling = Sampling(max_new_tokens=20, temperature=0, repetition_penalty=penalty)
    answers = dict(speaker.answer_all(prompts, sampling, batch_size=3))
    for index, ids in enumerate(prompts):
        expected = naive_greedy(speaker, ids, 20, penalty)
        assert list(answers[index].ids) == expected
        assert list(drain(speaker.stream(ids, sampling))[1].ids) == expected


def test_answers_between_packed_training_steps_are_those_of_single_rows(speaker: Speaker) -> None:
    """Left-padded batches against the naive loop; training goes on afterwards as it was."""
    injected = inject(
        speaker.model,
        rank=4,
        alpha=8,
        dropout=0.3,
        target_modules="all-linear",
        use_rslora=False,
        use_dora=False,
        init="default",
        seed=1,
    )
    model = injected.model.train()
    fuse(model)
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=2, pad_id=0, device=torch.device("cpu")
    )
    assert isinstance(computation, Packed), how
    asked = [prompt_ids(speaker, text) for text in ("a", "hello there", "你好吗", "b" * 40)]
    taught = prompt_ids(speaker, "hello")
    place = Place(Path("rows"), 1, 1)
    rows = [
        Example("", "", taught, (*prompt_ids(speaker, text)[:9], 2), place, 1)
        for text in ("one", "two", "one")
    ]
    sampling = Sampling(max_new_tokens=12, temperature=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    seen, losses = set(), []
    for _ in range(3):
        with computation.prepared(model):
            for pack in computation.pieces(rows, range(3)):
                loss = computation.summed_loss(model, pack)
                loss.backward()
            losses.append(loss.item())
            with pytest.raises(RuntimeError, match="was called without a tree"):
                next(speaker.answer_all(asked, sampling, batch_size=3))
        optimizer.step()
        optimizer.zero_grad()
        answers = dict(speaker.answer_all(asked, sampling, batch_size=3))
        assert all(module.training for module in model.modules())
        alone = dict(speaker.answer_all(asked, sampling, batch_size=1))
        model.eval()
        for index, ids in enumerate(asked):
            expected = naive_greedy(speaker, ids, 12, 1.0)
            assert list(answers[index].ids) == list(alone[index].ids) == expected
        model.train()
        seen.add(tuple(answer.ids for _, answer in sorted(answers.items())))
    assert len(seen) == 3, "training does not show in the answers"
    assert losses[2] < losses[0]


def favour(speaker: Speaker, token_id: int) -> None:
    """Make every position predict `token_id`."""
    with torch.no_grad():
        speaker.model.model.norm.weight.zero_()
        speaker.model.lm_head.weight.zero_()
    bias = torch.zeros(speaker.model.config.vocab_size)
    bias[token_id] = 10
    speaker.model.lm_head.bias = torch.nn.Parameter(bias)


@pytest.mark.parametrize("stop_id", [2, 3])
def test_every_stop_id_of_the_base_ends_an_answer(speaker: Speaker, stop_id: int) -> None:
    # 2 is the template's, 3 stands in generation_config.json only.
    favour(speaker, stop_id)
    ids = prompt_ids(speaker, "hello")
    assert ask(speaker, ids) == Answer("", (), stopped=True, limit=128 - len(ids))
    ((_, batched),) = speaker.answer_all([ids], Sampling(max_new_tokens=9), batch_size=4)
    assert batched == Answer("", (), stopped=True, limit=9)


def test_a_prompt_that_fills_the_context_is_refused(speaker: Speaker) -> None:
    ids = prompt_ids(speaker, "x" * 200)
    message = (
        f"the prompt has {len(ids)} tokens and the model's context holds 128, prompt and answer "
        "together.\n  Shorten it."
    )
    with pytest.raises(DataError) as refused:
        ask(speaker, ids)
    assert str(refused.value) == message
    with pytest.raises(DataError, match="context holds 128"):
        list(speaker.answer_all([[5], ids], Sampling(), batch_size=2))
    with pytest.raises(DataError, match="context holds 128"):
        speaker.check_fits(ids)


def test_an_id_without_a_row_is_refused(speaker: Speaker) -> None:
    with pytest.raises(DataError) as refused:
        ask(speaker, [5, 268])
    assert str(refused.value) == (
        "the prompt has the token id 268 and the model has 268 rows (ids 0 to 267): tokenizer and "
        "model do not belong together."
    )


def test_the_context_caps_an_answer_and_not_those_beside_it(speaker: Speaker) -> None:
    favour(speaker, 70)
    long, short = [5] * 120, [5] * 10
    answers = dict(speaker.answer_all([short, long], Sampling(max_new_tokens=30), batch_size=2))
    assert (len(answers[0].ids), answers[0].limit, answers[0].stopped) == (30, 30, False)
    assert (len(answers[1].ids), answers[1].limit, answers[1].stopped) == (8, 8, False)


def test_a_seed_repeats_an_answer_and_leaves_the_global_generator(speaker: Speaker) -> None:
    ids = prompt_ids(speaker, "hello")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn = [
        ask(speaker, ids, temperature=1.5, max_new_tokens=30, seed=seed).ids
        for seed in (7, 7, 8, 0)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    # Guards the fault of torch's constant first seed: unseeded answers differ.
    unseeded = {ask(speaker, ids, temperature=1.5, max_new_tokens=30).ids for _ in range(3)}
    assert len(unseeded) == 3


def test_the_settings_of_the_base_hold_unless_overridden() -> None:
    base = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.8, top_k=20, repetition_penalty=1.05,
        eos_token_id=[2, 9], suppress_tokens=[4],
    )  # fmt: skip

    def settled(**sampling: object) -> GenerationConfig:
        return settle(base, Sampling(**sampling), stop_ids=[3], pad_id=0, unknown_ids=[11])

    kept = settled()
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.top_k) == (True, 0.6, 0.8, 20)
    assert kept.repetition_penalty == 1.05
    assert kept.eos_token_id == [2, 3, 9]
    assert kept.suppress_tokens == [4, 11]
    assert kept.pad_token_id == 0
    assert describe(kept) == "temperature 0.6, top-p 0.8, top-k 20, repetition penalty 1.05"
    assert describe(settled(temperature=0)) == "greedy, repetition penalty 1.05"
    overridden = settled(temperature=1.2, top_p=1.0, top_k=0, repetition_penalty=1.0)
    assert describe(overridden) == "temperature 1.2"
    assert base.temperature == 0.6


def test_sampling_options_turn_sampling_on_where_the_base_is_greedy() -> None:
    def described(**sampling: object) -> str:
        return describe(settle(GenerationConfig(), Sampling(**sampling), stop_ids=[2], pad_id=0))

    assert described() == "greedy"
    assert described(temperature=0.7) == "temperature 0.7, top-k 50"
    assert described(top_p=0.9) == "temperature 1, top-p 0.9, top-k 50"
    assert described(top_k=5) == "temperature 1, top-k 5"
    assert described(seed=3) == "greedy"


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError) as refused:
        settle(GenerationConfig(), Sampling(temperature=0, top_p=0.5), stop_ids=[2], pad_id=0)
    assert str(refused.value) == (
        "--top-p 0.5 with temperature 0: greedy answers always take the likeliest token, so this "
        "would do nothing.\n  Leave one of them out."
    )


def test_what_transformers_says_of_the_base_settings_stays_off_the_terminal(
    tmp_path: Path,
) -> None:
    odd = save_byte_level_model(
        tmp_path, max_length=20, temperature=0.5, do_sample=False, min_length=1, num_beams=2
    )
    speaker = open_speaker(str(odd), device="cpu", dtype="float32")
    said = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("transformers")
    logger.addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = ask(speaker, prompt_ids(speaker, "hello"), max_new_tokens=4)
    finally:
        logger.removeHandler(said)
    assert answer.limit == 4
    assert caught == []
    assert said.buffer == []


def test_a_closed_stream_ends_the_work(speaker: Speaker) -> None:
    stream = speaker.stream(prompt_ids(speaker, "hello"), Sampling(max_new_tokens=90))
    next(stream)
    assert "myna-generate" in [thread.name for thread in threading.enumerate()]
    stream.close()
    assert "myna-generate" not in [thread.name for thread in threading.enumerate()]


def test_a_fault_in_the_model_reaches_the_reader(speaker: Speaker) -> None:
    speaker.model.lm_head.weight.data = speaker.model.lm_head.weight.data[:, :5]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ask(speaker, prompt_ids(speaker, "hello"))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_scores_that_are_no_numbers_are_refused(speaker: Speaker, temperature: float) -> None:
    speaker.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(NonFiniteError) as refused:
        ask(speaker, prompt_ids(speaker, "hello"), temperature=temperature)
    assert str(refused.value) == (
        "The model's scores for new token 1 are not numbers (NaN), computed in float32.\n"
        "  The weights of the base or of the adapter are broken: fetch the base again, or train "
        "with a lower learning rate."
    )


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(
    speaker: Speaker,
) -> None:
    ids = prompt_ids(speaker, "hello")
    expected = ask(speaker, ids, max_new_tokens=12).ids
    for layer in speaker.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    speaker.model.train()
    speaker.model.lm_head.eval()
    assert ask(speaker, ids, max_new_tokens=12).ids == expected
    assert speaker.model.training
    assert speaker.model.model.layers[0].training
    assert not speaker.model.lm_head.training
    speaker.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
