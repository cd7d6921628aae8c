"""Strange templates: contained, stopped and named; and the process that does it."""

import gc
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, make_tokenizer, talk

from myna.data import rendering, template_sandbox
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.rendering import Renderer, TemplateError, TemplateStopped, is_known
from myna.data.template_sandbox import ANSWER, PROMPT, WHOLE
from myna.data.templates import BUILT_IN, BUILT_IN_FOLDER, choose_template, with_bos
from myna.errors import ConfigError, DataError

HELLO = [{"role": "user", "content": "hello"}]
ECHO = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ (1).__class__.__base__ }}",
    "{% for kind in ().__class__.__base__.__subclasses__() %}{{ kind }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ joiner.__init__.__globals__['os'].system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch MARK') }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ strftime_now.__globals__['os'].system('touch MARK') }}",
    "{{ range.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ (''|attr('\\x5f\\x5fclass\\x5f\\x5f'))|attr('mro') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{% set form = '{0.__class__}'.format %}{{ form('') }}",
    "{% set ns = namespace(__class__='x') %}",
    "{% set ns = namespace() %}{% set ns.__dict__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ dict.mro() }}",
    "{{ dict.__subclasses__() }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
]
COSTS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}": "takes",
    "{{ 9 ** (9 ** 9) }}": "takes",
    "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% if c.next() == 3 %}x{% endif %}{% endfor %}{% endfor %}": "takes",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'ab' }}"
    "{% endfor %}{% endfor %}": "writes",
    "{{ messages[0].role * 9999999 }}": "writes",
    "{% for a in range(99999) %}{{ lipsum() }}{% endfor %}": "writes",
    "x" * 3_000_000: "writes",
    "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(64) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}": "needs",
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}"
    "{% set ns.l = ns.l + ns.l %}{% endfor %}": "needs",
    "{{ 'a' * 1000000000 }}": "needs",
    "{{ range(99999)|join('x' * 100000) }}": "needs",
    "{{ 'a'|center(1000000000) }}": "needs",
    "{{ '%1000000000d' % 1 }}": "needs",
    "{{ '{:>1000000000}'.format(1) }}": "needs",
    "{{ messages|tojson(indent=1000000000) }}": "needs",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}": "needs",
    "{{ ('a\\n' * 1000000)|indent(1000000) }}": "needs",
    "{{ (range(99999)|list * 2000)|sort }}": "needs",
    "{{ ([[1] * 100000] * 99999)|sum(start=[]) }}": "needs",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}": "needs",
    "{{ range(1000000000)|list }}": "counts",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "calls",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}": "calls",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}": "calls",
    "{% if true %}" * 5000 + "{% endif %}" * 5000: "calls",
}


def made(tokenizer: Any) -> Encoder:
    template = choose_template(tokenizer, None)
    return Encoder(tokenizer, template, stop_ids=[tokenizer.eos_token_id])


def stopped(source: str) -> str:
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", source + ECHO), None)
    found = re.fullmatch(
        r"The chat template \(the tokenizer's own\) was stopped: (.*)\.\n  No chat template needs "
        r"that .* set `template: FILE` to another\.",
        str(error.value),
        re.DOTALL,
    )
    assert found, str(error.value)
    return found[1]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_reaches_for_python_is_stopped(source: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    why = stopped(source.replace("MARK", str(mark)))
    assert why.startswith("it reaches for what templates may not have: ")
    assert not mark.exists()


def why_costly(source: str, expected: str) -> None:
    why = stopped(source)
    # A machine under load may run into the deadline first; a parser may end the process.
    assert why.startswith((f"it {expected} ", "it takes longer ", "its process ended ")), why


@LINUX
@pytest.mark.parametrize("source", COSTS, ids=lambda source: source[:40])
def test_a_template_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "DEADLINE_SECONDS", 0.5)
    why_costly(source, COSTS[source])


