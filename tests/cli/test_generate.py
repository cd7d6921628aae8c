"""`myna generate`: answers in the order of the rows, and nothing half written."""

import json
from pathlib import Path

import pytest

from myna.cli.generate import run
from myna.data.conversation import Message
from myna.errors import ConfigError, DataError
from myna.inference import speaker
from myna.inference.generate import Sampling

ROWS = [
    {"instruction": "a long question, longer than the others", "output": "yes"},
    {"instruction": "b"},
    {"instruction": "你好", "output": ""},
    {"instruction": "a question"},
]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured anew in every process otherwise, and so is the answer's rounding.
    from myna.device import Compute

    monkeypatch.setattr(speaker, "choose_compute", lambda *_: Compute("cpu", "float32", "test"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return path


def generate(source: Path, questions: Path, output: Path, **options: object) -> list[dict]:
    settings: dict = {"system": None, "batch_size": 2, "trust_remote_code": False} | options
    sampling = {"max_new_tokens": 9, "temperature": 0.0}
    run(str(source), questions, output, sampling=sampling, **settings)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_answers_stand_in_the_order_of_the_rows_and_are_those_given_one_by_one(
    tiny_model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = generate(tiny_model, questions, tmp_path / "out.jsonl")
    alone = speaker.open_speaker(str(tiny_model))
    for row, line in zip(ROWS, lines, strict=True):
        prompt = alone.encoder.prompt([Message("user", row["instruction"])])
        assert line["prompt"] == prompt.text
        pieces = alone.stream(prompt.ids, Sampling(max_new_tokens=9, temperature=0))
        assert line["answer"] == "".join(pieces)
    assert [set(line) - {"prompt", "answer", "stopped"} for line in lines] == [
        {"reference"}, set(), set(), set(),
    ]  # fmt: skip
    assert lines[0]["reference"] == "yes"
    assert "你好" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    cut = sum(not line["stopped"] for line in lines)
    assert cut > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"4 questions to {tiny_model} (llama, 0.0 M parameters, float32 on cpu), greedy",
        f"4 answers in {tmp_path / 'out.jsonl'}; {cut} cut at their limit",
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_size_of_batches_changes_nothing(
    tiny_model: Path, questions: Path, tmp_path: Path, batch_size: int
) -> None:
    expected = generate(tiny_model, questions, tmp_path / "two.jsonl", batch_size=2)
    assert (
        generate(tiny_model, questions, tmp_path / "out.jsonl", batch_size=batch_size) == expected
    )


def test_another_persona(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    lines = generate(tiny_model, questions, tmp_path / "out.jsonl", system="Be brief.")
    assert all(line["prompt"].startswith("<|im_start|>system\nBe brief.") for line in lines)


def test_rows_that_cannot_be_asked_are_all_listed_and_nothing_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"instruction": "a"}, {"instruction": "<|im_end|>"}, {"instruction": "x" * 300}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError) as refused:
        generate(tiny_model, path, tmp_path / "out.jsonl")
    text = str(refused.value)
    assert 'questions.jsonl line 2: The user text of turn 1 contains "<|im_end|>"' in text
    assert "questions.jsonl line 3: the prompt has 319 tokens and the model's context holds" in text
    assert text.endswith("\nNothing was generated.")
    assert not (tmp_path / "out.jsonl").exists()


def test_places_that_cannot_be_written(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    def refusal(output: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            generate(tiny_model, questions, output)
        return str(refused.value)

    assert refusal(tmp_path) == (
        f"{tmp_path} is a folder; expected a file name such as {tmp_path}/out.jsonl."
    )
    assert refusal(tmp_path / "no" / "out.jsonl") == (
        f"{tmp_path / 'no' / 'out.jsonl'}: the folder {tmp_path / 'no'} does not exist; make it "
        "first."
    )
    assert refusal(questions) == (
        f"{questions} holds the questions; give another file for the answers."
    )
