"""Translated templates, run by a small evaluator of Go's template language."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_model
from myna.data.conversation import Message
from myna.data.templates import BUILT_IN, ChatTemplate, choose_template
from myna.errors import ConfigError
from myna.export.go_template import cut_out, to_go

FAMILIES = Path(__file__).parents[1] / "data" / "family_templates"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
ACTION = re.compile(r"\{\{ ((?:\"(?:[^\"\\]|\\.)*\"|[^\"{}])*) \}\}")


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template writes, for the words that we use; any other word is an error."""
    parts = ACTION.split(template)
    assert not [text for text in parts[::2] if "{{" in text], "a brace ran into an action"
    tokens = [(index % 2 == 1, part) for index, part in enumerate(parts)]
    tree, rest = parse(iter(tokens), top=True)
    assert rest is None
    out: list[str] = []
    run(tree, {"Messages": messages}, {}, out)
    return "".join(out)


def parse(tokens: Iterator[tuple[bool, str]], *, top: bool = False) -> tuple[list[Any], str | None]:
    """Nodes up to an `end` or `else`, and that word."""
    nodes: list[Any] = []
    for is_action, text in tokens:
        if not is_action:
            nodes.append(("text", text))
        elif text == "end" or text.startswith("else"):
            assert not top, f"{text} stands alone"
            return nodes, text
        elif text.startswith("if "):
            nodes.append(conditional(text[3:], tokens))
        elif text == "range .Messages":
            body, closing = parse(tokens)
            assert closing == "end"
            nodes.append(("range", body))
        else:
            nodes.append(("do", text))
    return nodes, None


def conditional(condition: str, tokens: Iterator[tuple[bool, str]]) -> Any:
    body, closing = parse(tokens)
    otherwise: list[Any] = []
    if closing is not None and closing.startswith("else if "):
        otherwise = [conditional(closing[8:], tokens)]
    elif closing == "else":
        otherwise, closing = parse(tokens)
        assert closing == "end"
    else:
        assert closing == "end"
    return ("if", condition, body, otherwise)


def value(word: str, dot: dict[str, Any], variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    return variables[word] if word.startswith("$") else dot[word.removeprefix(".")]


def run(nodes: list[Any], dot: dict[str, Any], variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "if":
            operator, left, right = node[1].split(" ")
            assert operator == "eq"
            same = value(left, dot, variables) == value(right, dot, variables)
            run(node[2] if same else node[3], dot, variables, out)
        elif node[0] == "range":
            for item in dot["Messages"]:
                run(node[1], item, variables, out)
        elif found := re.fullmatch(r"(\$\w+) (:?=) (\S+)", node[1]):
            assert (found[1] in variables) == (found[2] == "="), "Go would refuse it"
            variables[found[1]] = value(found[3], dot, variables)
        else:
            out.append(str(value(node[1], dot, variables)))


def test_the_evaluator_by_hand() -> None:
    """What a person who knows Go would say of these."""
    assert go('a{{ "b{" }}c', []) == "ab{c"
    text = '{{ $x := "1" }}{{ range .Messages }}{{ if eq .Role "u" }}U{{ else if eq $x "1" }}1'
    text += "{{ else }}?{{ end }}{{ .Content }}{{ $x = .Role }}{{ end }}{{ $x }}"
    messages = [{"Role": "a", "Content": "x"}, {"Role": "u", "Content": "y"}]
    assert go(text, [*messages, messages[0]]) == "1xUy?xa"


TEXTS = ("Who are you?", "一\n二 {{ .x }} {y}", '"quoted" & <b>')


def conversations() -> Iterator[list[Message]]:
    for system, turns in itertools.product((False, True), (1, 2, 3)):
        for shift in range(len(TEXTS)):
            texts = itertools.cycle(TEXTS[shift:] + TEXTS[:shift])
            messages = [Message("system", next(texts))] if system else []
            for turn in range(turns):
                messages += [Message("assistant", next(texts))] if turn else []
                messages.append(Message("user", next(texts)))
            yield messages


def check(template: ChatTemplate) -> None:
    translated = to_go(cut_out(template))
    for messages in conversations():
        given = [{"Role": message.role, "Content": message.content} for message in messages]
        assert go(translated, given) == template.render(messages, add_generation_prompt=True)


def named(name: str) -> ChatTemplate:
    tokenizer = tiny_model.byte_level_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return choose_template(tokenizer, None, override=name)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates(name) -> None:
    check(named(name))


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen2_5", "qwen3", "gemma", "phi3", "yi"])
def test_templates_of_well_known_families(name) -> None:
    tokenizer = tiny_model.byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (FAMILIES / f"{name}.jinja").read_text()
    template = choose_template(tokenizer, None)
    check(template)
    notes = cut_out(template).notes
    trims = ("the chat template changes spaces around a text, and Ollama sends them as they are",)
    assert notes == (trims if name in ("llama3", "gemma") else ())


def test_thinking_is_off_as_in_training() -> None:
    tokenizer = tiny_model.byte_level_tokenizer()
    tokenizer.chat_template = (FAMILIES / "qwen3.jinja").read_text()
    pieces = cut_out(choose_template(tokenizer, None))
    assert pieces.before_answer.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def of_source(source: str) -> ChatTemplate:
    return ChatTemplate(source, "a test", SPECIALS)


REFUSED = {
    "what it writes before a text of user is": (
        "{% for m in messages %}{{ loop.index if m.role == 'user' }}{{ m.content }}{% endfor %}"
    ),
    "it leaves out, repeats or moves the text of a message from user": (
        "{{ messages[-1].content }}{{ messages[-1].content }}"
    ),
    "it writes today's date into every prompt": (
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "it does not accept a conversation of user, assistant, user: once only": (
        "{% if messages|length > 1 %}{{ raise_exception('once only') }}{% endif %}"
        "{{ messages[0].content }}"
    ),
    "it begins an answer with": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages|length }}"
    ),
    "it writes 'TWO\\nLINES' where its pieces make 'two\\nlines'": (
        "{% for m in messages %}{{ m.content.upper() if ' ' in m.content or '\\n' in m.content "
        "else m.content }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_templates_that_are_more_than_pieces(reason) -> None:
    with pytest.raises(ConfigError) as caught:
        cut_out(of_source(REFUSED[reason]))
    text = str(caught.value)
    assert text.startswith(f"The chat template cannot be translated for Ollama: {reason}")
    assert text.endswith("`--to gguf` keeps it as it is, for llama.cpp's own server.")


def test_a_beginning_that_the_engine_adds() -> None:
    pieces = cut_out(named("bluelm"))
    assert pieces.between["", "user"] == "<s>[|Human|]:"
    without = pieces.without_beginning("<s>")
    assert without.between["", "user"] == without.between["", "system"] == "[|Human|]:"
    assert without.between["assistant", "user"] == "<|im_end|>[|Human|]:"
