"""Preparation: what is seen meanwhile, and which tokenizers are the same."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from myna.cli.preparation import _rows_shown, _tokenizer_hash


def test_rows_are_shown_on_a_terminal_only() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        with _rows_shown(Console(file=stream, force_terminal=terminal, width=80)) as show:
            show(12_345)
        assert ("12,345 rows" in stream.getvalue()) is terminal
        assert ("rows/s" in stream.getvalue()) is terminal


def test_code_that_decides_ids_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    """A hash of the vocabulary alone would be that of another class, too."""

    def loaded(*, fast: bool) -> Any:
        tokenizer = SimpleNamespace(is_fast=fast)
        return SimpleNamespace(tokenizer=tokenizer, fingerprint="f" * 64, folder=tmp_path)

    (tmp_path / "tokenization.py").write_text("rule = 1")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert _tokenizer_hash(loaded(fast=True)) == "f" * 64
    first = _tokenizer_hash(loaded(fast=False))
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert _tokenizer_hash(loaded(fast=False)) == first
    (tmp_path / "tokenization.py").write_text("rule = 2")
    assert _tokenizer_hash(loaded(fast=False)) != first
