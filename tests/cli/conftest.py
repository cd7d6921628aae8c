"""A tiny chat model on disk (`benchmarks/tiny_model.py`), and rows for it."""

import json
from pathlib import Path

import pytest

from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"What is {number}?", "input": "", "output": f"It is {number * 7 % 10}!"}
        for number in range(24)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path
