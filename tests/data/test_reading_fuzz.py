"""Any bytes under any name: no exception but ours, no row that is not in the file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import NAMES, PIECES, check_reading, damage, valid_file

from myna.data.files import BadRow, Record, read_records

PROGRAM = Path(__file__).parents[1] / "fuzz" / "reading.py"
FORMS = [pytest.param(250, id="quick"), pytest.param(5_000, marks=pytest.mark.full, id="full")]


@pytest.mark.parametrize("examples", FORMS)
def test_any_bytes(tmp_path: Path, examples: int) -> None:
    pieces = st.one_of(
        st.binary(max_size=20), st.sampled_from([*PIECES, b'{"x": 1}\n', b'{"x": "'])
    )

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        st.sampled_from(NAMES), st.lists(pieces | st.binary(max_size=20), max_size=12).map(b"".join)
    )
    def check(name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        check_reading(path)

    check()


@pytest.mark.parametrize("examples", FORMS)
def test_damaged_files(tmp_path: Path, examples: int) -> None:
    accepted = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.sampled_from(NAMES), st.integers(0, 2**32), st.booleans())
    def check(name: str, seed: int, damaged: bool) -> None:
        nonlocal accepted
        generator = random.Random(seed)
        content = valid_file(generator, name)
        path = tmp_path / name
        path.write_bytes(damage(generator, content) if damaged else content)
        rows = check_reading(path)
        accepted += rows
        if not damaged and name != "a.txt":
            assert rows or name == "a.txt", content

    check()
    assert accepted > examples / 2, "most files are read to a part"


def test_a_damaged_list_gives_the_rows_before_its_fault(tmp_path: Path) -> None:
    rows = [{"x": number} for number in range(20)]
    text = json.dumps(rows)
    for at in range(1, len(text)):
        path = tmp_path / "a.json"
        path.write_text(text[:at] + "\x01" + text[at + 1 :])
        found = list(read_records([path]))
        good = [row for row in found if isinstance(row, Record)]
        assert [row.value for row in good] == rows[: len(good)]
        assert len(good) >= text[:at].count("}")
        assert isinstance(found[-1], BadRow)


@pytest.mark.full
def test_time_and_memory_of_ten_thousand_inputs_and_of_horrors() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--inputs", "10000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["slowest_seconds"] < 1
    assert found["peak_bytes"] < 512 << 20
    assert found["accepted"] > 2_000


@pytest.mark.full
def test_one_bad_row_in_a_million_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for number in range(1_000_000):
            bad = number == 876_543
            file.write(f'{{"instruction": "q{number}", "output": {"1e" if bad else "1"}}}\n')
    bad_rows, good = [], 0
    for row in read_records([path]):
        if isinstance(row, BadRow):
            bad_rows.append(row)
        else:
            good += 1
    assert good == 999_999
    (bad_row,) = bad_rows
    assert str(bad_row.fault).startswith("a.jsonl line 876544, column 39: broken JSON: found ")
