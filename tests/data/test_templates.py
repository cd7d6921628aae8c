from collections.abc import Callable
from pathlib import Path

import pytest
from chat_families import CHATML, DEEPSEEK, GEMMA, LLAMA3, QWEN3, make_tokenizer

from myna.data.conversation import Message
from myna.data.templates import choose_template
from myna.errors import ConfigError

Write = Callable[[str, str | bytes], Path]
SYSTEM, USER = Message("system", "Be brief."), Message("user", "Who?")
ANSWER = Message("assistant", "Me.")
# Written as a user of the model would: the system message is left out without a word.
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)


def bluelm(kind: str = "piece") -> object:
    return make_tokenizer(kind, None, bos_token="<s>", eos_token="</s>")


def test_bluelm_single_and_multi_turn() -> None:
    template = choose_template(bluelm(), "BlueLM")
    assert template.origin == "built-in bluelm.jinja (the tokenizer has none)"
    assert template.render([USER], add_generation_prompt=True) == "<s>[|Human|]:Who?[|AI|]:"
    assert (
        template.render([USER, ANSWER, Message("user", "And you?")], add_generation_prompt=True)
        == "<s>[|Human|]:Who?[|AI|]:Me.</s>[|Human|]:And you?[|AI|]:"
    )
    assert template.render([USER, ANSWER], add_generation_prompt=False) == (
        "<s>[|Human|]:Who?[|AI|]:Me.</s>"
    )


def test_bluelm_system_text_joins_as_in_the_tutorial() -> None:
    template = choose_template(bluelm(), "BlueLM")
    persona = Message("system", "现在你要扮演皇帝身边的女人--甄嬛")
    assert not template.folds_system
    assert template.render([persona, USER, ANSWER, USER], add_generation_prompt=True) == (
        "<s>[|Human|]:现在你要扮演皇帝身边的女人--甄嬛\n\n Who?[|AI|]:Me.</s>[|Human|]:Who?[|AI|]:"
    )


def test_bluelm_keeps_white_space_of_texts() -> None:
    template = choose_template(bluelm(), "BlueLM")
    text = template.render([Message("user", " a\n\n")], add_generation_prompt=True)
    assert text == "<s>[|Human|]: a\n\n[|AI|]:"


def test_the_tokenizers_own_comes_before_the_built_in() -> None:
    template = choose_template(make_tokenizer("byte", CHATML), "BlueLM")
    assert (template.source, template.origin) == (CHATML, "the tokenizer's own")


def test_a_file_comes_first(write: Write) -> None:
    path = write("mine.jinja", LLAMA3)
    template = choose_template(
        make_tokenizer("byte", CHATML, bos_token="<|begin_of_text|>"), None, override=path
    )
    assert (template.source, template.origin) == (LLAMA3, "file mine.jinja")
    assert template.render([USER], add_generation_prompt=False).startswith("<|begin_of_text|>")


def test_named_templates() -> None:
    own = {"default": CHATML, "tool_use": CHATML.replace("|im_start|", "|tools_start|")}
    template = choose_template(make_tokenizer("byte", own), None)
    assert template.source == CHATML
    assert "tools_start" in template.render([USER], [{"name": "x"}], add_generation_prompt=True)
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", {"rag": CHATML, "tool_use": CHATML}), None)
    assert str(error.value) == (
        "The tokenizer has several chat templates (rag, tool_use) and none is named default.\n"
        "  Write the one to use into a file and set `template: FILE`."
    )


def test_no_template_at_all() -> None:
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", None), "llama")
    assert str(error.value) == (
        "The tokenizer has no chat template and there is no built-in for model type 'llama' "
        "(built-in: bluelm).\n  It may be a base model: take the chat model, or set "
        "`template: FILE` to a Jinja file."
    )


def test_missing_template_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", None), None, override=tmp_path / "none.jinja")
    assert str(error.value) == (
        f"template: {tmp_path / 'none.jinja'} could not be read: No such file or directory; "
        "expected a Jinja file.\n  Mend the path, or leave `template` out to use the tokenizer's "
        "own."
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{{ raise_exception('never') }}",
            "The chat template (the tokenizer's own) cannot render a single user message: never\n",
        ),
        (
            "{{ messages[0]['text']['body'] }}",
            "The chat template (the tokenizer's own) cannot render a single user message: ",
        ),
        (
            "{% if %}",
            "The chat template (the tokenizer's own) cannot render a single user message: ",
        ),
        (
            "hello",
            "The chat template (the tokenizer's own) leaves out the text of a user message; it "
            "renders 'hello'.\n",
        ),
    ],
)
def test_templates_that_cannot_ask(source: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", source), None)
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("Mend the template, or set `template: FILE` to another.")


@pytest.mark.parametrize(("source", "verb"), [(GEMMA, "refuses"), (DROPS_SYSTEM, "drops")])
def test_a_model_without_system_role_gets_it_in_the_first_question(source: str, verb: str) -> None:
    template = choose_template(make_tokenizer("byte", source, bos_token="<bos>"), None)
    assert template.folds_system
    assert template.notes[1] == (
        f"the chat template {verb} the system role; a system text is put before the first user's "
        "text, with a blank line between"
    )
    text = template.render([SYSTEM, USER, ANSWER, USER], add_generation_prompt=False)
    assert text.count("user\nBe brief.\n\nWho?") == 1
    assert text.count("user\nWho?") == 1


def test_a_model_with_system_role_keeps_it() -> None:
    template = choose_template(make_tokenizer("byte", CHATML), None)
    text = template.render([SYSTEM, USER], add_generation_prompt=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_thinking_is_off_unless_an_adapter_says_otherwise() -> None:
    tokenizer = make_tokenizer("byte", QWEN3)
    off = choose_template(tokenizer, None)
    assert off.options == {"enable_thinking": False}
    assert off.render([USER], add_generation_prompt=True).endswith("<think>\n\n</think>\n\n")
    on = off.with_thinking(True)
    assert on.render([USER], add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert choose_template(tokenizer, None, options=on.options).options == on.options
    assert choose_template(make_tokenizer("byte", DEEPSEEK), None).options == {}


@pytest.mark.parametrize("thinking", [False, True])
def test_the_saved_template_defaults_to_the_trained_switch(thinking: bool) -> None:
    """Another engine, which passes no options, renders the same text from the saved source."""
    template = choose_template(make_tokenizer("byte", QWEN3), None).with_thinking(thinking)
    served = make_tokenizer("byte", template.saved_source)
    question = [USER.as_template_input()]
    assert served.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    ) == template.render([USER], add_generation_prompt=True)
    # A client that asks for the opposite still gets it.
    assert served.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True, enable_thinking=not thinking
    ) == template.with_thinking(not thinking).render([USER], add_generation_prompt=True)
    again = choose_template(served, None, options=template.options)
    assert again.saved_source == template.saved_source


def test_a_date_in_the_prompt_is_said() -> None:
    source = "{{ strftime_now('%d %b') }}" + CHATML
    notes = choose_template(make_tokenizer("byte", source), None).notes
    assert notes[-1] == (
        "the chat template writes today's date into every prompt; prompts of another day differ"
    )
