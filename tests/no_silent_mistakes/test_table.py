"""docs/no-silent-mistakes.md keeps its word: every defect has a row, every row's test exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "no-silent-mistakes.md"
DEFECTS = ROOT.parent / "shared" / "tutorials" / "DEFECTS.md"
NO_TOOL_CAN_PREVENT = {"stale_or_copied_outputs", "hardcoded_api_key"}
NAMED_ELSEWHERE = {"code_bug": "test_examples_load"}


def rows(path: Path) -> list[list[str]]:
    """Cells of all table rows but heads and rules; a cell may hold an escaped bar."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[1].isdigit()]


def names_of_tests(folder: Path) -> set[str]:
    return {
        node.name
        for path in folder.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_has_a_test_named_after_its_defect() -> None:
    here = names_of_tests(Path(__file__).parent)
    anywhere = names_of_tests(ROOT / "tests")
    listed = rows(TABLE)
    assert len({code for code, *_ in listed}) == len(listed) == 49
    for code, _, meaning, answer, test in listed:
        assert len(meaning) > 10 and len(answer) > 10, code
        if code in NO_TOOL_CAN_PREVENT:
            assert test == "none" and answer.startswith("not preventable: "), code
        elif code in NAMED_ELSEWHERE:
            assert test == f"`{NAMED_ELSEWHERE[code]}`" and test.strip("`") in anywhere
        else:
            assert test == f"`test_{code}`" and test.strip("`") in here, code


def test_every_test_named_after_a_defect_is_in_the_table() -> None:
    codes = {code for code, *_ in rows(TABLE)}
    about_the_table = {name for name in names_of_tests(Path(__file__).parent) if "table" in name}
    about_the_table |= {"test_every_row_has_a_test_named_after_its_defect"}
    about_the_table |= {"test_every_defect_of_the_collection_has_a_row_with_its_count"}
    others = {"test_markers_that_are_tokens_are_not_warned_of"}
    found = names_of_tests(Path(__file__).parent) - about_the_table - others
    assert {name.removeprefix("test_") for name in found} <= codes


def test_every_defect_of_the_collection_has_a_row_with_its_count() -> None:
    if not DEFECTS.exists():
        pytest.skip("../shared/tutorials is not beside the repository")
    expected = [(code, count) for code, count, _ in rows(DEFECTS)]
    assert [(code, count) for code, count, *_ in rows(TABLE)] == expected
