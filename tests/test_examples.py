"""Examples replace the tutorials: one screen each, the tutorial's values or a comment why not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from myna.config import Config
from myna.config_file import load_config
from myna.data.templates import BUILT_IN
from myna.lora.inject import inject

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.yaml"))}
RECIPES: dict[str, dict[str, Any]] = {
    recipe["name"]: recipe
    for recipe in json.loads(
        (Path(__file__).parent / "data" / "tutorial_recipes.json").read_text(encoding="utf-8")
    )
}
SCREEN = 40
"""Lines of a terminal."""

REPLACES = re.compile(r"^# Replaces: (\S+)((?: \S+=\S*)*)$", re.MULTILINE)
REPLACED = [
    (name, match[1], match[2].split())
    for name, path in EXAMPLES.items()
    for match in REPLACES.finditer(path.read_text(encoding="utf-8"))
]
"""(example, recipe, settings that make the one the other)."""

OTHER_METHODS = {
    "full": "full training",
    "p-tuning": "p-tuning",
    "qlora-4bit": "4-bit",
    "lora-8bit": "8-bit",
}
"""What the header of an example has to say where the tutorial trains no LoRA on a whole base."""


def test_every_recipe_is_replaced_once() -> None:
    assert len(RECIPES) == 39
    assert sorted(recipe for _, recipe, _ in REPLACED) == sorted(RECIPES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_one_screen(name: str) -> None:
    assert len(EXAMPLES[name].read_text(encoding="utf-8").splitlines()) <= SCREEN


def settings_of(config: Config) -> dict[str, Any]:
    """The values that recipes have too, by their names in the YAML."""
    return {
        "model": config.model,
        "system": config.system,
        "rank": config.lora.rank,
        "alpha": config.lora.resolved_alpha,
        "dropout": config.lora.dropout,
        "target_modules": config.lora.target_modules,
        "learning_rate": config.train.learning_rate,
        "batch_size": config.train.batch_size,
        "epochs": config.train.epochs,
        "max_length": config.train.max_length,
        "save_steps": config.train.save_steps,
    }


def values_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same of a recipe, those that it has."""
    targets = recipe["target_modules"]
    values = {
        "model": recipe["hf_model_id"],
        "system": None if recipe["system_text"] == "SYS" else recipe["system_text"],
        "rank": recipe["r"],
        "alpha": recipe["alpha"],
        "dropout": recipe["dropout"],
        "target_modules": "all-linear" if targets == "all linear layers" else targets,
        "learning_rate": recipe["lr"],
        "batch_size": recipe["batch"] * recipe["accum"],
        "epochs": recipe["epochs"],
        "max_length": recipe["max_length"],
        "save_steps": recipe["save_steps"],
    }
    return {name: value for name, value in values.items() if value is not None}


def said_of(text: str, key: str) -> str:
    """What the comments at a key say of the tutorial: on its line, or in the lines before it."""
    lines = text.splitlines()
    (at,) = [n for n, line in enumerate(lines) if re.match(rf"\s*(?:{key}):", line)]
    above = []
    for line in reversed(lines[:at]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line)
    _, _, said = "\n".join([*above, lines[at]]).partition("# tutorial: ")
    return said


@pytest.mark.parametrize(("example", "name", "overrides"), REPLACED, ids=lambda value: str(value))
def test_an_example_has_the_tutorials_values_or_says_why_not(
    example: str, name: str, overrides: list[str]
) -> None:
    recipe, path = RECIPES[name], EXAMPLES[example]
    text = path.read_text(encoding="utf-8")
    found = settings_of(load_config(path, overrides).config)
    for key, value in values_of(recipe).items():
        if found[key] != value:
            written = "[" + ", ".join(value) + "]" if isinstance(value, list) else str(value)
            assert written in said_of(text, key), (key, found[key], value)
    # HF's Trainer, which all but xtuner use, warms up over no step and goes down in a line.
    train = load_config(path, overrides).config.train
    is_xtuner = "xtuner" in name
    assert (train.schedule, train.warmup_ratio) == (
        ("cosine", 0.03) if is_xtuner else ("linear", 0)
    )
    if recipe["method"] in OTHER_METHODS:
        assert OTHER_METHODS[recipe["method"]] in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_names_of_files_in_an_example_exist(name: str) -> None:
    config = load_config(EXAMPLES[name]).config
    if config.template is not None:
        assert config.template in BUILT_IN or Path(config.template).is_file()


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_coder_v2.yaml": (
        "DeepseekV2",
        EXPERTS
        | {"n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 8, "num_hidden_layers": 3}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_llm.yaml": ("Llama", {}),
    "gemma.yaml": ("Gemma", {"head_dim": 8}),
    "gemma3.yaml": ("Gemma3", {}),
    "glm4_0414.yaml": ("Glm4", {"head_dim": 8}),
    "glm4_5_air.yaml": (
        "Glm4Moe",
        EXPERTS | {"n_shared_experts": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
    ),
    "llama3.yaml": ("Llama", {}),
    "phi3.yaml": ("Phi3", {}),
    "qwen2_5.yaml": ("Qwen2", {}),
    "qwen2_5_law.yaml": ("Qwen2", {}),
    "qwen3.yaml": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe.yaml": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "num_experts": 4}),
    "qwen3_reasoning.yaml": ("Qwen3", {"head_dim": 8}),
    "yi.yaml": ("Llama", {}),
}
"""Architectures that transformers knows; the others come as code of their publishers."""


def meta_model(architecture: str, more: dict[str, Any]) -> PreTrainedModel:
    config_class = getattr(transformers, f"{architecture}Config")
    if architecture == "Gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        config = config_class(
            text_config=TINY | {"head_dim": 8}, vision_config=vision | {"num_attention_heads": 2}
        )
    else:
        config = config_class(**(TINY | more))
    with torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_target_modules_of_an_example_are_in_its_model(name: str) -> None:
    """On a tiny model of the architecture; names that match nothing would stop the run."""
    lora = load_config(EXAMPLES[name]).config.lora
    injected = inject(
        meta_model(*ARCHITECTURES[name]),
        rank=2,
        alpha=lora.resolved_alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=False,
        use_dora=False,
        init="default",
        seed=1,
    )
    assert injected.matches and all(injected.matches.values())
    assert not any("outside the text model" in warning for warning in injected.warnings)
    adapted = [n for n, p in injected.model.named_parameters() if "lora_" in n]
    assert adapted and not any("vision" in n or "visual" in n for n in adapted)
