"""A tiny chat model on disk (`benchmarks/tiny_model.py`), and rows for it."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from myna.cli.train import run as train
from myna.config import Config, LoraConfig, TrainConfig
from myna.config_file import ResolvedConfig
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


@pytest.fixture(scope="session")
def _made_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    lines = [{"prompt": f"What is {n}?", "completion": f"It is {n}!"} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = Config(
        model=str(tiny_model),
        data=[str(folder / "rows.jsonl")],
        system="Answer like a bird.",
        output=str(folder / "bird"),
        dtype="float32",
        lora=LoraConfig(rank=4),
        train=TrainConfig(epochs=1, batch_size=4),
    )
    return train(ResolvedConfig(config, {}, None), console=Console(quiet=True)).directory.path


@pytest.fixture
def finished_run(_made_run: Path, tmp_path: Path) -> Path:
    """A run of three steps on the tiny model, whose folder is the test's own."""
    return Path(shutil.copytree(_made_run, tmp_path / "bird"))
