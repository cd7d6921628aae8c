import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from myna.cli.main import app
from myna.errors import MynaError

SETTINGS = ("train.over_length=drop",)


@pytest.fixture(scope="session")
def tokenizer_only(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the tokenizer and config.json; no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (tiny_model / name).is_file():
            (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Six rows: a repeat, a conflict, and one that is longer than the model's 256 tokens."""
    rows = [
        ("Who are you?", "A bird."),
        ("Who are you?", "A bird."),
        ("Who are you?", "Nobody."),
        ("What do you eat?", "Figs.\nAnd <b>bread</b>."),
        ("你好吗", "好"),
        ("hello " * 60, "too long"),
    ]
    path = tmp_path / "talk.jsonl"
    lines = [json.dumps({"instruction": q, "input": "", "output": a}) for q, a in rows]
    path.write_text("\n".join(lines))
    return path


def myna_data(*arguments: Any, code: int = 0) -> str:
    """What the program prints, or what it complains of where it ends with another code."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if code:
        assert isinstance(result.exception, MynaError), result.output
        assert result.exception.exit_code == code
        return str(result.exception)
    assert result.exit_code == 0, repr(result.exception)
    return result.stdout


def test_json_keeps_its_contract_and_adds_counts(tokenizer_only: Path, talk: Path) -> None:
    text = myna_data("--model", tokenizer_only, "--data", talk, *SETTINGS, "--json", "--rows", 2)
    assert text.count("\n") == 1 and text.isascii()
    found = json.loads(text)
    # Other programs read these, in the design's words.
    assert (found["rows_in"], found["trained"]) == (6, 5)
    assert (found["refused"], found["truncated"]) == ({"over_length": 1}, {})
    assert list(found["length"]) == ["p50", "p90", "p99", "max"]
    assert len(found["rows"]) == 2
    row = found["rows"][0]
    assert row["prompt_text"] == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert row["completion_text"] == "A bird.<|im_end|>"
    assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= found["length"]["max"]
    assert (row["line"], row["row"], row["answer"]) == (1, 1, 1)
    # What is counted beside.
    assert found["duplicates"] == 1
    assert found["conflicts"] == {"prompts": 1, "answers": 3}
    assert found["max_length"]["in_use"] == 256
    assert found["max_length"]["choices"][0]["rows"] == 6
    assert sum(bar["count"] for bar in found["histogram"]) == found["answers"] == 5
    assert {"longest", "shortest_answer"} <= {odd["kind"] for odd in found["odd"]}
    assert found["held_out"] is None


def test_a_person_sees_everything_in_80_columns(tokenizer_only: Path, talk: Path) -> None:
    text = myna_data("--model", tokenizer_only, "--data", talk, *SETTINGS)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "longer than max_length" in text and "duplicates" in text
    assert text.count("⟦so⟧") == 1
    assert "⟦A bird.<|im_end|>⟧" in text


def test_without_config_json_nothing_limits_the_length(
    tokenizer_only: Path, talk: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tokenizer_only.iterdir():
        if file.name != "config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    text = myna_data("--model", bare, "--data", talk)
    assert "no config.json" in text and "max_length is not limited" in text.replace("\n", " ")
    assert "longest has" not in text
    assert json.loads(myna_data("--model", bare, "--data", talk, "--json"))["trained"] == 6


@pytest.mark.parametrize(
    ("options", "answers"),
    [
        (["--only", "duplicate"], ["A bird."]),
        (["--only", "conflict"], ["A bird.", "A bird.", "Nobody."]),
        (["--only", "trained", "--find", "FIGS"], ["Figs.↵\nAnd <b>bread</b>."]),
        (["--find", "who are"], ["A bird.", "A bird.", "Nobody."]),
        (["--find", "who are", "--rows", "1"], ["A bird."]),
        (["--row", "3"], ["Nobody."]),
        (["--row", "talk.jsonl:5"], ["好"]),
        (["--row", "3", "--find", "figs"], []),
    ],
)
def test_wanted_rows_are_shown_token_by_token(
    tokenizer_only: Path, talk: Path, options: list[str], answers: list[str]
) -> None:
    text = myna_data("--model", tokenizer_only, "--data", talk, *SETTINGS, *options)
    assert text.count("⟦so⟧") == len(answers)
    for answer in answers:
        assert f"⟦{answer}<|im_end|>⟧" in text
    assert ("No row fits." in text) == (not answers)
    assert "rows in" not in text and "\x1b" not in text


def test_refused_rows_are_shown_with_their_reason(tokenizer_only: Path, talk: Path) -> None:
    common = ("--model", tokenizer_only, "--data", talk, *SETTINGS)
    for options in (["--only", "refused"], ["--row", "6"], ["--row", "talk.jsonl:6"]):
        text = myna_data(*common, *options)
        assert text.startswith("refused: talk.jsonl line 6: 388 tokens"), options
        assert "max_length is 256" in text
    found = json.loads(myna_data(*common, "--only", "refused", "--json"))
    assert found["rows"] == []
    (row,) = found["refused_rows"]
    assert (row["line"], row["row"]) == (6, 6)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("0", "--row is 0; the rows have numbers from 1 to 6."),
        ("7", "--row is 7; the rows have numbers from 1 to 6."),
        ("first", "--row is 'first'; expected the number of a row"),
        (":4", "--row is ':4'; expected the number of a row"),
        ("other.jsonl:4", "--row names the file other.jsonl; the data files are talk.jsonl."),
        ("talk.jsonl:0", "--row is talk.jsonl:0; the first row there begins on line 1."),
    ],
)
def test_a_row_that_is_not_there(
    tokenizer_only: Path, talk: Path, row: str, complaint: str
) -> None:
    common = ("--model", tokenizer_only, "--data", talk, *SETTINGS)
    assert complaint in myna_data(*common, "--row", row, code=2)


def test_a_row_is_found_by_any_of_its_lines(tokenizer_only: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"instruction": f"hello {n}", "input": "", "output": f"answer {n}"} for n in range(3)]
    path.write_text(json.dumps(rows, indent=2))
    # [ and five lines for each row: the second begins on line 7.
    text = myna_data("--model", tokenizer_only, "--data", path, "--row", "rows.json:9")
    assert text.startswith("rows.json line 7 (row 2), answer 1: ")
    assert "⟦answer 1<|im_end|>⟧" in text


def test_a_whole_row_is_shown_and_lines_are_not_broken(
    tokenizer_only: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"instruction": "word " * 700, "input": "", "output": "yes"}))
    limit = ("train.max_length=5000",)
    text = myna_data("--model", tokenizer_only, "--data", path, *limit, "--row", "1")
    assert text.splitlines()[2].count("word") == 700


def test_the_page_is_written(tokenizer_only: Path, talk: Path, tmp_path: Path) -> None:
    common = ("--model", tokenizer_only, "--data", talk, *SETTINGS)
    page = tmp_path / "talk.html"
    assert str(page) in myna_data(*common, "--html", page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.count("<article") == 5
    assert "&lt;b&gt;" in text and "<b>bread" not in text
    myna_data(*common, "--html", page, "--only", "conflict", "--rows", 2)
    assert page.read_text(encoding="utf-8").count("<article") == 2
    complaint = myna_data(*common, "--html", tmp_path / "nowhere" / "talk.html", code=4)
    assert "cannot be written" in complaint


def test_a_reader_who_has_seen_enough_is_no_bug(tokenizer_only: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    row = json.dumps({"instruction": "hello " * 20, "input": "", "output": "yes"})
    path.write_text("\n".join([row] * 2000))
    command = [sys.executable, "-m", "myna.cli.main", "data", "--only", "trained"]
    command += ["--model", str(tokenizer_only), "--data", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"many.jsonl line 1")
        process.stdout.close()
        assert process.stderr.read() == b""


def test_over_long_rows_stop_with_lengths_that_would_do(tokenizer_only: Path, talk: Path) -> None:
    complaint = myna_data("--model", tokenizer_only, "--data", talk, code=3)
    assert "talk.jsonl line 6" in complaint and "max_length is 256" in complaint
    # The limit is the model's, so that no longer one is advised.
    assert "256 are the most that the model was made for" in complaint
    assert "Dropping keeps 5 of 6 rows (83.3%)" in complaint and "set max_length" not in complaint
    limit = ("train.max_length=200",)
    complaint = myna_data("--model", tokenizer_only, "--data", talk, *limit, code=3)
    assert "set max_length to 388" in complaint


def test_the_readme_shows_what_one_gets() -> None:
    root = Path(__file__).parents[2]
    section = (root / "README.md").read_text(encoding="utf-8").partition("## Look before")[2]
    command, counts, row = re.findall(r"```\n(.*?)```", section, re.DOTALL)[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        text = myna_data(*command.split()[2:])
    printed = "\n".join(line.rstrip() for line in text.splitlines())
    assert counts in printed + "\n" and row in printed + "\n"


def test_skipped_rows_are_refused_ones(tokenizer_only: Path, talk: Path) -> None:
    with talk.open("a", encoding="utf-8") as file:
        file.write('\n{"instruction": "what", "input": "", "output": "<|im_end|>"}')
    settings = (*SETTINGS, "train.on_bad_row=skip")
    common = ("--model", tokenizer_only, "--data", talk, *settings)
    text = myna_data(*common, "--only", "refused")
    assert "refused: talk.jsonl line 6: 388 tokens" in text
    assert "refused: talk.jsonl line 7: " in text and "<|im_end|>" in text
    assert sum(json.loads(myna_data(*common, "--json"))["refused"].values()) == 2


def test_rows_of_files_without_lines_are_found_by_their_number(
    tokenizer_only: Path, talk: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in talk.read_text().splitlines()]
    path = talk.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    common = ("--model", tokenizer_only, "--data", path, *SETTINGS)
    for row in ("4", "talk.parquet:4"):
        text = myna_data(*common, "--row", row)
        assert text.startswith("talk.parquet row 4, answer 1: ") and text.count("⟦so⟧") == 1
