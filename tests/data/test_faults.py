from pathlib import Path

import pytest

from myna.data.conversation import Place
from myna.data.faults import Fault, Faults, raise_faults
from myna.errors import DataError

ROLE = (
    'messages[2].role is "asistant"; expected system, user, assistant or tool.',
    'Did you mean "assistant"?',
)


def fault(line: int, kind: str = "role", name: str = "train.jsonl") -> Fault:
    return Fault(kind, Place(Path(name), line, line), *ROLE)


def text(faults: list[Fault]) -> str:
    with pytest.raises(DataError) as error:
        raise_faults(faults)
    return str(error.value)


def test_no_faults_no_error() -> None:
    raise_faults([])


def test_one_fault_in_three_rows() -> None:
    assert text([fault(418), fault(902), fault(1377)]) == (
        'train.jsonl line 418: messages[2].role is "asistant"; expected system, user, assistant or '
        'tool.\n  Did you mean "assistant"?  3 rows have this fault: lines 418, 902, 1377. '
        "Training "
        "has not started."
    )


def test_different_faults_are_all_listed() -> None:
    message = text([fault(1, "a"), fault(2, "b"), fault(3, "a")])
    assert message.count("Did you mean") == 2
    assert "2 rows have this fault: lines 1, 3." in message
    assert message.endswith("\nTraining has not started.")


def test_rows_of_several_files_are_named_with_their_file() -> None:
    message = text([fault(1), fault(2, name="more.jsonl")])
    assert "2 rows have this fault: train.jsonl line 1, more.jsonl line 2." in message


def test_beyond_a_screenful_faults_and_lines_are_counted() -> None:
    message = text([fault(line, str(line)) for line in range(1, 31)])
    assert message.count("Did you mean") == 20
    assert message.endswith("\nand 10 more rows with other faults.\nTraining has not started.")
    message = text([fault(line) for line in range(1, 31)])
    assert "30 rows have this fault: lines 1, 2," in message
    assert " 20 and 10 more. Training has not started." in message


def test_rows_without_lines_are_named_by_number() -> None:
    faults = [Fault("a", Place(Path("a.parquet"), 0, row), "found") for row in (3, 5)]
    assert text(faults) == (
        "a.parquet row 3: found\n  2 rows have this fault: rows 3, 5. Training has not started."
    )


def test_skipped_rows_are_counted_by_reason_and_said() -> None:
    faults = Faults("skip")
    for line in range(1, 1_001):
        faults.add(fault(line, f"role:{line % 3}"))
    faults.add(fault(7, "json"))
    faults.raise_listed()
    assert faults.skipped == {"role": 1_000, "json": 1}
    assert list(faults.notes()) == [
        "1,000 bad rows skipped (role), the first: train.jsonl line 1: messages[2].role is "
        '"asistant"; expected system, user, assistant or tool. Did you mean "assistant"?',
        "1 bad row skipped (json), the first: train.jsonl line 7: messages[2].role is "
        '"asistant"; expected system, user, assistant or tool. Did you mean "assistant"?',
    ]


def test_a_fault_that_hides_the_rows_behind_it_is_never_skipped() -> None:
    faults = Faults("skip")
    faults.add(fault(1))
    faults.add(Fault("json", Place(Path("a.json"), 4, 2), "broken.", "Mend it.", 3, ends_file=True))
    with pytest.raises(DataError) as error:
        faults.raise_listed()
    assert str(error.value) == (
        "a.json line 4, column 3: broken.\n  Mend it.  on_bad_row: skip does not help: where the "
        "next row begins cannot be told. Training has not started."
    )


def test_a_screenful_is_kept_of_a_million() -> None:
    faults = Faults()
    for line in range(1, 100_001):
        faults.add(fault(line, f"{line % 50}"))
    with pytest.raises(DataError) as error:
        faults.raise_listed()
    assert "2,000 rows have this fault: lines 1, 51, 101," in str(error.value)
    assert str(error.value).endswith(
        "\nand 60,000 more rows with other faults.\nTraining has not started."
    )
    held = sum(len(group.listed) for group in faults._stopping.values())
    assert held <= 20 * 50


def test_a_million_kinds_are_not_held() -> None:
    faults = Faults()
    for line in range(1, 10_001):
        faults.add(fault(line, f"keys:{line}"))
    with pytest.raises(DataError) as error:
        faults.raise_listed()
    assert "\nand 9,980 more rows with other faults.\n" in str(error.value)
    assert sum(len(group.listed) for group in faults._stopping.values()) <= 1_020
