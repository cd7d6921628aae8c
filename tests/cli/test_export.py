"""`myna export`: what goes with what, and what is printed."""

import io
from pathlib import Path

import gguf
import pytest
from rich.console import Console
from typer.testing import CliRunner

from myna.cli.export import run
from myna.cli.main import app
from myna.errors import ConfigError


def export(source: Path, out: Path, **options: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    settings: dict = {"to": "gguf", "kind": "f16", "adapter_only": False, "force_base": False}
    run(str(source), out, console=console, **settings | options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_printed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(tiny_model, Path("bird.gguf")) == (
        "21 tensors are written …\nThe model is in bird.gguf\n  llama-cli -m bird.gguf\n"
    )
    assert len(gguf.GGUFReader("bird.gguf").tensors) == 21
    text = export(tiny_model, Path("bird"), to="ollama", kind="q8_0")
    assert text.endswith(
        f"The model is in bird\n  ollama create {tiny_model.name} -f bird/Modelfile\n"
    )


def test_what_does_not_go_together(tiny_model: Path, tmp_path: Path) -> None:
    def told(out: Path, **options: object) -> str:
        with pytest.raises(ConfigError) as caught:
            export(tiny_model, out, **options)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert told(tmp_path / "bird") == (
        f"{tmp_path / 'bird'}: expected the name of a file that ends in .gguf.\n"
        f"  Use {tmp_path / 'bird.gguf'}, for example."
    )
    assert told(tmp_path).endswith(f"  Use {tmp_path / 'model.gguf'}, for example.")
    assert told(tmp_path / "bird", to="ollama", adapter_only=True) == (
        "--adapter-only with --to ollama: which model of Ollama's would be this base is not known "
        "here.\n  Use --to gguf, and name the file in an ADAPTER line of your Modelfile."
    )
    assert told(tmp_path / "bird.gguf", adapter_only=True).startswith(
        f"{tiny_model}: neither a run (no adapter/) nor an adapter"
    )


def test_the_commands_words(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["export", "x", str(tmp_path / "y"), "--to", "gguf"])
    assert isinstance(done.exception, ConfigError)
    assert "y: expected the name of a file that ends in .gguf.\n" in str(done.exception)
    done = runner.invoke(app, ["merge", "x", str(tmp_path / "y")])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("x: neither a run (no adapter/) nor an adapter")
