"""The engine by itself: which way answers are computed, their ends, the queue, the fallback."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from myna.data.conversation import Message
from myna.errors import NonFiniteError
from myna.inference.generate import Sampling
from myna.inference.server.batching import BatchingEngine
from myna.inference.server.engine import Busy, Event, Failed, Finished, Stopping, Task
from myna.inference.server.limits import Limits
from myna.inference.server.names import find_runs
from myna.inference.speaker import Speaker, open_speaker, open_speakers
from tiny_model import byte_level_tokenizer

from ..conftest import HUB_LIKE, save_byte_level_model
from .conftest import held

QUESTIONS = ["你好", "Who are you?", "a", "What is the capital of France, and why?"]


class Ear:
    """Hears what an engine tells."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()

    def tell(self, index: int, event: Event) -> None:
        self.events.put((index, event))

    def answers(self, count: int) -> list[Event]:
        """The last event of each of `count` answers, in their order."""
        found: dict[int, Event] = {}
        while len(found) < count:
            index, event = self.events.get(timeout=60)
            if isinstance(event, Finished | Failed):
                found[index] = event
        return [found[index] for index in range(count)]


@contextmanager
def opened(
    sources: Sequence[Path], limits: Limits | None = None, **options: object
) -> Iterator[tuple[BatchingEngine, list[str]]]:
    notes: list[str] = []
    runs = find_runs([str(source) for source in sources])
    shared = open_speakers(runs.base, runs.adapters, device="cpu", dtype="float32")
    engine = BatchingEngine(shared, limits or Limits(), note=notes.append, **options)
    try:
        yield engine, notes
    finally:
        engine.close()


def task(engine: BatchingEngine, model: str, text: str, **sampling: object) -> Task:
    ids = engine.models[model].encoder.prompt([Message("user", text)]).ids
    settings = {"max_new_tokens": 10, "temperature": 0.0} | sampling
    return Task(model, ids, Sampling(**settings))


def texts(engine: BatchingEngine, tasks: Sequence[Task]) -> list[str]:
    ear = Ear()
    engine.submit(tasks, ear.tell)
    ends = ear.answers(len(tasks))
    assert all(isinstance(end, Finished) for end in ends), ends
    return [end.text for end in ends]


def alone(engine: BatchingEngine, tasks: Sequence[Task]) -> list[str]:
    """What each is answered by a model of its own, loaded apart, through its `generate`.

    To be asked while the engine has nothing to do: random numbers are the process's.
    """
    found = []
    for one in tasks:
        speaker = engine.models[one.model]
        source = speaker.adapter or speaker.description.split(" (")[0]
        apart = speaker_of(str(source))
        found.append("".join(apart.stream(one.prompt_ids, one.sampling)))
    return found


@lru_cache
def speaker_of(source: str) -> Speaker:
    return open_speaker(source, device="cpu", dtype="float32")


def test_padded_batches_give_the_same_answers(two_runs: list[Path]) -> None:
    with opened(two_runs, continuous=False) as (engine, _):
        assert not engine.is_continuous
        tasks = [task(engine, model, text) for text in QUESTIONS for model in engine.models]
        assert alone(engine, tasks) == texts(engine, tasks)
        assert engine.load().running == engine.load().waiting == 0


def save(model: torch.nn.Module, folder: Path) -> Path:
    byte_level_tokenizer().save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}


def mistral(folder: Path) -> Path:
    return save(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24)), folder)


def gemma2(folder: Path) -> Path:
    """Soft-capped scores, computed by eager attention, and every second layer with a window."""
    return save(Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=24)), folder)


def bluelm(_: Path) -> Path:
    return HUB_LIKE


@pytest.mark.parametrize("make", [mistral, gemma2, bluelm], ids=lambda make: make.__name__)
def test_every_architecture_answers_as_its_own_generate_whatever_the_way(
    make: object, tmp_path: Path
) -> None:
    with opened([make(tmp_path)]) as (engine, notes):
        print(make.__name__, engine.is_continuous, notes)
        tasks = [task(engine, "base", text, max_new_tokens=20) for text in QUESTIONS]
        assert alone(engine, tasks) == texts(engine, tasks)
        # And alone in between, under the model's own attention.
        seeded = [task(engine, "base", "a", temperature=1.0, seed=3)]
        assert alone(engine, seeded) == texts(engine, seeded)
        assert engine.is_continuous or "no continuous batching but padded batches" in notes[-1]


