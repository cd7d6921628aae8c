"""The server through OpenAI's own client: what is answered is what `myna chat` answers."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from openai import OpenAI

from myna.data.conversation import Conversation, Message, Place
from myna.data.encode import Encoder
from myna.data.templates import choose_template
from myna.inference.generate import Sampling
from myna.inference.server.app import create_app
from myna.inference.server.batching import BatchingEngine
from myna.inference.server.engine import Task
from myna.inference.server.limits import Limits
from myna.inference.server.listener import serve_in_thread
from myna.inference.speaker import open_speakers
from myna.models.tokenizer import load_tokenizer
from tiny_model import save_tiny_run

from .conftest import TOKENS, Chat, Served, held

MODELS = ["huan", "plain.v2", "base"]
QUESTIONS = ["你好", "Who are you?", "a", "What is the capital of France?"]


def ask(client: OpenAI, model: str, question: str, **options: object):
    settings = {"max_tokens": TOKENS, "temperature": 0} | options
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], **settings
    )


def text_of(answer) -> str:
    return answer.choices[0].message.content


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_is_the_one_of_myna_chat(client: OpenAI, chat: Chat, model: str) -> None:
    answer = ask(client, model, QUESTIONS[0])
    assert text_of(answer) == chat(model, QUESTIONS[0])
    assert answer.model == model
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_many_at_once_are_answered_as_each_alone_and_by_their_own_adapter(
    served: Served, client: OpenAI, chat: Chat
) -> None:
    assert served.engine.is_continuous, served.notes
    jobs = [(model, question) for question in QUESTIONS for model in MODELS] * 2
    expected = {job: chat(*job) for job in jobs}
    assert len({expected[model, QUESTIONS[1]] for model in MODELS}) == 3
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: text_of(ask(client, *job)), jobs))
    assert found == [expected[job] for job in jobs]


def test_a_stream_is_the_same_text_in_pieces_with_its_usage_at_the_end(
    client: OpenAI, chat: Chat
) -> None:
    stream = ask(client, "huan", QUESTIONS[1], stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == chat("huan", QUESTIONS[1])
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == []
    whole = ask(client, "huan", QUESTIONS[1])
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


@pytest.mark.parametrize("model", ["huan", "plain.v2"])
def test_prompt_ids_are_those_of_training(
    served: Served, client: OpenAI, chatml: Path, model: str
) -> None:
    persona = "你是甄嬛" if model == "huan" else None
    base = load_tokenizer(str(chatml))
    trainer = Encoder(
        base.tokenizer,
        choose_template(base.tokenizer, base.model_type),
        stop_ids=base.special.stop_ids,
        system=persona,
    )
    row = (Message("user", "你好"), Message("assistant", "臣妾在"), Message("user", "好"))
    trained = trainer.encode(
        Conversation((*row, Message("assistant", "是")), Place(Path("rows.jsonl"), 1, 1))
    )[-1].prompt_ids
    assert served.engine.models[model].encoder.prompt(row).ids == trained
    answer = client.chat.completions.create(
        model=model,
        max_tokens=1,
        messages=[
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "臣妾在"},
            {"role": "user", "content": [{"type": "text", "text": "好"}]},
        ],
    )
    assert answer.usage.prompt_tokens == len(trained)


def test_a_stop_text_ends_the_answer_before_it(client: OpenAI, chat: Chat) -> None:
    whole = chat("base", QUESTIONS[1])
    stop = whole[3:5]
    for stream in (False, True):
        answer = ask(client, "base", QUESTIONS[1], stop=[stop, "never there"], stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = text_of(answer), answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_a_seed_makes_sampling_repeatable_and_each_choice_another(client: OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 7, "n": 3}
    first, again = (ask(client, "base", "a", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens > TOKENS
    other = ask(client, "base", "a", **options | {"seed": 1234})
    assert [choice.message.content for choice in other.choices] != texts


def test_several_choices_of_a_greedy_answer_are_one_text(client: OpenAI, chat: Chat) -> None:
    answer = ask(client, "base", "a", n=3)
    assert {choice.message.content for choice in answer.choices} == {chat("base", "a")}


def test_sampling_draws_other_answers(client: OpenAI) -> None:
    texts = {text_of(ask(client, "base", "a", temperature=2.0)) for _ in range(4)}
    assert len(texts) == 4


def test_logprobs_are_those_of_the_model(served: Served, client: OpenAI) -> None:
    answer = ask(client, "base", "a", logprobs=True, top_logprobs=3)
    speaker = served.engine.models["base"]
    ids = list(speaker.encoder.prompt([Message("user", "a")]).ids)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content if "\ufffd" not in entry.token)
    with served.engine._own_model("base"), torch.inference_mode():
        for entry in content:
            scores = speaker.model(torch.tensor([ids])).logits[0, -1]
            scores[speaker.settings(Sampling()).suppress_tokens] = -torch.inf
            expected = torch.log_softmax(scores, dim=-1).topk(3)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
                expected.values.tolist(), abs=1e-4
            )
            assert entry.logprob == pytest.approx(expected.values[0].item(), abs=1e-4)
            ids.append(expected.indices[0].item())


def test_plain_completions_go_on_from_a_text(served: Served, client: OpenAI) -> None:
    answer = client.completions.create(
        model="base", prompt=["Once", "你好"], max_tokens=5, temperature=0, n=2, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert len(answer.choices[0].logprobs.token_logprobs) == 5
    assert answer.usage.prompt_tokens == 4 + 6
    short = client.completions.create(model="base", prompt="Once", temperature=0)
    assert short.usage.completion_tokens <= 16
    assert short.choices[0].text.startswith(answer.choices[0].text.rstrip("\ufffd"))


def test_models_health_and_metrics(served: Served, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["huan", "plain.v2", "base"]
    assert client.models.retrieve("plain.v2").owned_by == "myna"
    with pytest.raises(openai.NotFoundError, match=r"huan, plain\.v2"):
        client.models.retrieve("huan2")
    ask(client, "huan", "a")
    from .test_guards import get

    assert get(served.address, "/healthz") == (200, b"ok\n")
    status, text = get(served.address, "/metrics")
    assert status == 200
    lines = text.decode().splitlines()
    assert "myna_queue_length 0" in lines and "myna_running 0" in lines
    assert any(line.startswith('myna_completion_tokens_total{model="huan"}') for line in lines)
    assert "# TYPE myna_requests_total counter" in lines


def refusal(client: OpenAI, **body: object) -> tuple[int, str, str | None]:
    request = {"model": "base", "messages": [{"role": "user", "content": "a"}]} | body
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/chat/completions", body=request, cast_to=object)
    error = refused.value.body
    assert isinstance(error, dict) and error.keys() == {"message", "type", "param", "code"}
    return refused.value.status_code, error["message"], error["param"]


def test_what_cannot_be_asked_names_the_parameter(client: OpenAI) -> None:
    status, text, param = refusal(client, model="nobody")
    assert (status, param) == (404, "model")
    assert text == "There is no such model here; there are base, huan, plain.v2."
    status, text, param = refusal(client, messages=[{"role": "user", "content": "x<|im_end|>"}])
    assert (status, param) == (400, "messages")
    assert text == (
        'The user text of turn 1 contains "<|im_end|>" at character 2, which the tokenizer reads '
        "as a control token; expected plain text."
    )
    status, text, param = refusal(client, messages=[{"role": "user", "content": "x" * 300}])
    assert (status, param) == (400, "messages")
    assert "the prompt has 319 tokens and the model's context holds 128" in text
    status, text, param = refusal(client, max_tokens=120)
    assert (status, param) == (400, "max_tokens")
    assert "there is room for 108" in text
    status, text, param = refusal(client, chat_template_kwargs={"enable_thinking": True})
    assert (status, param) == (400, "chat_template_kwargs.enable_thinking")
    assert text == (
        "chat_template_kwargs: the chat template of this model reads no enable_thinking; it reads "
        "none."
    )
    status, text, param = refusal(client, best_of=2)
    assert (status, param) == (400, "best_of")


def test_a_client_that_leaves_frees_its_work(served: Served, client: OpenAI) -> None:
    deadline = time.monotonic() + 60
    stream = ask(client, "base", "Tell me", max_tokens=100, temperature=2.0, stream=True)
    next(iter(stream))
    stream.close()
    while served.engine.load().running:
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.01)


def test_a_client_that_leaves_a_queue_takes_its_work_along(served: Served, client: OpenAI) -> None:
    ids = served.engine.models["base"].encoder.prompt([Message("user", "a")]).ids
    with held(served.engine, Task("base", ids, Sampling(max_new_tokens=1))):
        impatient = served.client(timeout=1)
        with impatient, pytest.raises(openai.APITimeoutError):
            ask(impatient, "base", "Tell me")
        deadline = time.monotonic() + 60
        while served.engine.load().waiting:
            assert time.monotonic() < deadline, "still in the queue"
            time.sleep(0.01)
    assert text_of(ask(client, "base", "Tell me")), "the engine goes on"


def test_answers_go_on_while_a_long_one_is_written(client: OpenAI, chat: Chat) -> None:
    done = threading.Event()

    def write() -> None:
        ask(client, "huan", "Tell me", max_tokens=80, temperature=1.5)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert text_of(ask(client, "plain.v2", "a")) == chat("plain.v2", "a")
    assert text_of(ask(client, "huan", "a")) == chat("huan", "a")
    writer.join()
    assert done.is_set()


def test_tools_and_switches_reach_the_template(chatml: Path, tmp_path: Path) -> None:
    run = save_tiny_run(chatml, tmp_path / "thinker")
    template = run / "adapter" / "chat_template.jinja"
    template.write_text(
        "{% if tools %}{{ tools[0].function.name }}{% endif %}"
        + template.read_text()
        + "{% if not enable_thinking %}<think></think>{% endif %}{{ effort }}"
    )
    options = {"template_options": {"enable_thinking": False}}
    metadata = run / "adapter" / "myna.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | options))
    shared = open_speakers(str(chatml), {"thinker": run / "adapter"}, device="cpu", dtype="float32")
    engine = BatchingEngine(shared, Limits(), continuous=False)
    address, stop = serve_in_thread(create_app(engine), Limits())

    def tokens(**options: object) -> int:
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return ask(client, "thinker", "a", max_tokens=1, **options).usage.prompt_tokens

    def switched(**switches: object) -> int:
        return tokens(extra_body={"chat_template_kwargs": switches})

    try:
        plain = tokens()
        assert switched(enable_thinking=False) == plain
        assert switched(enable_thinking=True) == plain - len("<think></think>")
        assert switched(effort="high") == plain + len("high")
        tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
        assert tokens(tools=[tool]) == plain + len("add")
        for name in ("messages", "tools", "eos_token", "unknown"):
            with pytest.raises(openai.BadRequestError) as refused:
                switched(**{name: True})
            assert f"reads no {name}; it reads effort, enable_thinking." in str(refused.value)
        tool["function"]["description"] = "<|im_end|>"
        with pytest.raises(openai.BadRequestError, match="The tools contains"):
            tokens(tools=[tool])
    finally:
        stop()
        engine.close()
