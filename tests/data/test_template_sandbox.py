"""The sandbox gives templates what transformers gives them, to a character."""

import subprocess
import sys

import pytest
from chat_families import make_tokenizer

from myna.data.rendering import Renderer
from myna.data.template_sandbox import PROMPT, VARIABLES
from myna.data.template_sandbox import __file__ as PROGRAM

MESSAGES = [
    {"role": "system", "content": " 你好 <b>&\"'\n"},
    {"role": "user", "content": "hello\n\n"},
    {"role": "assistant", "content": "yes", "reasoning_content": "because"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True]}}}]
SOURCES = [
    "{{ messages }}",
    "{{ tools }} {{ documents }} {{ add_generation_prompt }} {{ bos_token }} {{ no_such_thing }}",
    "{{ messages | tojson }}|{{ tools | tojson(indent=2) }}|{{ 'é' | tojson(ensure_ascii=true) }}",
    "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ tools[0].function.parameters.a | tojson }}{{ tools[0]['function'].items() | list }}",
    "  {% if true %}\n  a\n  {% endif %}\n  {#- c -#}  b\n\n{% set x = 1 %}\n c {{- x -}} d\n",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "{% for m in messages %}{% generation %}{% set y = m.role %}{{ y }}{{ loop.index }}"
    "{% endgeneration %}{{ y }}{% endfor %}",
    "{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.self }}",
    "{{ messages[-1].thinking }}|{{ messages[-1].reasoning_content }}|{{ messages[0].thinking }}",
    "{{ dict(a=1) }}{{ dict([('b', 2)]).b }}{{ range(3) | list }}{{ 7 // 2 }}{{ '%s' % 3 }}",
    "{{ messages[0].content | trim | length }}{{ messages[1].content | replace('\\n', '~') }}",
    "{{ strftime_now('%Y') }}{{ strftime_now is defined }}",
    "{% macro f(a, b='x') %}{{ a ~ b }}{% endmacro %}{{ f('y') }}"
    "{% macro g() %}[{{ caller() }}]{% endmacro %}{% call g() %}z{% endcall %}",
    "{{ messages | map(attribute='role') | join('-') | upper | title }}{{ '<x>' | escape }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a' ~ none }}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'abc'[::-1] }}{{ 'x'.startswith('x') }}{{ 1.0 }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_texts_are_those_of_transformers(source: str) -> None:
    tokenizer = make_tokenizer("byte", source, bos_token="<s>")
    expected = tokenizer.apply_chat_template(
        MESSAGES, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    ((text,),) = Renderer().render(  # type: ignore[misc]
        source, {"bos_token": "<s>"}, [(MESSAGES, TOOLS, PROMPT)]
    )
    assert text == expected


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no\\nway') }}", "{{ messages.x.y }}", "{{ 1 + 'a' }}"],
)
def test_refusals_are_those_of_transformers(source: str) -> None:
    with pytest.raises(Exception) as expected:
        make_tokenizer("byte", source).apply_chat_template(MESSAGES, tokenize=False)
    (answer,) = Renderer().render(source, {}, [(MESSAGES, None, PROMPT)])
    assert str(answer) == str(expected.value)


def test_variables_are_those_that_the_template_does_not_set() -> None:
    source = (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set mine = 1 %}"
        "{{ mine }}{{ message.enable_thinking }}{% if tools %}{% endif %}{{ range(3) }}"
    )
    assert Renderer().variables(source) == {"thinking", "message", "tools"}
    (answer,) = Renderer().render(source, {}, [((), None, VARIABLES)])
    assert answer == ["message", "thinking", "tools"]


def test_the_program_loads_nothing_but_jinja() -> None:
    """It starts once per encoder and lives beside it: it has to be small."""
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({PROGRAM!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'myna', 'pydantic', 'yaml'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
