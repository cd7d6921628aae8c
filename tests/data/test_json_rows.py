"""Where rows begin and end, in files that are larger than what is held of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from myna.data.files import BadRow, Record, read_records
from myna.errors import DataError

Write = Callable[[str, str | bytes], Path]


def expected_places(text: str, rows: int) -> list[tuple[int, int]]:
    """(line, row) of each row of a JSON list, by parsing it whole."""
    decoder, position, places = json.JSONDecoder(), text.index("[") + 1, []
    line, counted = 1, 0
    for row in range(1, rows + 1):
        while text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        places.append((line, row))
        _, position = decoder.raw_decode(text, position)
    return places


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n ", " : ")])
def test_a_list_larger_than_its_window_is_read_as_json_reads_it(
    write: Write, indent: int | None, separators: tuple[str, str]
) -> None:
    rows = [
        {"x": number, "text": 'a "b" \\ é 😀 [{,}] ' * (number % 97), "list": [[], {}, -1.5e3]}
        for number in range(1_500)
    ]
    text = json.dumps(rows, indent=indent, separators=separators, ensure_ascii=False)
    assert len(text.encode()) > 1 << 20
    found = list(read_records([write("a.json", f"\n {text}\n\n")]))
    assert [row.value for row in found if isinstance(row, Record)] == rows
    places = [(row.place.line, row.place.row) for row in found if isinstance(row, Record)]
    assert places == expected_places(f"\n {text}", len(rows))


@pytest.mark.parametrize("size", [(1 << 20) - 3, (1 << 20) - 2, (1 << 20) - 1, 1 << 20])
@pytest.mark.parametrize(
    "tail", ['"é"', "-12345", "1.5e10", "true", "null", "[]", '{"a":"\\u00e9"}']
)
def test_a_value_across_the_edge_of_a_block_is_whole(write: Write, size: int, tail: str) -> None:
    head = '[{"x": "", "y": '
    row = {"x": "a" * (size - len(head)), "y": json.loads(tail)}
    text = json.dumps([row, {"z": 1}], ensure_ascii=False)
    found = list(read_records([write("a.json", text)]))
    assert [row.value for row in found if isinstance(row, Record)] == [row, {"z": 1}]
    # A bare value, which has no closing sign, is refused as a whole.
    bare = json.dumps([{"x": "a" * (size - 13)}])[:-1] + f", {tail}, " + '{"z": 1}]'
    found = list(read_records([write("b.json", bare)]))
    assert [isinstance(row, Record) for row in found] == [True, tail[0] == "{", True]


@pytest.mark.parametrize(
    ("rows", "broken", "text"),
    [
        (3_000, '{"x": 1 "y": 2}', 'found "\\"y\\": 2}, {\\"x"; expected a comma or the closing'),
        (3_000, '{"x": NaN}', "NaN is not JSON."),
        (3_000, '{"x": 1}, ]', 'found "], {\\"x\\": 1}]"; expected another row after'),
        (3_000, '{"x": 1}}', 'found "}, {\\"x\\": 1}]"; expected a comma or the closing bracket.'),
    ],
)
def test_columns_count_from_the_beginning_of_the_line_in_the_file(
    write: Write, rows: int, broken: str, text: str
) -> None:
    good = ", ".join('{"x": "' + "a" * 1_000 + '"}' for _ in range(rows))
    path = write("a.json", f'[{good}, {broken}, {{"x": 1}}]')
    found = [row for row in read_records([path]) if isinstance(row, BadRow)]
    assert len(found) == 1
    fault = found[0].fault
    content = path.read_text()
    start = content.index(broken)
    inside = {"NaN": broken.find("NaN"), "]": broken.find("]"), "}}": broken.find("}}") + 1}
    offset = next((at for sign, at in inside.items() if sign in broken), broken.find('"y"'))
    assert (fault.place.line, fault.column) == (1, start + offset + 1)
    assert text in fault.finding


def test_a_fault_that_hides_the_rows_behind_it_says_so(write: Write) -> None:
    for name, text, ends in (
        ("a.json", '[{"x": 1}, {"x": }, {"x": 3}]', True),
        ("b.json", '[{"x": 1} {"x": 3}]', True),
        ("c.json", '[{"x": 1}, {"x": NaN}, {"x": 3}]', False),
        ("d.jsonl", '{"x": 1}\n{"x": }\n{"x": 3}', False),
        ("e.json", '[{"x": 1}, {"x": ' + "[" * 500 + "]" * 500 + '}, {"x": 3}]', False),
        ("f.json", '[{"x": 1}, {"x": ' + "9" * 5_000 + '}, {"x": 3}]', False),
    ):
        rows = list(read_records([write(name, text)]))
        (bad,) = [row.fault for row in rows if isinstance(row, BadRow)]
        assert bad.ends_file == ends, name
        assert bad.place.row == 2
        assert len(rows) == (2 if ends else 3), name


def test_a_list_that_is_cut_off(write: Write) -> None:
    text = json.dumps([{"x": "a" * 10, "y": [1, 2]}] * 3, indent=1)
    for size in range(2, len(text)):
        rows = list(read_records([write("a.json", text[:size])]))
        assert isinstance(rows[-1], BadRow), text[:size]
        assert rows[-1].fault.ends_file
        assert "Was the file cut off?" in str(rows[-1].fault), text[:size]
        assert all(isinstance(row, Record) for row in rows[:-1])


def test_objects_over_several_lines_each(write: Write) -> None:
    text = "\n".join(json.dumps({"x": number}, indent=1) for number in range(3))
    (row,) = read_records([write("a.jsonl", text)])
    assert isinstance(row, BadRow)
    assert row.fault.mend.endswith(
        "The rows stand on several lines each; expected a list of rows in [ ] or one row a line, "
        "as `jq -c . OLD > NEW` writes them."
    )


def test_white_space_without_end_is_not_held(write: Write) -> None:
    path = write("a.json", '[{"x": 1},\n' + " " * (20 << 20) + '{"x": 2}]')
    with pytest.raises(DataError) as error:
        list(read_records([path]))
    assert str(error.value) == (
        "a.json line 1: more than 8 MiB of white space begin here; expected a row.\n"
        "  Was the file damaged? Training has not started."
    )


def test_an_empty_list_has_no_rows(write: Write) -> None:
    assert list(read_records([write("a.json", " [ \n ] \n")])) == []