def test_two_threads_that_compute_leave_the_model_as_it_was(served) -> None:
    # Found by a greedy answer right after a sampled one was withdrawn: the steps of two managers
    # overlapped, and transformers left `is_causal=False` in the config of the model.
    speaker = served.engine.models["base"]
    ids = torch.tensor([speaker.encoder.prompt([Message("user", "a")]).ids])
    with torch.inference_mode():
        before = speaker.model(ids).logits

        def compute() -> None:
            with torch.inference_mode():
                for _ in range(60):
                    speaker.model(ids, is_causal=False)

        threads = [threading.Thread(target=compute) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not hasattr(speaker.model.config, "is_causal")
        torch.testing.assert_close(speaker.model(ids).logits, before)


def test_what_continuous_batching_would_leave_out_is_answered_otherwise_and_said(
    tmp_path: Path,
) -> None:
    folder = save_byte_level_model(tmp_path, repetition_penalty=1.3)
    with opened([folder]) as (engine, notes):
        assert notes == [
            "no continuous batching but padded batches, because the base's generation settings ask "
            "for RepetitionPenalty, which transformers' continuous batching leaves out"
        ]
        tasks = [task(engine, "base", text) for text in QUESTIONS]
        assert alone(engine, tasks) == texts(engine, tasks)


def test_weights_that_are_no_numbers_are_found_before_anybody_asks(tmp_path: Path) -> None:
    folder = save_byte_level_model(tmp_path)
    runs = find_runs([str(folder)])
    shared = open_speakers(runs.base, runs.adapters, device="cpu", dtype="float32")
    assert shared.base is not None
    shared.base.model.lm_head.weight.data.fill_(float("nan"))
    threads = set(threading.enumerate())
    with pytest.raises(NonFiniteError, match="not numbers"):
        BatchingEngine(shared, Limits())
    assert not {thread for thread in set(threading.enumerate()) - threads if not thread.daemon}


def test_a_full_queue_takes_all_of_a_request_or_nothing(two_runs: list[Path]) -> None:
    with opened(two_runs[:1], Limits(waiting=3), continuous=False) as (engine, _):
        ear = Ear()
        with held(engine, task(engine, "huan", "a")):
            engine.submit([task(engine, "base", "a")] * 2, ear.tell)
            with pytest.raises(Busy):
                engine.submit([task(engine, "base", "b")] * 2, ear.tell)
            assert engine.load().waiting == 2
        assert all(isinstance(end, Finished) for end in ear.answers(2))


def test_one_that_is_withdrawn_is_not_computed_and_the_others_are(served) -> None:
    engine = served.engine
    expected = texts(engine, [task(engine, "base", text) for text in QUESTIONS])
    stayed, events, withdrawn = Ear(), [], threading.Event()

    def left(_: int, event: Event) -> None:
        withdrawn.wait(60)  # whatever comes first comes while its client leaves
        events.append(event)

    long = task(engine, "base", QUESTIONS[0], max_new_tokens=90)
    tickets = [engine.submit([long], left) for _ in range(4)]
    engine.submit([task(engine, "base", text) for text in QUESTIONS], stayed.tell)
    for ticket in tickets:
        ticket.cancel()
        ticket.cancel()
    withdrawn.set()
    assert [end.text for end in stayed.answers(len(QUESTIONS))] == expected
    deadline = time.monotonic() + 60
    while engine.load().running:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not any(isinstance(event, Finished) for event in events)


def test_the_end_lets_short_answers_finish_and_tells_the_others(two_runs: list[Path]) -> None:
    with opened(two_runs[:1], Limits(stop_seconds=0.2), continuous=False) as (engine, _):
        ear = Ear()
        engine.submit([task(engine, "huan", "a", max_new_tokens=1)], ear.tell)
        assert isinstance(ear.answers(1)[0], Finished)
        engine.submit(
            [task(engine, "huan", "a", max_new_tokens=100, temperature=1.9)] * 3, ear.tell
        )
        engine.stop_taking()
        with pytest.raises(Stopping):
            engine.submit([task(engine, "huan", "a")], ear.tell)
        ends = ear.answers(3)
        assert all(isinstance(end, Finished | Failed) for end in ends)


def test_an_engine_that_dies_is_replaced_and_said(two_runs: list[Path]) -> None:
    with opened(two_runs[:1]) as (engine, notes):
        assert engine.is_continuous
        tasks = [task(engine, "huan", text) for text in QUESTIONS]
        expected = alone(engine, tasks)
        assert texts(engine, tasks) == expected
        engine._continuous.close()  # as an error in its thread ends it
        ear = Ear()
        engine.submit(tasks, ear.tell)
        assert all(isinstance(end, Failed) for end in ear.answers(len(tasks)))
        assert texts(engine, tasks) == expected
        assert notes[-1].startswith("continuous batching has ended with an error")


def test_more_than_the_cache_holds_is_answered_alone(served) -> None:
    engine = served.engine
    one = task(engine, "base", "x" * 80, max_new_tokens=20)
    room = engine._continuous.room
    engine._continuous.room = 50
    try:
        assert alone(engine, [one]) == texts(engine, [one])
    finally:
        engine._continuous.room = room


def test_sampling_in_continuous_batches_keeps_to_its_own_temperature(served) -> None:
    engine = served.engine
    cold = [task(engine, "base", "a", temperature=1e-4)] * 4
    hot = [task(engine, "base", "a", temperature=2.0)] * 4
    greedy = texts(engine, [task(engine, "base", "a")])[0]
    narrow = [task(engine, "base", "a", temperature=2.0, top_p=1e-6)] * 4
    found = texts(engine, [*cold, *hot, *narrow])
    assert found[:4] == [greedy] * 4
    assert len(set(found[4:8])) == 4
    assert found[8:] == [greedy] * 4


def test_a_base_that_is_no_chat_model_is_left_out_and_said(
    two_runs: list[Path], chatml: Path, tmp_path: Path
) -> None:
    import shutil

    base = Path(shutil.copytree(chatml, tmp_path / "base"))
    run = Path(shutil.copytree(two_runs[0], tmp_path / "huan"))
    (base / "chat_template.jinja").unlink()
    text = (run / "adapter" / "adapter_config.json").read_text()
    (run / "adapter" / "adapter_config.json").write_text(text.replace(str(chatml), str(base)))
    with opened([run], continuous=False) as (engine, notes):
        assert list(engine.models) == ["huan"]
        assert "the base alone is not served: The tokenizer has no chat template" in notes[0]
