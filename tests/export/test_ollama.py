"""The folder for Ollama: what its Modelfile says, and what it cannot."""

import json
import re
from pathlib import Path

import gguf
import pytest

import tiny_model
from myna.demo.score import base_folder
from myna.errors import ConfigError
from myna.export.go_template import cut_out, to_go
from myna.export.ollama import export_ollama
from myna.export.origin import open_origin
from myna.lora.adapter_file import AdapterMetadata


def export(source: Path | str, out: Path) -> tuple[str, gguf.GGUFReader, list[str]]:
    said: list[str] = []
    export_ollama(open_origin(str(source), needs_adapter=False), out, "q8_0", say=said.append)
    return (out / "Modelfile").read_text(), gguf.GGUFReader(out / "model.gguf"), said


def quoted(text: str, word: str) -> str:
    (found,) = re.findall(rf'^{word} """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    return str(found)


def with_persona(adapter: Path, system: str, **more: object) -> Path:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    metadata = AdapterMetadata(base_model=base, system=system, **more)  # type: ignore[arg-type]
    (adapter / "myna.json").write_text(metadata.model_dump_json())
    return adapter


def test_persona_stops_context_and_sampling(make_base, make_adapter, tmp_path) -> None:
    base = make_base()
    settings = {"eos_token_id": [2, 1], "do_sample": True, "temperature": 0.7, "top_k": 20}
    (base / "generation_config.json").write_text(json.dumps(settings))
    adapter = with_persona(make_adapter(base), "You are a bird.\nSing.", stop_ids=(2,))
    text, _, _ = export(adapter, tmp_path / "bird")
    assert {path.name for path in (tmp_path / "bird").iterdir()} == {"Modelfile", "model.gguf"}
    assert "\nFROM ./model.gguf\n" in text
    assert quoted(text, "SYSTEM") == "You are a bird.\nSing."
    parameters = re.findall(r"^PARAMETER (.*)$", text, re.MULTILINE)
    assert parameters == [
        'stop "<|im_end|>"', 'stop "<|im_start|>"', "num_ctx 256", "repeat_penalty 1",
        "temperature 0.7", "top_p 1", "top_k 20",
    ]  # fmt: skip
    origin = open_origin(str(adapter), needs_adapter=True)
    assert quoted(text, "TEMPLATE") == to_go(cut_out(origin.encoder.template))
    assert not list(tmp_path.glob(".*"))


def test_the_embedded_model(tmp_path) -> None:
    """Prompts begin with a BOS, which Ollama writes by itself where the GGUF says so."""
    text, reader, said = export(base_folder(), tmp_path / "demo")
    template = quoted(text, "TEMPLATE")
    assert "[|Human|]:" in template and "<s>" not in template
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True  # type: ignore[union-attr]
    assert "SYSTEM" not in text
    assert 'PARAMETER stop "</s>"\nPARAMETER num_ctx 1024\n' in text
    assert "PARAMETER temperature 0\n" in text
    assert said[0].startswith("BlueLM was written as Llama")


@pytest.mark.parametrize("persona", ['"Sing!"', 'Say """this""".'])
def test_a_persona_that_cannot_be_quoted(make_base, make_adapter, tmp_path, persona) -> None:
    adapter = with_persona(make_adapter(make_base()), persona)
    with pytest.raises(ConfigError) as caught:
        export(adapter, tmp_path / "out")
    assert str(caught.value) == (
        "The Modelfile cannot hold the persona: three quotes in a row, or one at its edge, would "
        "end it early.\n  Use --to gguf, or another text."
    )
    assert not list(tmp_path.iterdir())


def test_a_stop_token_that_cannot_be_quoted(make_base, tmp_path) -> None:
    base = make_base(tokenizer=tiny_model.byte_level_tokenizer('<"stop">'))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    with pytest.raises(ConfigError) as caught:
        export(base, tmp_path / "out")
    assert str(caught.value) == (
        """The Modelfile cannot hold the stop token '<"stop">': it has a quote or a line break.\n"""
        "  Use --to gguf, which holds its id."
    )
