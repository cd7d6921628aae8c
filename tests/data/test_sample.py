"""sample.json: the tokens of a run's first rows, as they went into training."""

import json
from pathlib import Path

import pytest
from chat_families import CHATML, make_tokenizer, talk

from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.sample import SAMPLE_ROWS, read_sample, write_sample
from myna.data.templates import choose_template
from myna.errors import StorageError


@pytest.fixture
def data() -> Dataset:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    conversations = [
        talk(("user", f"hello {line}"), ("assistant", "yes, 你好\nno"), line=line)
        for line in range(1, 6)
    ]
    return encode_dataset(encoder, Rows(tuple(conversations), (), "hash"))


def test_the_first_rows_come_back_token_by_token(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    write_sample(path, data.examples, data.tokenizer)
    rows = read_sample(path)
    assert len(rows) == SAMPLE_ROWS < len(data.examples)
    for row, example in zip(rows, data.examples, strict=False):
        assert "".join(row.context) == example.prompt_text
        assert "".join(row.trained) == example.completion_text
        assert row.context_tokens == len(example.prompt_ids) >= len(row.context)
        assert row.trained_tokens == len(example.completion_ids) >= len(row.trained) > 1
        assert row.place.endswith(f"line {example.place.line}") and row.answer == 1
    assert path.read_bytes().isascii()


def test_fewer_rows_are_no_fault(data: Dataset, tmp_path: Path) -> None:
    write_sample(tmp_path / "sample.json", data.examples[:1], data.tokenizer)
    assert len(read_sample(tmp_path / "sample.json")) == 1


@pytest.mark.parametrize(
    "content", ["", "3", "[3]", '[{"place": "here"}]', "[]x", '{"place": "here"}']
)
def test_what_is_no_sample_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sample.json"
    path.write_text(content)
    with pytest.raises(StorageError, match=r"sample\.json: is no sample of trained rows: "):
        read_sample(path)


def test_a_field_of_a_wrong_type_is_refused(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    write_sample(path, data.examples, data.tokenizer)
    rows = json.loads(path.read_text())
    rows[1]["trained"][0] = 7
    path.write_text(json.dumps(rows))
    with pytest.raises(StorageError, match="a field is of a wrong type"):
        read_sample(path)
