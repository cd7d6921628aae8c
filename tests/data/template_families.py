"""Chat templates as the model families publish them, imitated: what each does to a conversation.

Written for these tests from what the families' templates are known to do (roles, order, white
space, what becomes of system texts, tools and reasoning), not copied from them. `chat_families.py` has
shorter ones for tests in which the template hardly matters.
"""

# ruff: noqa: E501 (a line of Jinja is a line of its text)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from chat_families import make_tokenizer
from tokenizers import AddedToken

# BOS before every question, the system text inside the first, everything trimmed.
LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set turns, system = messages[1:], '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' %}
{%- else %}
    {%- set turns, system = messages, '' %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# The date and the tools in the system turn, which is always there (3.1 and later).
LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set turns, system = messages, "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set turns, system = messages[1:], messages[0]['content'] | trim %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to these functions:\\n\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in turns %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Tools stand before the last question, the system text inside it if it is the last message.
MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system, turns = messages[0]["content"], messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set questions = turns | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == questions[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

# No system role; turns end in <end_of_turn>, which is not the tokenizer's eos.
GEMMA = """
{{- bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

_HERMES_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- elif default %}
        {{- default + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif default %}
    {{- '<|im_start|>system\\n' + default + '<|im_end|>\\n' }}
{%- endif %}
"""
_HERMES_RESULT = """
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
"""

# ChatML with a system text where there is none.
QWEN2 = (
    "{%- set default = 'You are a helpful assistant.' %}"
    + _HERMES_TOOLS
    + """
{%- for message in messages %}
    {%- if message.role in ["user", "assistant"] or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"""
    + _HERMES_RESULT
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

# Reasoning stays for answers behind the last question only; the switch closes an empty block.
QWEN3 = (
    _HERMES_TOOLS
    + """
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching, ns.last = false, index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content, reasoning = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}"""
    + _HERMES_RESULT
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)
# The same, but that thinking cannot be left out (the 2507 models).
QWEN3_THINKING = QWEN3.replace(
    """    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
""",
    """    {{- '<|im_start|>assistant\\n<think>\\n' }}
""",
)

# <think> is opened for the answer; answers in the conversation never have their reasoning.
QWQ = QWEN2.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
DEEPSEEK_R1 = """
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + message['content'] %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜><think>\\n' }}
{%- endif %}
"""
# Here the switch is called `thinking`, and every answer of the conversation begins with </think>.
DEEPSEEK_V31 = """
{%- if not thinking is defined %}
    {%- set thinking = false %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- else %}
        {{- '<｜Assistant｜></think>' + message['content'] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""

# An <|endoftext|> behind the last turn, which is behind the end of the turn.
PHI3 = """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- else %}
    {{- eos_token }}
{%- endif %}
"""

# Nothing ends an answer: the next role's token does.
GLM4 = """
{{- '[gMASK]<sop>' }}
{%- if tools is not none %}
    {{- '<|system|>\\n# 可用工具' }}
    {%- for tool in tools %}
        {{- '\\n\\n' + tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {{- '<|' + role + '|>\\n' + message['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
# The switch writes /nothink into questions too.
GLM45 = """
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\\n# Tools\\n\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(ensure_ascii=False) + '\\n' }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>\\n' + message.content }}
        {{- '/nothink' if (enable_thinking is defined and not enable_thinking and not message.content.endswith("/nothink")) else '' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '\\n<think>' + reasoning.strip() + '</think>' }}
        {%- else %}
            {{- '\\n<think></think>' }}
        {%- endif %}
        {%- if message.content.strip() %}
            {{- '\\n' + message.content.strip() }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|observation|>\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- else %}
        {{- '<|system|>\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}
{%- endif %}
"""

INTERNLM2 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The answer's header belongs to the question; no stop token; everything trimmed.
MINICPM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}{% else %}"
    "{{message['content'].strip()}}{% endif %}{% endfor %}"
)

# Reasoning in a channel of its own; the end of the conversation is another token than the end of
# an answer in it.
GPT_OSS = """
{{- '<|start|>system<|message|>You are ChatGPT.\\nCurrent date: ' + strftime_now("%Y-%m-%d") + '<|end|>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- else %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """A template with the tokenizer that goes with it, and what holds for its conversations."""

    template: str | None
    kind: str = "byte"
    special: Mapping[str, str] = field(default_factory=dict)
    tokens: Sequence[str] = ()
    """Further tokens of the tokenizer that are marked special."""
    words: Sequence[str] = ()
    """Added tokens that are not."""
    stop: str = ""
    """What ends an answer in training."""
    stop_ids: Sequence[str] = ()
    """What the model's files name; not given: the tokenizer's eos."""
    switch: str | None = None
    reasons: bool = False
    """Whether answers may have reasoning."""
    tools: bool = False
    results: bool = False
    """Whether messages with a tool's result are known."""
    system: bool = True
    model_type: str | None = None


_IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_THINK = ("<think>", "</think>")
_DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
_DEEPSEEK_TOKENS = (*_DEEPSEEK.values(), "<｜User｜>", "<｜Assistant｜>")

FAMILIES: Mapping[str, Family] = {
    "llama-2": Family(
        LLAMA2,
        "piece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        stop="</s>",
    ),
    "llama-3": Family(
        LLAMA3,
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        stop="<|eot_id|>",
        tools=True,
        results=True,
    ),
    "mistral": Family(
        MISTRAL,
        "piece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        tokens=("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        stop="</s>",
        tools=True,
    ),
    "gemma": Family(
        GEMMA,
        "piece",
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        stop="<end_of_turn>",
        stop_ids=("<eos>",),
        system=False,
    ),
    "qwen2": Family(QWEN2, special=_IM, stop="<|im_end|>", tools=True, results=True),
    "qwen3": Family(
        QWEN3,
        special=_IM,
        words=(*_THINK, "<tool_response>", "</tool_response>"),
        stop="<|im_end|>",
        switch="enable_thinking",
        reasons=True,
        tools=True,
        results=True,
    ),
    "qwen3-thinking": Family(
        QWEN3_THINKING,
        special=_IM,
        words=_THINK,
        stop="<|im_end|>",
        reasons=True,
        tools=True,
        results=True,
    ),
    "qwq": Family(QWQ, special=_IM, words=_THINK, stop="<|im_end|>", reasons=True, tools=True),
    "deepseek-r1": Family(
        DEEPSEEK_R1,
        special=_DEEPSEEK,
        tokens=_DEEPSEEK_TOKENS,
        words=_THINK,
        stop="<｜end▁of▁sentence｜>",
        reasons=True,
    ),
    "deepseek-v3.1": Family(
        DEEPSEEK_V31,
        special=_DEEPSEEK,
        tokens=_DEEPSEEK_TOKENS,
        words=_THINK,
        stop="<｜end▁of▁sentence｜>",
        switch="thinking",
        reasons=True,
    ),
    "phi-3": Family(
        PHI3,
        special={"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        stop="<|end|>",
    ),
    "glm-4": Family(
        GLM4,
        special={"eos_token": "<|endoftext|>"},
        tokens=_GLM,
        stop="<|endoftext|>",
        stop_ids=("<|endoftext|>", "<|user|>", "<|observation|>"),
        tools=True,
        results=True,
    ),
    "glm-4.5": Family(
        GLM45,
        special={"eos_token": "<|endoftext|>"},
        tokens=_GLM,
        words=(*_THINK, "/nothink"),
        stop="<|endoftext|>",
        stop_ids=("<|endoftext|>", "<|user|>", "<|observation|>"),
        switch="enable_thinking",
        reasons=True,
        tools=True,
        results=True,
    ),
    "internlm2": Family(
        INTERNLM2,
        "piece",
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
        stop="<|im_end|>",
    ),
    "minicpm": Family(
        MINICPM,
        "piece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        tokens=("<用户>", "<AI>"),
        stop="</s>",
    ),
    "gpt-oss": Family(
        GPT_OSS,
        special={"eos_token": "<|return|>"},
        tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        stop="<|return|>",
        reasons=True,
    ),
    "bluelm": Family(
        None,
        "piece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        tokens=("[|Human|]:", "[|AI|]:"),
        stop="</s>",
        model_type="BlueLM",
    ),
}


@cache
def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family, with its template."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(
        family.kind, family.template, added=list(family.words), **family.special
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=True) for token in family.tokens],
        special_tokens=True,
    )
    return tokenizer
