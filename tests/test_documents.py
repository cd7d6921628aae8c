"""Documents keep their word: commands exist, examples load, named files are there."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from myna.cli.main import app
from myna.config_file import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [ROOT / "benchmarks" / "README.md", ROOT / "docs" / "no-silent-mistakes.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def mentioned_commands(text: str) -> set[str]:
    return set(re.findall(r"(?:^|`|\s\s)myna ([a-z]+)(?![a-z-])", text, re.MULTILINE))


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=lambda path: path.name)
def test_every_command_a_document_names_exists(path: Path) -> None:
    assert mentioned_commands(path.read_text(encoding="utf-8")) <= set(COMMANDS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_a_document_shows_exists(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s*(?:\$ )?myna ([a-z]+) (.*)", line):
            known = {name for parameter in COMMANDS[match[1]].params for name in parameter.opts}
            assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", match[2])) <= known | {"--help"}, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_a_document_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:src|tests|examples|benchmarks|tools|docs|data|models|cli)/[\w./*-]+)`", text
    )
    named += re.findall(r"\]\(([\w./-]+)\)", text)
    for name in named:
        places = [ROOT / name, ROOT / "src" / "myna" / name]
        assert any(place.exists() or list(place.parent.glob(place.name)) for place in places), name


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:^\s*|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert named <= targets


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and f"myna train examples/{path.name}" in text
    load_config(path)


def test_the_reference_job_has_the_tutorials_settings() -> None:
    config = load_config(ROOT / "examples" / "bluelm_zhenhuan.yaml").config
    assert (config.lora.rank, config.lora.resolved_alpha, config.lora.dropout) == (8, 32, 0.1)
    train = config.train
    assert (train.batch_size, train.micro_batch_size, train.epochs) == (16, 8, 3)
    assert (train.learning_rate, train.schedule, train.warmup_ratio) == (1e-4, "linear", 0)
    assert (train.max_length, train.save_steps, train.logging_steps) == (384, 100, 10)
    assert train.checkpointing == "all" and train.save_on_each_node
