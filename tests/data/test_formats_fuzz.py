"""Rows of any JSON under known names: read or refused with words, never an exception of ours."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import ROLES, Place
from myna.data.dialogues import ROLE_SPELLINGS
from myna.data.fields import Unfit
from myna.data.files import Record
from myna.data.formats import FORMATS, convert, recognise
from myna.errors import ConfigError, DataError

PLACE = Place(Path("rows.jsonl"), 1, 1)
COLUMNS = sorted({name for form in FORMATS for name in form.used} | {"label", "images", "Prompt"})
KEYS = ["role", "content", "from", "value", "tool_calls", "function_call", "name", "arguments"]
KEYS += ["function", "type", "text", "id", "train", "weight", "loss", "reasoning", "input"]
KEYS += ["output", "system", "images", "tool_call_id", "parameters", "human", "assistant"]

SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-2, 10**25)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(sorted(ROLE_SPELLINGS))
    | st.sampled_from(["text", '[{"role": "user", "content": "q"}]', '{"name": "f"}', "[]", "{"])
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLE_SPELLINGS)), "content": st.text(max_size=3) | VALUE},
    optional={key: VALUE for key in KEYS if key not in ("role", "content", "from", "value")},
)
ENTRIES = st.lists(ENTRY | VALUE, max_size=4)
ROW = st.dictionaries(st.sampled_from(COLUMNS), ENTRIES | VALUE, min_size=1, max_size=5)
NAMES = st.none() | st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "chosen", "text", "role", "user_tag"]),
    st.sampled_from(COLUMNS),
    max_size=3,
)


def check(row: dict[str, Any], columns: dict[str, str] | None) -> None:
    try:
        parsed = convert(row, recognise([Record(row, PLACE)], columns))
    except (Unfit, DataError, ConfigError) as error:
        assert str(error)
        return
    if parsed.text is not None:
        assert parsed.text.strip() and not parsed.messages
        return
    assert any(message.role == "assistant" for message in parsed.messages)
    for message in parsed.messages:
        assert message.role in ROLES and isinstance(message.content, str)
        assert 0 < message.weight < float("inf")
        assert not message.tool_calls or message.role == "assistant"
        assert message.content.strip() or message.role != "user"
    assert parsed.messages[-1].role == "assistant"
    assert len(set(parsed.remarks)) <= 30


@settings(max_examples=200, deadline=None)
@given(ROW, NAMES)
def test_any_row(row: dict[str, Any], columns: dict[str, str] | None) -> None:
    check(row, columns)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(ROW, NAMES)
def test_ten_thousand_rows(row: dict[str, Any], columns: dict[str, str] | None) -> None:
    check(row, columns)
