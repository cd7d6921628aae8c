from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, DEEPSEEK, GEMMA, LLAMA3, QWEN3, make_tokenizer
from tokenizers import processors

from myna.data.conversation import Message
from myna.data.encode import Encoder
from myna.data.rendering import TemplateError
from myna.data.templates import BUILT_IN, choose_template
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


def bluelm(kind: str = "piece") -> Any:
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
        "The tokenizer has no chat template, and none of the built-in ones is certain to be that "
        "of model type 'llama': alpaca, atom, baichuan2, bluelm, chatglm3, chatml, internlm2, "
        "qwen, vicuna, yuan2.\n  Name the one the model was trained with, as `template: NAME`, "
        "or set `template: FILE` to a Jinja file. A base model has seen none: any will do, or take "
        "the chat model."
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


# Built-in templates: every text is written by hand, from what the models' own code sends.

TALK = (USER, ANSWER, Message("user", "And I?"))
BRIEF = "Be brief."
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
GOLDEN: dict[str, tuple[str, str, str]] = {
    # One question; a system text, a turn and a question; a turn.
    "alpaca": (
        f"{ALPACA}\n\n### Instruction:\nWho?\n\n### Response:\n",
        f"{BRIEF}\n\n### Instruction:\nWho?\n\n### Response:\nMe.</s>\n\n"
        "### Instruction:\nAnd I?\n\n### Response:\n",
        f"{ALPACA}\n\n### Instruction:\nWho?\n\n### Response:\nMe.</s>\n\n",
    ),
    "atom": (
        "<s>Human: Who?\n</s><s>Assistant:",
        f"<s>System: {BRIEF}\n</s><s>Human: Who?\n</s><s>Assistant: Me.\n</s>"
        "<s>Human: And I?\n</s><s>Assistant:",
        "<s>Human: Who?\n</s><s>Assistant: Me.\n</s>",
    ),
    "baichuan2": (
        "<reserved_106>Who?<reserved_107>",
        f"{BRIEF}<reserved_106>Who?<reserved_107>Me.<reserved_106>And I?<reserved_107>",
        "<reserved_106>Who?<reserved_107>Me.",
    ),
    "bluelm": (
        "<s>[|Human|]:Who?[|AI|]:",
        f"<s>[|Human|]:{BRIEF}\n\n Who?[|AI|]:Me.</s>[|Human|]:And I?[|AI|]:",
        "<s>[|Human|]:Who?[|AI|]:Me.</s>",
    ),
    "chatglm3": (
        "[gMASK]sop<|user|>\n Who?<|assistant|>",
        f"[gMASK]sop<|system|>\n {BRIEF}<|user|>\n Who?<|assistant|>\n Me.<|user|>\n And I?"
        "<|assistant|>",
        "[gMASK]sop<|user|>\n Who?<|assistant|>\n Me.",
    ),
    "chatml": (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        f"<|im_start|>system\n{BRIEF}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nAnd I?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",
    ),
    "internlm2": (
        "<s><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        f"<s><|im_start|>system\n{BRIEF}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nAnd I?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<s><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        f"<|im_start|>system\n{BRIEF}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nAnd I?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",
    ),
    "vicuna": (
        f"{VICUNA} USER: Who? ASSISTANT:",
        f"{BRIEF} USER: Who? ASSISTANT: Me.</s>USER: And I? ASSISTANT:",
        f"{VICUNA} USER: Who? ASSISTANT: Me.</s>",
    ),
    "yuan2": ("Who?<sep>", f"{BRIEF}\nWho?<n>Me.<n>And I?<sep>", "Who?<sep>Me.</s>"),
}


def test_every_built_in_has_a_text_by_hand() -> None:
    assert set(GOLDEN) == set(BUILT_IN)


@pytest.mark.parametrize("name", GOLDEN)
def test_texts_of_the_built_in_templates(name: str) -> None:
    template = choose_template(bluelm(), None, override=name)
    assert template.origin == f"built-in {name}.jinja"
    assert not template.folds_system
    assert (
        template.render([USER], add_generation_prompt=True),
        template.render([SYSTEM, *TALK], add_generation_prompt=True),
        template.render([USER, ANSWER], add_generation_prompt=False),
    ) == GOLDEN[name]