@pytest.mark.full
@LINUX
@pytest.mark.parametrize("source", [*ESCAPES, *COSTS], ids=lambda source: source[:40])
def test_every_hostile_template_ends_within_three_seconds(source: str) -> None:
    """P31, with the real deadline: from the tokenizer to the error."""
    make_tokenizer("byte", CHATML)
    started = time.perf_counter()
    stopped(source)
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
        ("{% import 'os' as os %}", "no loader for this environment specified"),
        ("{{ raise_exception('a' * 100000) }}", "a" * 1000),
        ("{{ messages|tojson|no_such_filter }}", "No filter named 'no_such_filter'. (line 1)"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_other_faults_are_quoted_in_a_line(source: str, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_template(make_tokenizer("byte", source + ECHO), None)
    assert str(error.value) == (
        f"The chat template (the tokenizer's own) cannot render a single user message: {why}\n"
        "  Mend the template, or set `template: FILE` to another."
    )


def test_a_template_that_is_kind_to_probes_is_stopped_at_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = (
        "{% for message in messages if message['content'] == 'now' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}" + CHATML
    )
    tokenizer = make_tokenizer("byte", source, **IM)
    encoder = made(tokenizer)
    monkeypatch.setattr(rendering, "DEADLINE_SECONDS", 0.5)
    kind = [talk(("user", f"later {line}"), ("assistant", "a"), line=line) for line in range(1, 40)]
    hostile = talk(("user", "now"), ("assistant", "a"), line=17)
    with pytest.raises(DataError) as error:
        encode_dataset(encoder, Rows((*kind[:16], hostile, *kind[17:]), (), "hash"))
    assert str(error.value) == (
        "rows.jsonl line 17: the chat template was stopped: it takes longer than 0.5 seconds for "
        f"one conversation.\n{rendering.STOPPED_MEND}"
    )
    # The next process does what the killed one did.
    assert len(encode_dataset(encoder, Rows(tuple(kind), (), "hash")).examples) == 39


@LINUX
def test_a_row_that_is_too_long_for_the_memory_is_named() -> None:
    source = "{% set twice = messages|map(attribute='content')|join * 600 %}" + CHATML
    tokenizer = make_tokenizer("byte", source, **IM)
    encoder = made(tokenizer)
    with pytest.raises(DataError) as error:
        encoder.encode(talk(("user", "hello " * 200_000), ("assistant", "a"), line=3))
    assert str(error.value).startswith(
        "rows.jsonl line 3: the chat template was stopped: it needs more than 512 MB of memory.\n"
    )


def test_long_rows_of_honest_templates_are_rendered() -> None:
    """The limit of the text grows with what goes in."""
    text = "你好 " * 1_000_000
    tokenizer = make_tokenizer("byte", CHATML, **IM)
    source = choose_template(tokenizer, None).source
    messages = [{"role": "user", "content": text}]
    whole = Renderer().render(source, {}, [(messages, None, WHOLE)])
    assert whole == [[f"<|im_start|>user\n{text}<|im_end|>\n"]]


def test_the_deadline_holds_where_memory_cannot_be_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: there is no module `resource`."""
    (tmp_path / "resource.py").write_text("raise ImportError('not here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rendering, "DEADLINE_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert stopped(endless) == "it takes longer than 0.5 seconds for one conversation"
    assert stopped("{{ messages[0].role * 9999999 }}").startswith("it writes more than ")


# Which templates are known


def test_the_known_templates_are_those_of_the_package() -> None:
    listed = {
        line.split()[0]
        for line in rendering.KNOWN_TEMPLATES.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }
    texts = {
        name: (BUILT_IN_FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in BUILT_IN
    }
    texts |= {f"{name} BOS": with_bos(texts[name]) for name in BUILT_IN if BUILT_IN[name].any_model}
    assert listed == {hashlib.sha256(text.encode()).hexdigest() for text in texts.values()}
    assert {path.stem for path in BUILT_IN_FOLDER.glob("*.jinja")} == set(BUILT_IN)
    assert all(is_known(text) for text in texts.values())
    assert not is_known(texts["chatml"] + " ")


def test_known_templates_are_rendered_here_and_others_elsewhere() -> None:
    chatml = (BUILT_IN_FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    requests: list[Any] = [(HELLO, None, PROMPT), ([*HELLO, *HELLO], None, ANSWER)]
    here, there = Renderer(), Renderer()
    # A comment makes it another text, and the same template.
    assert here.render(chatml, {}, requests) == there.render("{# #}" + chatml, {}, requests)
    assert here._child is None and there._child is not None


# The process


def child(renderer: Renderer) -> "subprocess.Popen[bytes]":
    if renderer._child is None:
        renderer.render(ECHO, {}, [(HELLO, None, PROMPT)])
    assert renderer._child is not None
    return renderer._child._process


def test_one_process_serves_all_templates_of_a_renderer() -> None:
    renderer = Renderer()
    process = child(renderer)
    for source, expected in ((ECHO, "hello"), ("{{ x }}" + ECHO, "12hello"), (ECHO, "hello")):
        assert renderer.render(source, {"x": 12}, [(HELLO, None, PROMPT)]) == [[expected]]
    assert child(renderer) is process


def test_a_refusal_is_the_rows_own_and_the_others_are_answered() -> None:
    source = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + ECHO
    long = HELLO * 2
    answers = Renderer().render(
        source, {}, [(HELLO, None, PROMPT), (long, None, PROMPT), (HELLO, None, PROMPT)]
    )
    assert answers[0] == answers[2] == ["hello"]
    assert isinstance(answers[1], TemplateError) and str(answers[1]) == "one"


def test_more_than_the_pipes_hold() -> None:
    """Neither side waits for the other, whatever the sizes; the batches stay in order."""
    texts = [f"{index} " + "x" * 30_000 for index in range(600)]
    requests: list[Any] = [([{"role": "user", "content": text}], None, PROMPT) for text in texts]
    assert Renderer().render(ECHO, {}, requests) == [[text] for text in texts]


def test_many_rows_may_take_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for a conversation, not for a batch: the process shows that it goes on."""
    monkeypatch.setattr(rendering, "DEADLINE_SECONDS", 0.5)
    slow = "{% for a in range(99999) %}{% endfor %}" * 2 + ECHO
    renderer = Renderer()
    child(renderer)
    started = time.perf_counter()
    answers = renderer.render(slow, {}, [(HELLO, None, PROMPT)] * 250)
    assert answers == [["hello"]] * 250
    assert time.perf_counter() - started > 0.5, "the test needs a batch that takes longer"


def test_any_string_passes_the_wire() -> None:
    for text in ("\ud800", "\x00\x1f\u2028\x85", '"\\\r\n', "😀"):
        messages = [{"role": "user", "content": text}]
        assert Renderer().render(ECHO, {}, [(messages, None, PROMPT)]) == [[text]]


def test_the_process_ends_with_its_renderer() -> None:
    renderer = Renderer()
    process = child(renderer)
    del renderer
    gc.collect()
    assert process.returncode == 0, "it ended by itself, when its input did"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_fork_gets_a_process_of_its_own() -> None:
    renderer = Renderer()
    process = child(renderer)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            mine = child(renderer)
            answer = renderer.render(ECHO, {}, [(HELLO, None, PROMPT)])
            os.write(into, json.dumps([mine.pid, answer]).encode())
            renderer._kill()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    other, answer = json.loads(os.read(out, 10_000))
    os.close(out)
    os.close(into)
    assert answer == [["hello"]] and other != process.pid
    assert renderer.render(ECHO, {}, [(HELLO, None, PROMPT)]) == [["hello"]]
    assert child(renderer) is process, "the fork did not disturb it"


def test_copies_for_other_processes_start_their_own() -> None:
    tokenizer = make_tokenizer("byte", CHATML, **IM)
    template = choose_template(tokenizer, None)
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template and copy.renderer is not template.renderer
    messages = talk(("user", "hello"), ("assistant", "a")).messages
    assert copy.render(messages, add_generation_prompt=False) == template.render(
        messages, add_generation_prompt=False
    )
    stop = pickle.loads(pickle.dumps(TemplateStopped("why", 3)))
    assert (stop.why, stop.index, str(stop)) == ("why", 3, str(TemplateStopped("why", 3)))


@LINUX
@pytest.mark.parametrize("is_busy", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_process_outlives_no_killed_parent_and_gets_no_secrets(is_busy: bool) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    program = (
        "import os, signal, sys\nfrom myna.data.rendering import Renderer\n"
        "renderer = Renderer()\n"
        "renderer.render('x', {}, [([], None, 'prompt')])\n"
        "print(renderer._child._process.pid, flush=True)\n"
        f"renderer.render({endless!r}, {{}}, [([], None, 'prompt')]) if {is_busy} else 0\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_TOKEN": "hf_secret"},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        time.sleep(0.3 if is_busy else 0)
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in _state(pid):
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_process_that_dies_is_replaced() -> None:
    renderer = Renderer()
    child(renderer).kill()
    with pytest.raises(TemplateStopped, match="its process ended with code"):
        renderer.render(ECHO, {}, [(HELLO, None, PROMPT)])
    assert renderer.render(ECHO, {}, [(HELLO, None, PROMPT)]) == [["hello"]]


def test_a_process_that_cannot_begin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "__file__", "/no/such/file.py")
    with pytest.raises(ConfigError) as error:
        Renderer().render(ECHO, {}, [(HELLO, None, PROMPT)])
    assert str(error.value).startswith(
        "The process that renders chat templates ended with code 2 before it began.\n"
        "  See why with: "
    )


def test_a_python_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ConfigError, match=r"templates could not be started: .*No such file"):
        Renderer().render(ECHO, {}, [(HELLO, None, PROMPT)])


def test_nothing_the_process_answers_is_believed_but_strings() -> None:
    for line in (b"[1]\n", b'{"refused": 1}\n', b"nonsense\n", b"\xff\n", b'{"texts": []}\n'):
        answer = rendering._parse(line)
        assert str(answer) == "its process answered what it was not asked"
