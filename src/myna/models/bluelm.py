"""BlueLM for transformers: configuration and model, without the remote code of the checkpoint.

BlueLM is Llama plus one LayerNorm directly after the token embedding, so the classes below derive
from transformers' Llama and own the two differences only: that LayerNorm and the `ntkmixed` rotary
frequencies. Attention backends, caches, gradient checkpointing and generation stay Llama's. Files,
shards and tokenizers are left to `load.py` and `tokenizer.py`. The facts come from vivo's published
implementation, measured; the golden vectors in the tests are its outputs.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from myna.errors import ConfigError


@strict
class BlueLMConfig(LlamaConfig):
    """Shape of a BlueLM model; field names as in its published `config.json`.

    `auto_map` is dropped on reading: it points at remote code that this class replaces, and a saved
    copy would make other programs ask for that code. Rotary scaling is `None` or `ntkmixed`.

    Raises ConfigError for any other rotary scaling: the published code accepts `linear` and
    `dynamic` and then ignores them, so what such a checkpoint was trained with cannot be known.
    """

    model_type = "BlueLM"

    vocab_size: int = 100096
    rms_norm_eps: float = 1e-6
    use_stable_embedding: bool = False

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: D105  (the class says what it does)
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        rope_type = self.rotary["rope_type"]
        if rope_type not in ("default", "ntkmixed"):
            raise ConfigError(
                f'config.json: rope_scaling is of type "{rope_type}"; BlueLM has null or '
                '"ntkmixed".\n  Set it to null if the checkpoint was trained without scaling.'
            )

    @property
    def rotary(self) -> dict[str, Any]:
        """`rope_theta`, `rope_type` and, for ntkmixed, `factor` and `power`."""
        return dict(self.rope_parameters or {})

    def _validate_ntkmixed_rope_parameters(
        self, rope_parameters: dict[str, Any], ignore_keys: set[str] | None = None
    ) -> None:
        # transformers calls this by its name for `rope_type: ntkmixed`.
        for key, least in (("factor", 1), ("power", 0)):
            value = rope_parameters.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise ConfigError(
                    f"config.json: rope_scaling.{key} is {value!r}; ntkmixed needs a number of at "
                    f"least {least}. Published: factor 16.0, power 0.3."
                )


def rotary_frequencies(config: BlueLMConfig) -> Tensor:
    """Angle per position of each rotary pair, shape (head_dim / 2,), float32.

    Plain: `theta^(-2j / head_dim)` for j = 0, 1, ... With `ntkmixed` of factor k (cut to an
    integer) and power b, and m = head_dim / 2, pair i = 1..m is divided by `exp(a * i^b)`, where
    `a = ln(k) / m^b`: the slowest pair by exactly k, the fastest by exp(a), at every length.
    Source: vivo's NTKMixedScalingRotaryEmbedding.
    """
    rotary = config.rotary
    half = config.hidden_size // config.num_attention_heads // 2
    pair = torch.arange(half, dtype=torch.float32)
    frequencies: Tensor = 1.0 / (rotary["rope_theta"] ** (pair / half))
    if rotary["rope_type"] == "ntkmixed":
        a = math.log(int(rotary["factor"])) / half ** rotary["power"]
        frequencies = frequencies / torch.exp(a * (pair + 1) ** rotary["power"])
    return frequencies


class BlueLMRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding over `rotary_frequencies`; its buffers are not saved."""

    def __init__(self, config: BlueLMConfig) -> None:
        # Past Llama's own: it looks frequencies up in a table of transformers without ntkmixed.
        nn.Module.__init__(self)
        self.config = config
        self.rope_type = config.rotary["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.attention_scaling = 1.0
        frequencies = rotary_frequencies(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)


class BlueLMPreTrainedModel(LlamaPreTrainedModel):
    """What the BlueLM classes share: the configuration class and the filling of empty tensors."""

    config: BlueLMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained builds on the meta device and files hold no rotary buffers: unfilled, they
        # are uninitialised memory (NaN logits and no error in the published code).
        if isinstance(module, BlueLMRotaryEmbedding):
            frequencies = rotary_frequencies(self.config)
            initialization.copy_(module.inv_freq, frequencies)
            initialization.copy_(module.original_inv_freq, frequencies)
        else:
            super()._init_weights(module)


class BlueLMModel(BlueLMPreTrainedModel, LlamaModel):
    """Token embedding, its LayerNorm if `use_stable_embedding`, Llama's blocks and final norm."""

    def __init__(self, config: BlueLMConfig) -> None:
        # Past LlamaModel.__init__, which builds the rotary embedding that has no ntkmixed.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        if config.use_stable_embedding:
            self.embed_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BlueLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As `LlamaModel.forward`, for ids (B, T) or `inputs_embeds` (B, T, D), not both.

        `inputs_embeds` enter the first block as they are, as in the published code: the LayerNorm
        belongs to looking an id up. Rows read from the table go through `embed_ids` instead.
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, input_ids = self.embed_ids(input_ids), None
        outputs: BaseModelOutputWithPast = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return outputs

    def embed_ids(self, input_ids: Tensor) -> Tensor:
        """Input of the first block for ids (B, T): rows of the table, normalised, (B, T, D)."""
        embeddings: Tensor = self.embed_tokens(input_ids)
        if self.config.use_stable_embedding:
            embeddings = self.embed_layer_norm(embeddings)
        return embeddings


class BlueLMForCausalLM(BlueLMPreTrainedModel, LlamaForCausalLM):
    """BlueLM with its output head; all that `LlamaForCausalLM` does, including `generate`."""

    def __init__(self, config: BlueLMConfig) -> None:
        # Past LlamaForCausalLM.__init__, which would allocate a LlamaModel to be thrown away.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = BlueLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Make `model_type: BlueLM` known to transformers' auto classes; safe to call again.

    Called by the functions that load, not on import: importing must not change another library.
    """
    AutoConfig.register(BlueLMConfig.model_type, BlueLMConfig, exist_ok=True)
    AutoModel.register(BlueLMConfig, BlueLMModel, exist_ok=True)
    AutoModelForCausalLM.register(BlueLMConfig, BlueLMForCausalLM, exist_ok=True)