@pytest.mark.parametrize(
    "name", [name for name in GOLDEN if name not in ("chatml", "internlm2", "qwen")]
)
def test_roles_that_a_built_in_template_does_not_know(name: str) -> None:
    template = choose_template(bluelm(), None, override=name)
    with pytest.raises(TemplateError, match=r"knows the roles .*; found: tool$"):
        template.render([USER, Message("tool", "x")], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("model_type", "tokens", "name"),
    [
        ("baichuan", ["<reserved_106>", "<reserved_107>"], "baichuan2"),
        ("baichuan", ["<reserved_102>", "<reserved_103>"], None),
        ("chatglm", ["[gMASK]", "sop", "<|user|>", "<|assistant|>"], "chatglm3"),
        ("chatglm", ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"], None),
        ("internlm2", [], "internlm2"),
        ("qwen", [], "qwen"),
        ("yuan", ["<sep>", "<eod>"], "yuan2"),
        ("yuan", ["<eod>"], None),
        ("llama", ["<sep>", "<eod>"], None),
        (None, [], None),
    ],
)
def test_a_model_type_decides_where_it_is_certain(
    model_type: str | None, tokens: list[str], name: str | None
) -> None:
    tokenizer = make_tokenizer("byte", None, added=tokens, bos_token="<s>", eos_token="</s>")
    if name is None:
        with pytest.raises(ConfigError, match=r"none of the built-in ones is certain"):
            choose_template(tokenizer, model_type)
    else:
        origin = choose_template(tokenizer, model_type).origin
        assert origin == f"built-in {name}.jinja (the tokenizer has none)"


def test_a_name_takes_the_place_of_the_tokenizers_own() -> None:
    template = choose_template(make_tokenizer("byte", LLAMA3), "BlueLM", override="chatml")
    assert template.origin == "built-in chatml.jinja"
    assert template.notes[1] == "it is used in place of the tokenizer's own template"
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", LLAMA3), None, override="llama3")
    assert str(error.value).endswith(" Leave `template` out to use the tokenizer's own.")


@pytest.mark.parametrize("name", ["alpaca", "chatml", "vicuna"])
def test_a_template_for_any_model_begins_as_the_tokenizer_does(name: str) -> None:
    tokenizer = bluelm("byte")
    plain = choose_template(tokenizer, None, override=name)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    begun = choose_template(tokenizer, None, override=name)
    assert begun.render([USER], add_generation_prompt=True) == (
        "<s>" + plain.render([USER], add_generation_prompt=True)
    )
    # With BOS once, and no note that one is missing.
    encoder = Encoder(tokenizer, begun, stop_ids=[tokenizer.eos_token_id])
    assert encoder.prompt([USER]).ids.count(tokenizer.bos_token_id) == 1
    assert not [note for note in encoder.notes if "servers add none" in note]


def test_a_name_that_is_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatml").write_text(LLAMA3)
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer("byte", None, bos_token="<|begin_of_text|>")
    named = choose_template(tokenizer, None, override="chatml")
    assert named.origin == "built-in chatml.jinja"
    assert "template: chatml is the built-in; the file of that name is ./chatml" in named.notes
    assert choose_template(tokenizer, None, override="./chatml").origin == "file chatml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("chatmll", '; did you mean "chatml"?'),
        ("vicunna", '; did you mean "vicuna"?'),
        ("xyz", "."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_template(bluelm(), None, override=name)
    assert str(error.value) == (
        f'template: "{name}" is no built-in template and no file here{hint}\n'
        "  Built-in: alpaca, atom, baichuan2, bluelm, chatglm3, chatml, internlm2, qwen, vicuna, "
        "yuan2. A file is written with a path separator or .jinja."
    )


def test_markers_that_the_tokenizer_splits_are_said() -> None:
    """The tutorials' commonest wrong template: ChatML for a tokenizer that has no such tokens."""
    tokenizer = make_tokenizer("byte", CHATML.replace("im_", "turn_"), eos_token="</s>")
    assert choose_template(tokenizer, None).notes[-1] == (
        'the chat template writes "<|turn_start|>", "<|turn_end|>", which are not one token each '
        "of this tokenizer but plain text: another model's template?"
    )
    assert choose_template(make_tokenizer("byte", CHATML), None).notes == (
        "chat template: the tokenizer's own",
    )


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"tokenize": False},
        {"enable_thinking": "no"},
        {"enable_thinking": 1},
        {"date_string": "x" * 41},
        {"messages": []},
        {"thinking": None},
    ],
)
def test_only_listed_options_reach_a_template(options: dict[str, object]) -> None:
    """CVE-2025-62426: arguments that a request gave to a template reached the renderer itself."""
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", QWEN3), None, options=options)
    ((name, value),) = options.items()
    assert str(error.value) == (
        f"The option {name!r} of the chat template is {value!r}; templates may be given "
        "enable_thinking (bool), thinking (bool), date_string (str).\n  Take it out of the "
        "adapter's saved options."
    )


def test_a_switch_is_a_variable_and_no_word_in_a_comment() -> None:
    source = "{# enable_thinking #}{{ messages[0].thinking }}" + CHATML
    template = choose_template(make_tokenizer("byte", source), None)
    assert template.switch is None and not template.has_thinking_switch and template.options == {}
    assert template.with_thinking(True) is template
