"""A byte-level ChatML model with spare rows, the golden BlueLM, and runs trained on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_model
from myna.inference.speaker import Speaker, open_speaker

HUB_LIKE = Path(__file__).parents[1] / "golden" / "hub_like"
SPARE_ROWS = 8

MakeRun = Callable[..., Path]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """With a second stop token."""
    # Cleaning is on in some published tokenizers: it would change the text that was answered.
    return tiny_model.byte_level_tokenizer("<|stop|>", clean_up_tokenization_spaces=True)


def save_byte_level_model(folder: Path, **generation: Any) -> Path:
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(folder)
    # As publishers do, whatever the model's own class would refuse to write.
    settings = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0).to_dict() | generation
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level Llama: 128 positions, 8 rows that belong to no token."""
    return save_byte_level_model(tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def speaker(chatml: Path) -> Speaker:
    return open_speaker(str(chatml), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def bluelm() -> Speaker:
    return open_speaker(str(HUB_LIKE), device="cpu", dtype="float32")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run directory as training does, with an adapter that changes the model."""

    def make(base: Path, name: str = "run", *, system: str | None = None) -> Path:
        return tiny_model.save_tiny_run(base, tmp_path / "runs" / name, system=system)

    return make
