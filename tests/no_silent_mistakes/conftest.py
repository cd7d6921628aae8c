"""Tiny checkpoints of the tutorials' families, and the commands as a person runs them."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from tutorial_families import FAMILIES, SHIPPED

from myna.cli.main import main
from myna.lora.inject import inject

Rows = list[dict[str, Any]]
Checkpoint = Callable[[str], Path]


def save_checkpoint(folder: Path, family_name: str, *, template: bool = True) -> Path:
    """A Llama of two layers with a family's control tokens, template and stop ids."""
    family = FAMILIES[family_name]
    tokenizer = family.tokenizer()
    stops = list(family.stop_ids(tokenizer))
    ships_template = template and family.template.parent == SHIPPED
    if not ships_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops[0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(folder)
    settings = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    settings.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Model folder of a family; a template is in it where the hub's tokenizers ship one."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = save_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return find


@dataclass(frozen=True)
class Said:
    """How a command ended and what a person read."""

    code: int
    out: str
    errors: str

    @property
    def text(self) -> str:
        """All of it, with lines that the terminal wrapped put together."""
        return " ".join((self.out + " " + self.errors).split())


@dataclass(frozen=True)
class Terminal:
    """A working directory and a prompt."""

    folder: Path
    run: Callable[..., Said]

    def write(self, rows: Rows, name: str = "rows.jsonl") -> Path:
        """A data file."""
        path = self.folder / name
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def job(self, model: Path, rows: Rows, **settings: Any) -> str:
        """A YAML for `rows`; settings by their dotted names with __ for the dot."""
        values = {"model": str(model), "data": self.write(rows).name, "dtype": "float32"}
        given = {name.replace("__", "."): value for name, value in settings.items()}
        nested: dict[str, Any] = {"train": {"batch_size": 4, "max_steps": 2}, "lora": {"rank": 4}}
        for name, value in given.items():
            section, _, leaf = name.rpartition(".")
            (nested.setdefault(section, {}) if section else values)[leaf] = value
        (self.folder / "job.yaml").write_text(json.dumps(nested | values, ensure_ascii=False))
        return "job.yaml"

    def shown(self, *arguments: str) -> dict[str, Any]:
        """The object that `myna data --json` prints."""
        said = self.run("data", *arguments, "--json", "--rows", "100")
        assert said.code == 0, said.text
        shown: dict[str, Any] = json.loads(said.out)
        return shown

    def trained(self, model: Path, rows: Rows, *overrides: str, **settings: Any) -> Rows:
        """The rows that `myna data` says would be trained."""
        listed: Rows = self.shown(self.job(model, rows, **settings), *overrides)["rows"]
        return listed


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["myna", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, errors = capsys.readouterr()
        assert "this is a bug in myna" not in errors, errors
        return Said(code, out, errors)

    return Terminal(tmp_path, run)


def adapted(model: PreTrainedModel) -> PeftModel:
    """`model` with a new adapter on all linear layers."""
    return inject(
        model,
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules="all-linear",
        use_rslora=False,
        use_dora=False,
        init="default",
        seed=1,
    ).model


def ask(question: str, answer: str = "Paris.", **more: Any) -> dict[str, Any]:
    """A row."""
    return {"instruction": question, "output": answer, **more}


SOME = [ask(f"What is {number}?", f"It is {number * 7 % 10}!") for number in range(8)]
"""Rows enough for a few steps."""
