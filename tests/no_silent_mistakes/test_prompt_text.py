"""Defects of the prompt's text: myna cannot make them, or says them before step 1."""

import json

import pytest
from transformers import AutoTokenizer
from tutorial_families import FAMILIES, SHIPPED

from myna.inference.speaker import open_speaker

from .conftest import SOME, Checkpoint, Terminal, ask, save_checkpoint


def test_instruction_and_input_glued(terminal: Terminal, checkpoint: Checkpoint) -> None:
    rows = [ask("翻译成英文", "hello", input="你好"), ask("翻译成英文：你好", "hello", input="")]
    glued, alone = terminal.trained(checkpoint("qwen2_5"), rows)
    assert "user\n翻译成英文\n你好<|im_end|>" in glued["prompt_text"]
    assert "user\n翻译成英文：你好<|im_end|>" in alone["prompt_text"]
    said = terminal.run("data", "job.yaml")
    assert "user = instruction, newline, input (if any)" in said.text


def test_persona_hard_coded(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The persona is a setting, of the run or of a row, and it goes with the adapter."""
    job = terminal.job(checkpoint("qwen2_5"), SOME, system="You are a bird.")
    bird, *_ = terminal.shown(job)["rows"]
    fish, *_ = terminal.shown(job, "system=You are a fish.")["rows"]
    assert "You are a bird." in bird["prompt_text"]
    assert fish["prompt_text"] == bird["prompt_text"].replace("a bird", "a fish")
    of_the_row = ask("Who are you?", system="You are a cat.")
    (cat,) = terminal.trained(checkpoint("qwen2_5"), [of_the_row], system="You are a bird.")
    assert "You are a cat." in cat["prompt_text"] and "a bird" not in cat["prompt_text"]
    job = terminal.job(checkpoint("qwen2_5"), SOME, system="You are a bird.")
    assert terminal.run("train", job).code == 0
    assert open_speaker("runs/job").encoder.system == "You are a bird."


@pytest.mark.parametrize(
    ("family", "template", "markers"),
    [
        ("baichuan2", SHIPPED / "yi.jinja", '"<|im_start|>", "<|im_end|>"'),
        ("qwen2_5", SHIPPED / "llama3.jinja", '"<|eot_id|>"'),
    ],
)
def test_markers_as_plain_text(
    terminal: Terminal, checkpoint: Checkpoint, family: str, template: str, markers: str
) -> None:
    """Another family's template: its markers are no tokens here, and that is said."""
    job = terminal.job(checkpoint(family), SOME, template=str(template))
    said = terminal.run("data", job)
    assert said.code == 0
    assert "of this tokenizer but plain text" in said.text
    assert markers in said.text


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_that_are_tokens_are_not_warned_of(
    terminal: Terminal, checkpoint: Checkpoint, family: str
) -> None:
    job = terminal.job(checkpoint(family), SOME, template=str(FAMILIES[family].template))
    said = terminal.run("data", job)
    assert said.code == 0, said.text
    assert "of this tokenizer but plain text" not in said.text


def test_template_not_the_models(
    terminal: Terminal, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The template is the tokenizer's own, whatever the architecture is called."""
    gemma = checkpoint("gemma")
    assert json.loads((gemma / "config.json").read_text())["model_type"] == "llama"
    (row,) = terminal.trained(gemma, [ask("Who are you?")], system="You are a bird.")
    # No system turn is invented for a model that has none.
    assert row["prompt_text"] == (
        "<bos><start_of_turn>user\nYou are a bird.\n\nWho are you?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    said = terminal.run("data", "job.yaml")
    assert "chat template: the tokenizer's own" in said.text
    assert "refuses the system role" in said.text
    # A model without a template is not given somebody else's.
    base = save_checkpoint(tmp_path_factory.mktemp("base"), "qwen2_5", template=False)
    said = terminal.run("train", terminal.job(base, SOME))
    assert said.code == 2
    assert "The tokenizer has no chat template" in said.text and "template" in said.text
    assert not (terminal.folder / "runs" / "job" / "config.yaml").exists()


@pytest.mark.parametrize("family", ["llama3", "glm4_5", "qwen3", "phi3", "deepseek_llm"])
def test_template_near_miss(terminal: Terminal, checkpoint: Checkpoint, family: str) -> None:
    """Prompt ids are those that a server computes with transformers' own function."""
    rows = [{"messages": conversation} for conversation in conversations()]
    trained = terminal.trained(checkpoint(family), rows)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    expected = [
        tokenizer.apply_chat_template(
            conversation[:index],
            add_generation_prompt=True,
            tokenize=True,
            enable_thinking=False,
        )["input_ids"]
        for conversation in conversations()
        for index, message in enumerate(conversation)
        if message["role"] == "assistant"
    ]
    assert [row["prompt_ids"] for row in trained] == expected


def conversations() -> list[list[dict[str, str]]]:
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "一只鸟。"},
        {"role": "user", "content": "Which?\nTell me."},
        {"role": "assistant", "content": "A myna."},
    ]
    return [[system, *turns], turns, turns[:2]]


def test_newline_lost_by_strip(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """White space of the template and of the texts stands where it was written."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2_5"))
    (row,) = terminal.trained(checkpoint("qwen2_5"), [ask(" Who?\n", " A bird. ")])
    assert row["prompt_text"].endswith("user\n Who?\n<|im_end|>\n<|im_start|>assistant\n")
    assert row["prompt_ids"][-1] == tokenizer.encode("\n")[0]
    assert row["completion_text"] == " A bird. <|im_end|>"


def test_foreign_bos_literal(
    terminal: Terminal, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Only the template writes a BOS; Qwen has none, and gets none.
    (row,) = terminal.trained(checkpoint("qwen2_5"), [ask("Who?")])
    assert row["prompt_text"].startswith("<|im_start|>system\n")
    # A template that writes one by hand is told that it is letters.
    literal = terminal.folder / "literal.jinja"
    literal.write_text("<s>" + FAMILIES["qwen2_5"].template.read_text(encoding="utf-8"))
    said = terminal.run("data", "job.yaml", f"template={literal}")
    assert '"<s>"' in said.text and "of this tokenizer but plain text" in said.text
    # In the data it is refused where it would be read as a token.
    said = terminal.run("train", terminal.job(checkpoint("internlm2"), [ask("<s>Who?")]))
    assert said.code == 3
    assert 'contains "<s>" at character 1' in said.text and "line 1" in said.text


def test_bos_missing_in_training(terminal: Terminal, checkpoint: Checkpoint) -> None:
    for family in ("llama3", "gemma3", "internlm2", "deepseek_llm"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
        (row,) = terminal.trained(checkpoint(family), [ask("Who?")])
        assert row["prompt_ids"][0] == tokenizer.bos_token_id
    # Where the template writes none, servers send none either; the run says so.
    said = terminal.run("data", terminal.job(checkpoint("minicpm"), SOME))
    assert 'the chat template writes no "<s>"; servers add none to a rendered chat' in said.text


def test_bos_twice_in_training(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The template writes one and the tokenizer would add another."""
    llama = checkpoint("llama3")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos
    (row,) = terminal.trained(llama, [ask("Who?")])
    assert (row["prompt_ids"] + row["completion_ids"]).count(bos) == 1
    twice = terminal.folder / "twice.jinja"
    twice.write_text("{{- bos_token -}}" + FAMILIES["llama3"].template.read_text(encoding="utf-8"))
    said = terminal.run("train", "job.yaml", f"template={twice}")
    assert said.code == 2 and 'writes "<|begin_of_text|>" twice at the start' in said.text


def test_input_field_dropped(terminal: Terminal, checkpoint: Checkpoint) -> None:
    model = checkpoint("qwen2_5")
    (row,) = terminal.trained(model, [ask("Translate.", "hello", input="你好")])
    assert "你好" in row["prompt_text"]
    # A field that would not be used is refused where it looks like a slip, and named where not.
    said = terminal.run("train", terminal.job(model, [ask("Translate.", "hello", inputs="你好")]))
    assert said.code == 3 and 'Did you mean "input"?' in said.text
    said = terminal.run("data", terminal.job(model, [ask("Translate.", "hello", category="zh")]))
    assert said.code == 0
    assert "not used: category (1 rows)" in said.text


def test_persona_does_not_fit_data(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Nobody but a person can judge it: the first row is shown whole before step 1."""
    rows = [ask("Meow?", "Purr."), ask("Who?", system="You are a cat.")]
    said = terminal.run("train", terminal.job(checkpoint("llama3"), rows, system="A court lady."))
    assert said.code == 0
    before, _, _ = said.text.partition("steps of 4 rows")
    assert "A court lady." in before and "Meow?" in before
    assert "1 rows have a system message of their own and keep it in place of `system`" in before
