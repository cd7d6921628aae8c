"""A conversation sends what was trained, remembers what was said, and forgets when it must."""

from pathlib import Path

import pytest

from myna.data.conversation import Conversation, Message, Place
from myna.data.encode import Encoder
from myna.errors import DataError
from myna.inference.chat import ChatSession
from myna.inference.generate import Answer, Sampling
from myna.inference.speaker import Speaker, open_speaker

from .conftest import MakeRun


class Ear:
    """A speaker's `stream`, with the prompts it was asked kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[tuple[int, ...]] = []
        stream = Speaker.stream

        def listen(speaker: Speaker, prompt_ids: tuple[int, ...], sampling: Sampling):
            self.prompts.append(tuple(prompt_ids))
            return stream(speaker, prompt_ids, sampling)

        monkeypatch.setattr(Speaker, "stream", listen)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.ask(text))


@pytest.mark.parametrize("persona", [None, "你是甄嬛，皇帝身边的女人"])
def test_prompt_ids_in_chat_are_the_prompt_ids_trained(
    make_run: MakeRun, bluelm: Speaker, persona: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(bluelm.description.split(" (")[0])
    speaker = open_speaker(str(make_run(base, system=persona)), device="cpu", dtype="float32")
    ear = Ear(monkeypatch)
    session = ChatSession(speaker, Sampling(max_new_tokens=8), note=pytest.fail)
    questions = ["你好", "你是谁", "Who are you, 皇上?"]
    answers = [say(session, question) for question in questions]
    # The same conversation as a row of data, encoded as training does, with the base's tokenizer.
    messages = [
        message
        for question, answer in zip(questions, answers, strict=True)
        for message in (Message("user", question), Message("assistant", answer))
    ]
    trainer = Encoder(
        bluelm.tokenizer,
        bluelm.encoder.template,
        stop_ids=bluelm.encoder.stop_ids,
        system=persona,
        max_length=2048,
    )
    examples = trainer.encode(Conversation(tuple(messages), Place(Path("rows.jsonl"), 1, 1)))
    assert ear.prompts == [example.prompt_ids for example in examples]
    assert session.messages == messages


def test_clear_forgets(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear(monkeypatch)
    session = ChatSession(speaker, Sampling(max_new_tokens=4), note=pytest.fail)
    say(session, "a")
    say(session, "a")
    session.clear()
    say(session, "a")
    assert ear.prompts[0] == ear.prompts[2] != ear.prompts[1]


def test_a_control_token_is_refused_and_the_conversation_goes_on(speaker: Speaker) -> None:
    session = ChatSession(speaker, Sampling(max_new_tokens=4), note=pytest.fail)
    say(session, "a")
    said = session.messages
    with pytest.raises(DataError) as refused:
        say(session, "b<|im_end|>")
    assert str(refused.value).startswith('The user text of turn 1 contains "<|im_end|>"')
    assert session.messages == said
    say(session, "c")
    assert [message.content for message in session.messages if message.role == "user"] == ["a", "c"]


def test_what_the_model_wrote_itself_is_sent_back_whatever_it_is(speaker: Speaker) -> None:
    session = ChatSession(speaker, Sampling(max_new_tokens=4), note=pytest.fail)
    session._turns.append((Message("user", "a"), Message("assistant", "b<|im_end|>")))
    say(session, "c")
    assert len(session.messages) == 4


def test_an_interrupted_answer_is_remembered_as_far_as_it_was_said(speaker: Speaker) -> None:
    session = ChatSession(speaker, Sampling(max_new_tokens=60), note=pytest.fail)
    stream = session.ask("a")
    said = next(stream) + next(stream)
    stream.close()
    assert [message.content for message in session.messages] == ["a", said]


def test_the_oldest_turns_go_when_the_context_is_full(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    ear = Ear(monkeypatch)
    session = ChatSession(speaker, Sampling(max_new_tokens=8), note=notes.append)
    for text in ("first", "second" * 4, "third"):
        say(session, text)
    assert notes == ["the context of 128 tokens is full: the oldest turn was forgotten"]
    text = speaker.tokenizer.decode(ear.prompts[-1])
    assert text.startswith("<|im_start|>user\nsecondsecond")
    assert text.endswith("third<|im_end|>\n<|im_start|>assistant\n")
    assert all(len(prompt) + 8 <= 128 for prompt in ear.prompts)
    say(session, "x" * 80)
    assert notes[1] == "the context of 128 tokens is full: the oldest 2 turns were forgotten"


def test_a_question_longer_than_the_context_is_refused(speaker: Speaker) -> None:
    session = ChatSession(speaker, Sampling(), note=pytest.fail)
    with pytest.raises(DataError, match="the model's context holds 128"):
        say(session, "x" * 200)
    say(session, "short")


def test_answers_of_one_seed_differ_and_repeat(speaker: Speaker) -> None:
    def conversation() -> list[str]:
        sampling = Sampling(max_new_tokens=6, temperature=1.5, seed=4)
        session = ChatSession(speaker, sampling, note=pytest.fail)
        first = say(session, "a")
        session.clear()
        return [first, say(session, "a")]

    assert conversation() == conversation()
    assert len(set(conversation())) == 2


def test_thinking_is_kept_apart_from_what_was_said(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def think(speaker: Speaker, prompt_ids: tuple[int, ...], sampling: Sampling):
        yield "<think>\nhm"
        yield "\n</think>\n\nyes"
        return Answer("", (), True, 9)

    monkeypatch.setattr(Speaker, "stream", think)
    session = ChatSession(speaker, Sampling(), note=pytest.fail)
    say(session, "a")
    assert session.messages[1] == Message("assistant", "yes", reasoning="hm")
