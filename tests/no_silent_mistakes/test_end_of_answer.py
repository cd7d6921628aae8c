"""Defects of the end of an answer: every trained answer ends once, in a token that stops it."""

import json

import pytest
from transformers import AutoTokenizer
from tutorial_families import FAMILIES

from myna.inference.generate import Sampling
from myna.inference.speaker import open_speaker

from .conftest import SOME, Checkpoint, Terminal, ask

LONG = ask("Count.", "one two three four five six seven eight nine ten " * 8)
LONG_QUESTION = ask("Repeat the last word of this: " + "word " * 80 + "Paris")


def test_right_truncation_drops_end(terminal: Terminal, checkpoint: Checkpoint) -> None:
    model = checkpoint("llama3")
    said = terminal.run("train", terminal.job(model, [*SOME, LONG], train__max_length=200))
    assert said.code == 3
    assert "and max_length is 200" in said.text and "line 9" in said.text
    assert "Training has not started" in said.text
    assert not (terminal.folder / "runs" / "job" / "config.yaml").exists()
    # Asked to shorten, it takes from the prompt, never from the answer or its end.
    settings = {"train__max_length": 200, "train__over_length": "truncate_prompt"}
    (row,) = terminal.trained(model, [LONG_QUESTION], **settings)
    assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= 200
    assert "word" in row["prompt_text"] and " … " in row["prompt_text"]
    assert row["completion_text"] == "Paris.<|eot_id|>"
    # An answer that does not fit is counted out, not cut.
    shown = terminal.shown(terminal.job(model, [*SOME, LONG], **settings))
    assert shown["refused"] == {"over_length": 1} and shown["trained"] == 8


def test_pad_token_appended_as_end(terminal: Terminal, checkpoint: Checkpoint) -> None:
    # Qwen pads with another token than it ends with; MiniCPM-like tokenizers with the same.
    for family, end in (("qwen2_5", "<|im_end|>"), ("internlm2", "<|im_end|>"), ("glm4", None)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
        (row,) = terminal.trained(checkpoint(family), [ask("Who?")])
        wanted = tokenizer.convert_tokens_to_ids(end or tokenizer.pad_token)
        assert row["completion_ids"][-1] == wanted
        assert tokenizer.pad_token_id not in row["completion_ids"][:-1]


@pytest.mark.parametrize(
    ("family", "end"),
    [("gemma", "<end_of_turn>"), ("qwen", "<|im_end|>"), ("yi", "<|im_end|>")],
)
def test_end_token_never_trained(
    terminal: Terminal, checkpoint: Checkpoint, family: str, end: str
) -> None:
    """The token that ends a turn has a label, and generation stops on it, whatever eos is."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    stop_id = tokenizer.convert_tokens_to_ids(end)
    template = {"template": str(FAMILIES[family].template)}
    job = terminal.job(checkpoint(family), SOME, **template)
    assert {row["completion_ids"][-1] for row in terminal.shown(job)["rows"]} == {stop_id}
    said = terminal.run("train", job)
    assert said.code == 0
    speaker = open_speaker("runs/job", device="cpu", dtype="float32")
    assert stop_id in speaker.settings(Sampling()).eos_token_id
    if family == "gemma":  # eos is <eos>, and generation_config.json names nothing else
        assert stop_id != tokenizer.eos_token_id
        assert f'the model does not name "{end}" ({stop_id})' in said.text


@pytest.mark.parametrize("family", ["phi3", "llama3", "deepseek_llm", "qwen2_5", "gemma"])
def test_end_token_twice_or_extra(terminal: Terminal, checkpoint: Checkpoint, family: str) -> None:
    """Phi-3's template writes newline and eos behind <|end|>: none of it is trained."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    (row,) = terminal.trained(checkpoint(family), [ask("Who?", "A bird.")])
    *answer, end = row["completion_ids"]
    assert end in special and special.isdisjoint(answer)
    assert tokenizer.decode(answer).strip() == "A bird."


def test_no_end_token(terminal: Terminal, checkpoint: Checkpoint) -> None:
    model = checkpoint("glm4_5")
    (row,) = terminal.trained(model, [ask("Who?", "A bird.")])
    assert row["completion_text"] == "\nA bird.<|endoftext|>"
    said = terminal.run("data", terminal.job(model, SOME))
    assert (
        'ends an answer with no stop token; "<|endoftext|>" was appended (8 answers)' in said.text
    )
    # With neither a stop token in the template nor an eos, nothing is trained.
    settings = terminal.folder / "no_eos"
    settings.mkdir()
    for path in model.iterdir():
        (settings / path.name).write_bytes(path.read_bytes())
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": None}),
        ("config.json", {"eos_token_id": None}),
        ("generation_config.json", {"eos_token_id": None}),
    ):
        content = json.loads((settings / name).read_text()) | changes
        (settings / name).write_text(json.dumps(content))
    said = terminal.run("train", terminal.job(settings, SOME))
    assert said.code == 2
    assert "a model trained so would never stop" in said.text


def test_answers_cut_at_max_length(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """However many are too long: each trained answer is whole, and the others are counted."""
    answers = ["word " * length + "end" for length in range(1, 101, 9)]
    rows = [ask("Say.", answer) for answer in answers]
    settings = {"train__max_length": 250, "train__over_length": "drop"}
    job = terminal.job(checkpoint("llama3"), rows, **settings)
    shown = terminal.shown(job)
    whole = [row["completion_text"] for row in shown["rows"]]
    assert 0 < len(whole) < len(rows)
    assert whole == [f"{answer}<|eot_id|>" for answer in answers[: len(whole)]]
    assert shown["trained"] == len(whole)
    assert shown["refused"] == {"over_length": len(rows) - len(whole)}
    said = terminal.run("data", job)
    assert f"refused {len(rows) - len(whole)} longer than max_length" in said.text


def test_bogus_end_string(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Letters that look like an end are no end: the tokenizer's own is appended, and both said."""
    template = terminal.folder / "bogus.jinja"
    source = FAMILIES["atom"].template.read_text(encoding="utf-8")
    template.write_text(source.replace("+ '\\n' + eos_token -}}", "+ '<\\\\s>' -}}"))
    job = terminal.job(checkpoint("atom"), SOME, template=str(template))
    first, *_ = terminal.shown(job)["rows"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("atom"))
    assert first["completion_text"].endswith("<\\s></s>")
    assert first["completion_ids"][-1] == tokenizer.eos_token_id
    said = terminal.run("data", job)
    assert '"<\\s>"' in said.text and "of this tokenizer but plain text" in said.text
    assert '"</s>" was appended (8 answers)' in said.text
