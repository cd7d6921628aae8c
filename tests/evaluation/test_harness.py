"""lm-eval's requests against plain transformers and peft, and a task from a local file."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from myna.errors import ConfigError
from myna.evaluation.harness import HarnessModel, find_tasks, run_tasks
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker

QUESTIONS = [
    {"question": f"Which is {number}?", "choices": ["one", "two", "many"], "label": number % 3}
    for number in range(6)
]
TASK = """
task: which
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""


class Textbook:
    """Plain transformers, peft and the tokenizer's own template."""

    def __init__(self, adapted: Any) -> None:
        base = AutoModelForCausalLM.from_pretrained(adapted.base)
        self.model = PeftModel.from_pretrained(base, adapted.folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(adapted.folder)

    def prompt(self, *texts: str) -> str:
        roles = ["user", "assistant"] * len(texts)
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
        ]
        return str(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )

    def score(self, context: str, answer: str) -> tuple[float, bool]:
        start = len(self.tokenizer(context)["input_ids"])
        ids = torch.tensor([self.tokenizer(context + answer)["input_ids"]])
        with torch.no_grad():
            scores = self.model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen = scores.gather(-1, ids[0, start:, None])
        return chosen.sum().item(), bool((scores.argmax(-1) == ids[0, start:]).all())


@pytest.fixture(scope="module")
def textbook(adapted: Any) -> Textbook:
    return Textbook(adapted)


def requests(*arguments: Any) -> list[Any]:
    """What of lm-eval's Instance a model reads."""
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_of_given_answers(speaker: Speaker, textbook: Textbook, batch_size: int) -> None:
    model = HarnessModel(speaker, batch_size=batch_size)
    prompt = model.apply_chat_template([{"role": "user", "content": "你好"}])
    assert prompt == textbook.prompt("你好")
    pairs = [(prompt, "yes"), (prompt, "a much longer answer"), ("Water", " boils"), (prompt, "")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, answer), (score, is_greedy) in zip(pairs, found, strict=True):
        expected = textbook.score(context, answer)
        assert score == pytest.approx(expected[0], rel=1e-4) and is_greedy == expected[1]
    (whole,) = model.loglikelihood_rolling(requests(("Water boils",)))
    start = textbook.tokenizer.decode([model.prefix_token_id])
    assert whole == pytest.approx(textbook.score(start, "Water boils")[0], rel=1e-4)


def test_an_answer_that_is_begun(speaker: Speaker, textbook: Textbook) -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    model = HarnessModel(speaker, batch_size=1)
    text = model.apply_chat_template(history, add_generation_prompt=False)
    assert text == textbook.prompt("a") + "It is"


def test_answers_are_those_of_chat_cut_where_the_task_ends(speaker: Speaker) -> None:
    model = HarnessModel(speaker, batch_size=2)
    prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in "abc"]
    ids = [model.tok_encode(prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens=9, temperature=0.0)
    whole = dict(speaker.answer_all(ids, sampling, batch_size=1))
    settings: dict[str, Any] = {"until": [], "max_gen_toks": 9}
    found = model.generate_until(requests(*((prompt, settings) for prompt in prompts)))
    assert found == [whole[number].text for number in range(3)]
    end = found[0][3]
    settings = {"until": [end, "\n\n"], "max_gen_toks": 9}
    (cut,) = model.generate_until(requests((prompts[0], settings)))
    assert cut == found[0].partition(end)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "which.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "which.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    return tasks


def test_a_task_of_ones_own_for_base_and_adapter(
    speaker: Speaker, textbook: Textbook, folder: Path
) -> None:
    said: list[str] = []
    known = find_tasks(["which"], folder)
    found = run_tasks(speaker, ["which"], known, batch_size=4, limit=None, say=said.append)

    def accuracy() -> float:
        right = 0
        for row in QUESTIONS:
            prompt = textbook.prompt(row["question"])
            scores = [textbook.score(prompt, choice)[0] for choice in row["choices"]]
            right += scores.index(max(scores)) == row["label"]
        return right / len(QUESTIONS)

    adapter = accuracy()
    with textbook.model.disable_adapter():
        base = accuracy()
    assert found == {
        "which": {"acc": {"base": pytest.approx(base), "adapter": pytest.approx(adapter)}}
    }
    assert said == ["lm-eval: which (base)", "lm-eval: which (adapter)"]


def test_tasks_and_folders_that_are_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from myna.evaluation import harness

    def refusal(task: str, place: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            find_tasks([task], place)
        return str(refused.value)

    assert refusal("which", folder / "no") == (
        f"--tasks-folder {folder / 'no'}: there is no such folder."
    )
    # lm-eval's own thousands take seconds to list.
    whole: Callable[..., Any] = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda **given: whole(**{**given, "include_defaults": False})
    )
    assert refusal("whcih", folder) == (
        f'--tasks: lm-eval has no task "whcih", nor has {folder}. Did you mean "which"?\n'
        "  `lm-eval ls tasks` lists them; --tasks-folder DIR adds files of your own."
    )


def test_data_of_a_task_that_is_not_there(speaker: Speaker, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "which.jsonl").unlink()
    known = find_tasks(["which"], folder)
    with pytest.raises(ConfigError) as refused:
        run_tasks(speaker, ["which"], known, batch_size=1, limit=None)
    assert str(refused.value).startswith("--tasks: the data of which cannot be had: ")
    assert "which.jsonl" in str(refused.value)
