"""Tiny bases of several families and adapters for them, made by plain transformers and peft."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import tiny_model
from myna.models.load import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
SPARE = 5
"""Rows of the embedding without a token; transformers' own class of Qwen adds tokens."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]


def config_of(family: str, rows: int, **changes: Any) -> PreTrainedConfig:
    shape: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "gpt2":
        return GPT2Config(
            vocab_size=rows, n_positions=128, n_embd=48, n_layer=2, n_head=4,
            initializer_range=0.15, bos_token_id=None, eos_token_id=2,
        )  # fmt: skip
    if family == "mixtral":
        return MixtralConfig(**shape | {"num_local_experts": 2, "num_experts_per_tok": 1} | changes)
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    if family == "qwen3":
        return Qwen3Config(**shape | {"head_dim": 32} | changes)
    return kinds[family](**shape | changes)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """A chat model of a family in a folder: byte-level ChatML tokenizer, random weights."""

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        *,
        tokenizer: Any = None,
        **changes: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = tokenizer or tiny_model.byte_level_tokenizer()
        tokenizer.save_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = AutoModelForCausalLM.from_config(
                config_of(family, len(tokenizer) + SPARE, **changes)
            )
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                assert parameter.abs().max() > 0, name
        model.to(dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """An adapter for a base, as peft saves it; its update is as large as the weights."""

    def make(base: Path, *, size: float = 0.15, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
            | settings
        )
        loaded = load_model(str(base), dtype=torch.float32, device=torch.device("cpu")).model
        model = peft.get_peft_model(loaded, config)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.data.normal_(0, size, generator=generator)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def golden_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A golden checkpoint of BlueLM with a tokenizer beside it, where it has none of its own."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "base"
        shutil.copytree(GOLDEN / name, folder)
        if not (folder / "tokenizer.model").is_file():
            tiny_model.byte_level_tokenizer().save_pretrained(folder)
        return folder

    return copy


@pytest.fixture
def texts() -> list[list[int]]:
    """Token ids to compare two models on."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (9, 30)]
