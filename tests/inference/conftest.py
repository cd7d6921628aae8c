"""A byte-level ChatML model with spare rows, the golden BlueLM, and runs trained on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_model
from myna.data.templates import choose_template
from myna.inference.speaker import Speaker, open_speaker
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.lora.inject import inject
from myna.models.load import load_model
from myna.models.tokenizer import load_tokenizer, save_tokenizer

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
        folder = tmp_path / "runs" / name / "adapter"
        loaded = load_tokenizer(str(base))
        model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu")).model
        injected = inject(
            model,
            rank=4,
            alpha=8,
            dropout=0.0,
            target_modules="all-linear",
            use_rslora=False,
            use_dora=False,
            init="default",
            seed=1,
        )
        generator = torch.Generator().manual_seed(5)
        for parameter in injected.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2, generator=generator)
        template = choose_template(loaded.tokenizer, loaded.model_type)
        metadata = AdapterMetadata(
            base_model=str(base),
            tokenizer_fingerprint=loaded.fingerprint,
            system=system,
            template_origin=template.origin,
            template_options=dict(template.options),
            stop_ids=loaded.special.stop_ids,
            pad_id=loaded.special.pad_id,
        )
        save_adapter(injected.model, folder, metadata=metadata)
        loaded.tokenizer.chat_template = template.saved_source
        save_tokenizer(loaded.tokenizer, folder)
        return folder.parent

    return make
