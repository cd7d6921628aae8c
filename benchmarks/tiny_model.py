"""A tiny chat model on disk, for measurements and tests of everything around the arithmetic."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from myna.data.templates import choose_template
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.lora.inject import inject
from myna.models.load import load_model
from myna.models.tokenizer import load_tokenizer, save_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(*more_stops: str, **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte, ChatML's control tokens and `more_stops` before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", *more_stops]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", *more_stops],
        **options,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_model(folder: Path, **settings: Any) -> Path:
    """A Llama of two layers with a byte-level tokenizer and a ChatML template.

    `settings` are values of its config that are to be others.
    """
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(usual | settings))).save_pretrained(folder)
    return folder


def save_tiny_run(base: Path, run: Path, *, seed: int = 5, system: str | None = None) -> Path:
    """A run directory as training leaves it, with an adapter of random weights on `base`."""
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
    generator = torch.Generator().manual_seed(seed)
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
    save_adapter(injected.model, run / "adapter", metadata=metadata)
    loaded.tokenizer.chat_template = template.saved_source
    save_tokenizer(loaded.tokenizer, run / "adapter")
    return run
