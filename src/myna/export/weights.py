"""Merged weights: the base's tensors as they are on disk, with the adapter added, one at a time.

Owns what becomes of each tensor: `W + scaling * B A` in float32 from the original files, whatever
format they have; DoRA, adapters of the token embedding and whole modules; a head that shares its
weight with the embedding and no longer can; BlueLM, whose LayerNorm of the embedding is folded into
the table, which makes it a Llama. What cannot be added truthfully is refused with the reason. How
tensors are written is `merge.py`'s and `gguf.py`'s.

B is (out, rank), A is (rank, in).
"""

# mypy: allow-untyped-calls
# (transformers and safetensors annotate few of their return types.)

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from myna.errors import ConfigError, NonFiniteError
from myna.export.origin import Origin, refuse_quantised
from myna.lora.adapter_file import WEIGHTS_FILE, AdapterInfo, with_places
from myna.lora.initial import changes_base
from myna.lora.inject import ADAPTER, adapter_layers, list_some
from myna.models.bluelm import BlueLMConfig, rotary_frequencies
from myna.models.load import IGNORED_SUFFIXES, context_length, meta_model

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Number formats of safetensors that a delta can be added in."""

_LOW_RANK = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)
_UNMERGEABLE: Mapping[str, str] = {
    "alora_invocation_tokens": "it acts only after its invocation tokens (aLoRA)",
    "arrow_config": "it chooses among adapters for every token (Arrow)",
    "use_qalora": "its A acts on averages of the input (QA-LoRA)",
    "use_bdlora": "its matrices are block-diagonal in peft's own layout (BD-LoRA)",
    "kasa_config": "it changes the base's weights before adding to them (KaSA)",
    "monteclora_config": "it draws its weights anew (MonteCLoRA)",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it adapts parameters that are no layers, such as fused experts",
    "trainable_token_indices": "it trained single rows of the embedding",
    "lora_bias": "its B has a bias",
    "ensure_weight_tying": "it trained the embedding and the head as one",
    "megatron_config": "it was made for Megatron's layers",
}
"""Settings of peft under which the update is more than a constant added to a weight."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Stored:
    """One tensor of the result: where it is now, and what is done to it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class MergedWeights:
    """The tensors of the result by name, each read and computed when it is asked for."""

    tensors: Mapping[str, _Stored]
    settings: dict[str, Any]
    """config.json of the result."""
    config: PreTrainedConfig
    """The same as transformers reads it."""
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the base's files."""
        return tuple(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The format that most numbers of the base are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + _count(stored.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(_count(stored.shape) for stored in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.tensors[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """What the base stores one tensor in."""
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32. Raises NonFiniteError where it is not finite."""
        stored = self.tensors[name]
        value = _read(stored.file, stored.key)
        for change in stored.changes:
            value = change(value)
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{name} has values that are not finite after the adapter was added; nothing was "
                "written.\n  The adapter or the base is broken: fetch the base again, or train "
                "with a lower learning rate."
            )
        return value


def merged_weights(origin: Origin) -> MergedWeights:
    """What every tensor of base and adapter together is to become.

    Raises ConfigError, before a weight is read, where it cannot be done truthfully.
    """
    refuse_quantised(origin, "merging")
    tensors = _stored_tensors(origin)
    config, settings = origin.config, dict(origin.settings)
    notes: list[str] = []
    table = tensors.get("model.embed_tokens.weight")
    if isinstance(config, BlueLMConfig) and table is not None:
        config.vocab_size = table.shape[0]  # early snapshots disagree with their config.json
    model = meta_model(config)
    embedding, head = _embedding_and_head(model)
    is_tied = _is_tied(config)
    changes = _adapter_changes(origin.adapter, model, tensors) if origin.adapter else {}
    if isinstance(config, BlueLMConfig):
        tensors, norm = _without_embedding_norm(tensors, config.rms_norm_eps)
        if norm is not None:
            changes[embedding] = (*changes.get(embedding, ()), norm)
        settings = _as_llama(settings, config)
        notes.append(
            "BlueLM was written as Llama: its LayerNorm of the embedding is in the table now"
            if norm is not None
            else "BlueLM was written as Llama; this one has no LayerNorm of the embedding"
        )
    if is_tied and (embedding in changes or head in changes):
        place = tensors[_key(embedding, tensors, model)]
        tensors = {**tensors, head: place}
        settings["tie_word_embeddings"] = False
        notes.append(f"{head} stands for itself now; it was the embedding's before")
    elif is_tied:  # some files hold a copy, which transformers does not read
        tensors = {name: stored for name, stored in tensors.items() if name != head}
    found = {_key(name, tensors, model): change for name, change in changes.items()}
    for name in ("auto_map", "_name_or_path"):  # code that nobody needs for this; a place
        settings.pop(name, None)
    return MergedWeights(
        tensors={
            name: replace(stored, changes=found.get(name, ())) for name, stored in tensors.items()
        },
        settings=settings,
        config=_read_settings(settings, config),
        notes=tuple(notes),
    )


def low_rank(adapter: AdapterInfo) -> dict[str, dict[str, Tensor]]:
    """Layer -> part (`lora_A` …) -> tensor in float32."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _adapter_tensors(adapter).items():
        if (found := _LOW_RANK.fullmatch(name)) is not None:
            parts.setdefault(found["layer"], {})[found["part"]] = tensor
    return parts


def scalings(adapter: AdapterInfo, model: PreTrainedModel) -> dict[str, float]:
    """Layer -> what its `B A` is multiplied by, as peft reads the settings.

    `model` is on the meta device and is changed. Raises ConfigError where the adapter does not fit.
    """
    layers = adapter_layers(with_places(model, adapter))
    return {name: float(layer.scaling[ADAPTER]) for name, layer in layers.items()}


def refuse_unmergeable(adapter: AdapterInfo) -> None:
    """Raise ConfigError for settings under which the update is no constant added to a weight."""
    reason = next(
        (why for name, why in _UNMERGEABLE.items() if adapter.config.get(name)),
        None,
    )
    if reason is None and changes_base(adapter.init):
        reason = (
            f"it was saved with init_lora_weights {adapter.init!r}, and belongs to a base that was "
            "changed first"
        )
    if reason is not None:
        raise ConfigError(
            f"{adapter.folder}: this adapter cannot be merged: {reason}.\n"
            "  Use it as it is, with peft or `myna chat`."
        )


def _stored_tensors(origin: Origin) -> dict[str, _Stored]:
    tensors: dict[str, _Stored] = {}
    for file in origin.files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open is no dict)
                if key.endswith(IGNORED_SUFFIXES):
                    continue
                place = shard.get_slice(key)
                kind = place.get_dtype()
                if kind not in DTYPES:
                    raise ConfigError(
                        f"{file}: {key} is stored as {kind}; expected {', '.join(DTYPES)}.\n"
                        "  Weights in fewer bits are not merged: take the model that it was "
                        "made from."
                    )
                tensors[key] = _Stored(file, key, tuple(place.get_shape()), DTYPES[kind])
    return tensors


def _adapter_changes(
    adapter: AdapterInfo, model: PreTrainedModel, tensors: Mapping[str, _Stored]
) -> dict[str, tuple[Change, ...]]:
    """Parameter of the model -> what the adapter does to it."""
    refuse_unmergeable(adapter)
    whole = _whole_tensors(adapter, model, tensors)
    scaling = scalings(adapter, model)
    modules = dict(model.named_modules())
    changes: dict[str, tuple[Change, ...]] = {
        name: (partial(_replaced, tensor),) for name, tensor in whole.items()
    }
    unknown = []
    for layer, parts in low_rank(adapter).items():
        base = getattr(modules.get(layer), "base_layer", None)
        if layer not in scaling or not isinstance(base, nn.Linear | Conv1D | nn.Embedding):
            unknown.append(layer)
            continue
        changes[f"{layer}.weight"] = (_update(base, parts, scaling[layer]),)
    if unknown:
        raise ConfigError(
            f"{adapter.folder}: this adapter cannot be merged; it has tensors for what is no "
            f"linear layer of {type(model).__name__}:\n{list_some(sorted(unknown))}\n"
            "  Use it as it is, with peft or `myna chat`."
        )
    missing = [name for name in changes if _find_key(name, tensors, model) is None]
    if missing and not _is_tied_head(missing, model):
        raise ConfigError(
            "This adapter cannot be merged: the base's files do not hold these weights under the "
            f"names that the model has for them (transformers converts them as it loads):\n"
            f"{list_some(sorted(missing))}\n  Use it as it is, with peft or `myna chat`."
        )
    return changes


def _update(base: nn.Module, parts: Mapping[str, Tensor], scaling: float) -> Change:
    if isinstance(base, nn.Embedding):
        # Its B is (hidden, rank) and its A (rank, vocabulary); the table is (vocabulary, hidden).
        A, B = parts["lora_embedding_A"], parts["lora_embedding_B"]
        return partial(_added, B=A.T, A=B.T, scaling=scaling, magnitude=None, transposed=False)
    return partial(
        _added,
        B=parts["lora_B"],
        A=parts["lora_A"],
        scaling=scaling,
        magnitude=parts.get("lora_magnitude_vector"),
        transposed=isinstance(base, Conv1D),
    )


def _added(
    weight: Tensor,
    *,
    B: Tensor,
    A: Tensor,
    scaling: float,
    magnitude: Tensor | None,
    transposed: bool,
) -> Tensor:
    """`W + s B A`; with DoRA (Liu et al. 2024) each row of it at the length `magnitude`.

    `transposed`: W is stored as (in, out), as in transformers' Conv1D.
    """
    merged = (weight.T if transposed else weight) + scaling * (B @ A)
    if magnitude is not None:
        merged = merged * (magnitude.flatten() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.T.contiguous() if transposed else merged


def _replaced(value: Tensor, _: Tensor) -> Tensor:
    return value


def _normalised(table: Tensor, *, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(table, (table.shape[1],), weight, bias, eps)


def _whole_tensors(
    adapter: AdapterInfo, model: PreTrainedModel, tensors: Mapping[str, _Stored]
) -> dict[str, Tensor]:
    """What takes a weight's place: modules that were trained whole, and biases."""
    modules = tuple(adapter.config.get("modules_to_save") or ())
    whole: dict[str, Tensor] = {}
    for name, tensor in _adapter_tensors(adapter).items():
        if _LOW_RANK.fullmatch(name) is not None:
            continue
        parameter = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module = parameter.rpartition(".")[0]
        key = _find_key(parameter, tensors, model)
        _, head = _embedding_and_head(model)
        if key is None and parameter == head:  # tied: it is written beside the embedding
            key = _find_key(_embedding_and_head(model)[0], tensors, model)
        is_meant = parameter.endswith(".bias") or any(
            module == name or module.endswith(f".{name}") for name in modules
        )
        fault = None
        if "lora_" in name or key is None:
            fault = "which has no place in the base"
        elif tuple(tensor.shape) != tensors[key].shape:
            fault = f"of shape {tuple(tensor.shape)}; the base has {tensors[key].shape}"
        elif not is_meant and not torch.equal(tensor, _read(tensors[key].file, tensors[key].key)):
            fault = "which is another one than the base's"
        if fault is not None:
            raise ConfigError(
                f"{adapter.folder}: this adapter cannot be merged: it holds {name}, {fault}.\n"
                "  Use it as it is, with peft."
            )
        if is_meant:
            whole[parameter] = tensor
    return whole


def _adapter_tensors(adapter: AdapterInfo) -> dict[str, Tensor]:
    with safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


def _embedding_and_head(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the weights of the token embedding and of the output head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (f"{names.get(id(module), '')}.weight" for module in wanted)
    return embedding, head


def _find_key(name: str, tensors: Mapping[str, _Stored], model: PreTrainedModel) -> str | None:
    """The key of a parameter in the files: its name, or that without the prefix of the body."""
    if name in tensors:
        return name
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return short if short in tensors else None


def _key(name: str, tensors: Mapping[str, _Stored], model: PreTrainedModel) -> str:
    key = _find_key(name, tensors, model)
    assert key is not None, f"{name} was found before"
    return key


def _is_tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))


def _is_tied_head(missing: Sequence[str], model: PreTrainedModel) -> bool:
    return _is_tied(model.config) and list(missing) == [_embedding_and_head(model)[1]]


def _without_embedding_norm(
    tensors: dict[str, _Stored], eps: float
) -> tuple[dict[str, _Stored], Change | None]:
    """BlueLM's tensors but the LayerNorm of the embedding, and that as a change of the table."""
    names = [f"model.embed_layer_norm.{part}" for part in ("weight", "bias")]
    if not any(name in tensors for name in names):
        return tensors, None
    weight, bias = (_read(tensors[name].file, tensors[name].key) for name in names)
    rest = {name: stored for name, stored in tensors.items() if name not in names}
    return rest, partial(_normalised, weight=weight, bias=bias, eps=eps)


def _as_llama(settings: dict[str, Any], config: BlueLMConfig) -> dict[str, Any]:
    """BlueLM's config.json as a Llama's.

    `ntkmixed` divides each rotary frequency by a constant, at every length; so does `longrope` with
    the same factors for short and for long texts.
    """
    dropped = ("use_stable_embedding", "auto_map", "rope_scaling", "rope_theta", "rope_parameters")
    kept = {name: value for name, value in settings.items() if name not in dropped}
    rotary = config.rotary
    head_dim = config.hidden_size // config.num_attention_heads
    llama = kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": head_dim,
        "rope_theta": rotary["rope_theta"],
    }
    if rotary["rope_type"] == "ntkmixed":
        plain = rotary["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        divisors = (plain / rotary_frequencies(config).double()).tolist()
        length = context_length(config)
        llama |= {
            "max_position_embeddings": length,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": divisors,
                "long_factor": divisors,
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": length,
            },
        }
    return llama


def _read_settings(settings: dict[str, Any], base: PreTrainedConfig) -> PreTrainedConfig:
    kind = LlamaConfig if isinstance(base, BlueLMConfig) else type(base)
    return kind.from_dict(settings)


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(key)
    return tensor.float()


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
