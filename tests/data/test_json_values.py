"""What is refused in a row beyond the grammar, against the json module."""

import json
from pathlib import Path

import pytest

from myna.data.files import BadRow, Record
from myna.data.json_values import MAX_DEPTH, Passage, parse_row


def parse(text: str) -> Record | BadRow:
    outcome, _ = parse_row(Passage(Path("a.jsonl"), text, 1, 1, "line"), 0, 1, 1)
    return outcome


def column(text: str) -> int | None:
    outcome = parse(text)
    assert isinstance(outcome, BadRow)
    return outcome.fault.column


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": {"b": 1, "c": 2, "b": 3}}', '"b": 3'),
        ('{"a": 1, "\\u0061": 2}', '"\\u0061"'),
        ('{"a": {"b": 1}, "c": {"b": 1}, "a": 1}', '"a": 1}'),
        ('{"a": "\\"a\\": NaN", "b": NaN}', "NaN}"),
        ('{"a": [1, 2, -Infinity]}', "-Infinity"),
        ('{"a": -1e400}', "-1e400"),
        ('{"a": [true, -Infinityx', "-Infinityx"),
        ('{"a": "\\\\ud800", "b": "x\\udc00"}', "\\udc00"),
        ('{"a": "\\ud83d\\ude00 \\ud83d "}', "\\ud83d "),
        ('{"a": "\\ud83d\\ud83d\\ude00"}', "\\ud83d\\ud83d"),
        ('{"\\udead": 1}', "\\udead"),
        ('{"a": -' + "1" * 4301 + "}", "-1111"),
    ],
)
def test_the_column_is_that_of_the_finding(text: str, where: str) -> None:
    assert column(text) == text.index(where) + 1


def test_depth_has_one_limit_wherever_it_is_called_from() -> None:
    def nested(depth: int, open_: str, close: str) -> str:
        return '{"x": ' + open_ * (depth - 1) + close * (depth - 1) + "}"

    def deeper(frames: int, text: str) -> Record | BadRow:
        return parse(text) if not frames else deeper(frames - 1, text)

    for frames in (0, 400):
        assert isinstance(deeper(frames, nested(MAX_DEPTH, "[", "]")), Record)
        bad = deeper(frames, nested(MAX_DEPTH + 1, "[", "]"))
        assert isinstance(bad, BadRow) and bad.fault.reason == "depth"
        bad = deeper(frames, nested(100_000, "[", "]"))
        assert isinstance(bad, BadRow) and bad.fault.reason == "depth"
    # Many brackets beside each other, and those within texts, are no depth.
    assert isinstance(parse('{"x": [' + "[]," * 500 + "0]}"), Record)
    assert isinstance(parse(json.dumps({"x": "[" * 500 + '\\"{' * 500})), Record)


def test_many_keys_are_compared_in_one_pass() -> None:
    keys = ", ".join(f'"{number}": 0' for number in range(100_000))
    assert column("{" + keys + ', "77": 1}') == len("{" + keys + ", ") + 1


def test_what_is_accepted_is_what_json_reads() -> None:
    text = '{"a": "\\ud83d\\ude00\\u0000é", "b": [1, -0.5e-3, true, null, {}], "": {"a": ""}}'
    outcome = parse(text)
    assert isinstance(outcome, Record) and outcome.value == json.loads(text)
