"""Defects of inference: what is asked is what was trained, and it stops where it was taught to."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from tutorial_families import CHATML, FAMILIES, SHIPPED, Family

from myna.data.encode import Encoder
from myna.data.templates import choose_template
from myna.inference.chat import ChatSession
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker, open_speaker

from .conftest import SOME, Checkpoint, Terminal


def asked(
    monkeypatch: pytest.MonkeyPatch, questions: Sequence[str], run: str
) -> list[tuple[int, ...]]:
    """Prompt ids that `myna chat` sends for each question, asked in a chat of its own."""
    prompts: list[tuple[int, ...]] = []
    stream = Speaker.stream

    def listen(speaker: Speaker, prompt_ids: Sequence[int], sampling: Sampling):
        prompts.append(tuple(prompt_ids))
        return stream(speaker, prompt_ids, sampling)

    speaker = open_speaker(run, device="cpu", dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(Speaker, "stream", listen)
        for question in questions:
            session = ChatSession(speaker, Sampling(max_new_tokens=1), note=pytest.fail)
            list(session.ask(question))
    return prompts


@pytest.mark.parametrize("family", ["llama3", "gemma", "qwen3", "glm4_5", "atom"])
def test_train_infer_prompt_mismatch(
    terminal: Terminal, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Ids in chat, and ids from the saved tokenizer alone, are the ids trained."""
    ships_none = FAMILIES[family].template.parent != SHIPPED
    template = {"template": str(FAMILIES[family].template)} if ships_none else {}
    job = terminal.job(checkpoint(family), SOME, system="You are a bird.", **template)
    trained = [tuple(row["prompt_ids"]) for row in terminal.shown(job)["rows"]]
    assert terminal.run("train", job).code == 0
    questions = [row["instruction"] for row in SOME]
    assert asked(monkeypatch, questions, "runs/job") == trained
    if open_speaker("runs/job").encoder.template.folds_system:
        # No system role: a client puts the persona into the question itself.
        turns = [[{"role": "user", "content": f"You are a bird.\n\n{q}"}] for q in questions]
    else:
        system = {"role": "system", "content": "You are a bird."}
        turns = [[system, {"role": "user", "content": question}] for question in questions]
    saved = AutoTokenizer.from_pretrained("runs/job/adapter")
    served = [
        tuple(
            saved.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)["input_ids"]
        )
        for turn in turns
    ]
    assert served == trained


@pytest.mark.parametrize("family", ["llama3", "gemma", "deepseek_llm"])
def test_bos_twice_at_inference(
    terminal: Terminal, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos  # it would add one to a rendered prompt
    assert terminal.run("train", terminal.job(checkpoint(family), SOME)).code == 0
    for ids in asked(monkeypatch, ["Who?", "What is 1?"], "runs/job"):
        assert ids[0] == bos and ids.count(bos) == 1


def test_hardcoded_token_ids(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Ids come from the tokenizer: one that numbers its tokens otherwise gets other ids."""
    yi = FAMILIES["yi"]
    renumbered = Family(
        yi.template, eos=yi.eos, bos=yi.bos, pad=yi.pad, unk=yi.unk, control=("<|x|>", *CHATML)
    )
    stops = []
    for family in (yi, renumbered):
        tokenizer = family.tokenizer()
        encoder = Encoder(
            tokenizer, choose_template(tokenizer, None), stop_ids=family.stop_ids(tokenizer)
        )
        assert tokenizer.convert_ids_to_tokens(list(encoder.stop_ids)) == ["<|im_end|>"]
        stops.append(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert stops[0] != stops[1]
    assert terminal.run("train", terminal.job(checkpoint("yi"), SOME)).code == 0
    saved = json.loads(Path("runs/job/adapter/myna.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained("runs/job/adapter")
    assert tokenizer.convert_ids_to_tokens(saved["stop_ids"]) == ["<|im_end|>"]


def test_wrong_stop_id(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """An answer stops on what ends a trained turn and on the model's own ends, not on the BOS."""
    job = terminal.job(checkpoint("llama3"), SOME)
    ends = {row["completion_ids"][-1] for row in terminal.shown(job)["rows"]}
    assert terminal.run("train", job).code == 0
    speaker = open_speaker("runs/job", device="cpu", dtype="float32")
    stops = speaker.settings(Sampling()).eos_token_id
    assert ends <= set(stops)
    assert sorted(speaker.tokenizer.convert_ids_to_tokens(stops)) == [
        "<|end_of_text|>",
        "<|eot_id|>",
    ]
    assert speaker.tokenizer.bos_token_id not in stops


def test_role_name_typo(terminal: Terminal, checkpoint: Checkpoint) -> None:
    model = checkpoint("llama3")
    row = {
        "messages": [
            {"role": "sysrem", "content": "You are a bird."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "A bird."},
        ]
    }
    said = terminal.run("train", terminal.job(model, [row]))
    assert said.code == 3
    assert 'messages[0].role is "sysrem"' in said.text and 'Did you mean "system"?' in said.text
    # Asked of a trained model, it is refused as well.
    assert terminal.run("train", terminal.job(model, SOME)).code == 0
    questions = terminal.write([row], "questions.jsonl")
    said = terminal.run("generate", "runs/job", questions, "-o", "answers.jsonl")
    assert said.code == 3 and 'Did you mean "system"?' in said.text
    assert not Path("answers.jsonl").exists()
