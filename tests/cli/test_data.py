import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from myna.cli.data import show
from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import read_conversations
from myna.data.templates import choose_template
from myna.models.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"


def dataset(folder: Path) -> Dataset:
    path = folder / "rows.json"
    rows = [
        {"instruction": "你好", "input": "", "output": f"臣妾在{number}"} for number in range(3)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = load_tokenizer(str(GOLDEN)).tokenizer
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, "BlueLM"), stop_ids=[tokenizer.eos_token_id]
    )
    return encode_dataset(encoder, read_conversations([path]))


def output(data: Dataset, **options: Any) -> str:
    stream = io.StringIO()
    show(data, console=Console(file=stream, width=80), **options)
    return stream.getvalue()


def test_json_is_one_line_and_nothing_else(tmp_path: Path) -> None:
    text = output(dataset(tmp_path), as_json=True, rows=2)
    assert text.count("\n") == 1 and text.isascii()
    found = json.loads(text)
    assert found["rows_in"] == found["trained"] == 3
    assert [row["completion_text"] for row in found["rows"]] == ["臣妾在0</s>", "臣妾在1</s>"]
    assert found["rows"][0]["prompt_ids"] == [1, 4000, 516, 4001]
    assert "rows" not in json.loads(output(dataset(tmp_path), as_json=True, rows=None))


def test_a_person_sees_one_example_unless_more_are_asked_for(tmp_path: Path) -> None:
    text = output(dataset(tmp_path), as_json=False, rows=None)
    assert text.count("⟦so⟧") == 1
    assert "<s>[|Human|]:你好[|AI|]:⟦臣妾在0</s>⟧" in text
    assert output(dataset(tmp_path), as_json=False, rows=3).count("⟦so⟧") == 3
