"""GGUF: a model, or an adapter alone, as llama.cpp reads it.

Owns the file: which architectures llama.cpp computes as transformers does, what their tensors are
called there, the order of rows that its rotary embedding expects, number formats, and the metadata.
Merged tensors come from `weights.py`, the tokenizer's part from `vocabulary.py`. What llama.cpp
would compute otherwise is refused with the reason.

D hidden, H heads, K heads of keys and values, h head size.
"""

# mypy: allow-untyped-calls
# (transformers annotates few of its return types.)

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from myna.errors import ConfigError, NonFiniteError, StorageError
from myna.export.merge import check_room
from myna.export.origin import Origin, check_target, refuse_quantised
from myna.export.vocabulary import read_vocabulary
from myna.export.weights import (
    MergedWeights,
    low_rank,
    merged_weights,
    refuse_unmergeable,
    scalings,
)
from myna.lora.adapter_file import AdapterInfo
from myna.lora.inject import list_some
from myna.models.bluelm import BlueLMConfig
from myna.models.load import context_length, meta_model
from myna.run_dir import file_written_aside, remove_leftovers_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Kind = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES: Mapping[Kind, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""transformers' model_type -> llama.cpp's architecture. BlueLM is a Llama by then."""

Array = NDArray[Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file and how its numbers are made."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    values: Callable[[], Array]
    """float32, of this shape."""


def check_gguf() -> None:
    """Raise ConfigError where the package that writes the format is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Writing GGUF needs the gguf package.\n  pip install 'myna[export]'"
        ) from error


def export_model(
    origin: Origin, out: Path, kind: Kind, *, say: Say = lambda _: None
) -> MergedWeights:
    """Write base and adapter as one model to the file `out`.

    Raises ConfigError where llama.cpp would compute something else, and StorageError where there is
    no room; nothing is at `out` then.
    """
    check_gguf()
    check_target(out, origin)
    _check_architecture(origin.config)
    weights = merged_weights(origin)
    config = weights.config
    embedding = weights.shape("model.embed_tokens.weight")
    vocabulary = read_vocabulary(origin.tokenizer, rows=embedding[0])
    factors = _rope_factors(config)
    entries = list(_model_entries(weights, kind))
    if factors is not None:
        entries.append(_Entry("rope_freqs.weight", factors.shape, "f32", lambda: factors))
    context, context_note = context_of(config)
    notes = (*origin.notes, *weights.notes, *vocabulary.notes, context_note)
    for note in (*notes, _shorter_rows(entries, kind)):
        if note:
            say(note)

    def describe(writer: "GGUFWriter") -> None:
        _describe_model(writer, config, context, kind, origin.name, embedding[0])
        _describe_rope(writer, config)
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.kinds)
        writer.add_token_merges(vocabulary.merges)
        writer.add_token_scores(vocabulary.scores)
        if vocabulary.space_first is not None:
            writer.add_add_space_prefix(vocabulary.space_first)
        _describe_special_tokens(writer, origin)

    _write(out, ARCHITECTURES[config.model_type], entries, describe, say)
    return weights


def export_adapter(origin: Origin, out: Path, kind: Kind, *, say: Say = lambda _: None) -> None:
    """Write the adapter alone to the file `out`, for use on a GGUF of its base.

    Raises ConfigError where llama.cpp has no form for it.
    """
    check_gguf()
    check_target(out, origin)
    _check_architecture(origin.config)
    assert origin.adapter is not None, "there is no adapter to write"
    entries = list(_adapter_entries(origin, kind))
    for note in (*origin.notes, _shorter_rows(entries, kind)):
        if note:
            say(note)
    alpha = _alpha(origin.adapter)

    def describe(writer: "GGUFWriter") -> None:
        writer.add_type("adapter")
        writer.add_name(origin.name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        _describe_format(writer, kind)

    _write(out, _architecture(origin.config), entries, describe, say)


def encode(values: Array, kind: Kind) -> Array:
    """float32 numbers as the bytes that llama.cpp reads, one row of bytes for one row.

    Raises NonFiniteError where float16 cannot hold them.
    """
    import gguf

    with np.errstate(over="ignore"):
        data = gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), _type_of(kind))
    if kind == "f16" and not np.isfinite(data).all():
        raise NonFiniteError(
            f"A weight is {np.abs(values).max():.3g}, more than float16 can hold (65,504); nothing "
            "was written.\n  Use --type bf16 or --type f32."
        )
    return np.ascontiguousarray(data).view(np.uint8).reshape(*values.shape[:-1], -1)


def permute(values: Array, heads: int) -> Array:
    """Rows of q or k (H h, …) in the order that llama.cpp's architecture `llama` rotates.

    transformers turns row j of a head together with row j + h/2, llama.cpp rows 2j and 2j + 1.
    """
    head_dim = values.shape[0] // heads
    rest = values.shape[1:]
    return values.reshape(heads, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(values.shape)


def _architecture(config: PreTrainedConfig) -> str:
    return "llama" if isinstance(config, BlueLMConfig) else ARCHITECTURES[config.model_type]


def _check_architecture(config: PreTrainedConfig) -> None:
    if isinstance(config, BlueLMConfig):
        return
    reason = None
    if config.model_type not in ARCHITECTURES:
        reason = (
            f"its model_type is {config.model_type!r}; {', '.join(ARCHITECTURES)} and BlueLM can "
            "be written"
        )
    elif (act := getattr(config, "hidden_act", "silu")) != "silu":
        reason = f"its hidden_act is {act!r}, and llama.cpp computes silu"
    elif (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        reason = "only a part of each head is rotated"
    if reason is not None:
        raise ConfigError(
            f"This model cannot be written as GGUF: {reason}.\n  `myna merge` writes a folder that "
            "transformers and vLLM load, and that llama.cpp's own converter reads."
        )


def _model_entries(weights: MergedWeights, kind: Kind) -> Iterator[_Entry]:
    config = weights.config
    names = _name_map(config)
    unknown = [name for name in weights.names if names(name) is None]
    if unknown:
        raise ConfigError(
            f"This model cannot be written as GGUF: llama.cpp's {ARCHITECTURES[config.model_type]} "
            f"has no place for these tensors:\n{list_some(unknown)}\n"
            "  `myna merge` writes a folder that transformers and vLLM load."
        )
    for name in weights.names:
        heads = _permuted_heads(name, config)
        shape = weights.shape(name)

        def values(name: str = name, heads: int | None = heads) -> Array:
            found: Array = weights.tensor(name).numpy()
            return found if heads is None else permute(found, heads)

        yield _Entry(str(names(name)), shape, _kind_for(shape, kind), values)


def _adapter_entries(origin: Origin, kind: Kind) -> Iterator[_Entry]:
    adapter = origin.adapter
    assert adapter is not None, "there is no adapter to write"
    refuse_quantised(origin, "a GGUF of base and adapter")
    refuse_unmergeable(adapter)
    layers = low_rank(adapter)
    reason = None
    if any("lora_magnitude_vector" in parts for parts in layers.values()):
        reason = "it is DoRA, which llama.cpp does not compute"
    elif any("lora_A" not in parts or "lora_B" not in parts for parts in layers.values()):
        reason = "it adapts the token embedding"
    elif others := [name for name in adapter.shapes if ".lora_" not in name]:
        reason = f"it holds whole tensors, such as {others[0]}"
    config = origin.config
    names = _name_map(config)
    head = "lm_head" in layers
    if reason is None and head and config.tie_word_embeddings:
        reason = "it adapts the output head, which this base shares with the token embedding"
    unknown = [layer for layer in layers if names(f"{layer}.weight") is None]
    if reason is None and unknown:
        reason = f"llama.cpp has no place for {unknown[0]}"
    if reason is not None:
        raise ConfigError(
            f"{adapter.folder}: this adapter cannot be written alone: {reason}.\n"
            "  Leave --adapter-only out: the merged model can hold it."
        )
    scaling = scalings(adapter, meta_model(config))
    for layer, parts in layers.items():
        weight = f"{layer}.weight"
        A, B = parts["lora_A"].numpy(), parts["lora_B"].numpy()
        # llama.cpp multiplies by alpha / rank, with one alpha for all layers.
        B = B * np.float32(scaling[layer] * A.shape[0] / _alpha(adapter))
        if (heads := _permuted_heads(weight, config)) is not None:
            B = permute(B, heads)
        for part, value in (("lora_a", A), ("lora_b", B)):

            def values(value: Array = value) -> Array:
                return value

            yield _Entry(
                f"{names(weight)}.{part}", value.shape, _kind_for(value.shape, kind), values
            )


def _alpha(adapter: AdapterInfo) -> float:
    return float(adapter.alpha) or 1.0  # llama.cpp takes 0 for "no scaling"


def _name_map(config: PreTrainedConfig) -> Callable[[str], str | None]:
    import gguf

    arch = next(
        arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(config)
    )
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _permuted_heads(name: str, config: PreTrainedConfig) -> int | None:
    """Heads of a tensor whose rows stand in another order in llama.cpp; None for all others."""
    if _architecture(config) != "llama":
        return None
    for part, heads in (
        (".q_proj.", config.num_attention_heads),
        (".k_proj.", config.num_key_value_heads),
    ):
        if part in name:
            return int(heads)
    return None


def _kind_for(shape: tuple[int, ...], kind: Kind) -> Kind:
    """Vectors stay float32; q8_0 stores blocks of 32, and a row that has none as float16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def _shorter_rows(entries: list[_Entry], kind: Kind) -> str:
    others = [entry.name for entry in entries if len(entry.shape) > 1 and entry.kind != kind]
    if not others or kind != "q8_0":
        return ""
    return (
        f"{len(others)} tensors have rows that are no multiple of 32 and are f16, not q8_0, such "
        f"as {others[0]}"
    )


def context_of(config: PreTrainedConfig) -> tuple[int | None, str]:
    """Longest text, and what to say of it."""
    length = context_length(config)
    window = getattr(config, "sliding_window", None)
    if length is None or window is None or window >= length:
        return length, ""
    return int(window), (
        f"the context is {window:,} tokens, not {length:,}: beyond it this model sees a sliding "
        "window, which llama.cpp does not compute for it"
    )


def _rope_factors(config: PreTrainedConfig) -> Array | None:
    """What each rotary frequency is divided by, (h / 2,); None where it is nothing or one number.

    Raises ConfigError for scalings that are more than that.
    """
    rotary = config.rope_parameters
    kind = rotary["rope_type"]
    if kind in ("default", "linear"):
        return None
    same = kind == "longrope" and (
        rotary["short_factor"] == rotary["long_factor"] and rotary.get("attention_factor") == 1.0
    )
    if kind != "llama3" and not same:
        raise ConfigError(
            f"This model cannot be written as GGUF: its rope scaling is {kind!r}; default, linear "
            "and llama3 can be written.\n  `myna merge` writes a folder that transformers and vLLM "
            "load."
        )
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    head_dim = _head_dim(config)
    plain = rotary["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    factors: Array = (plain / scaled.double()).float().numpy()
    return factors


def _head_dim(config: PreTrainedConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _describe_model(
    writer: "GGUFWriter",
    config: PreTrainedConfig,
    context: int | None,
    kind: Kind,
    name: str,
    rows: int,
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    _describe_format(writer, kind)
    if context is not None:
        writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)


def _describe_format(writer: "GGUFWriter", kind: Kind) -> None:
    import gguf

    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[kind]]))
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _describe_rope(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    import gguf

    rotary = config.rope_parameters
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def _describe_special_tokens(writer: "GGUFWriter", origin: Origin) -> None:
    """Ids with a function; llama.cpp has three places for ids that end an answer."""
    tokenizer, stops = origin.tokenizer, origin.stop_ids
    if len(stops) > 3:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)
        raise ConfigError(
            f"This model cannot be written as GGUF: {len(stops)} tokens end its answers ({names}), "
            "and the format has places for three."
        )
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, stop in zip(adders, stops, strict=False):
        add(stop)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(origin.pad_id)
    # Prompts get a BOS exactly where those of the training had one.
    writer.add_add_bos_token(origin.begins_with_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(origin.encoder.template.saved_source)


def _type_of(kind: Kind) -> "GGMLQuantizationType":
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def _write(
    out: Path,
    architecture: str,
    entries: list[_Entry],
    describe: Callable[["GGUFWriter"], None],
    say: Say,
) -> None:
    """The whole file, one tensor in memory at a time, read back before it gets its name."""
    import gguf

    shapes = {
        entry.name: gguf.quant_shape_to_byte_shape(entry.shape, _type_of(entry.kind))
        for entry in entries
    }
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    check_room(out, sum(sizes.values()) + 64_000_000)
    remove_leftovers_of(out)
    say(f"{len(entries):,} tensors are written …")
    with file_written_aside(out) as aside:
        writer = gguf.GGUFWriter(aside, architecture)
        try:
            describe(writer)
            for entry in entries:
                writer.add_tensor_info(
                    entry.name,
                    shapes[entry.name],
                    np.dtype(np.uint8),
                    sizes[entry.name],
                    raw_dtype=_type_of(entry.kind),
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                values = entry.values()
                assert values.shape == tuple(entry.shape), f"{entry.name} is {values.shape}"
                writer.write_tensor_data(encode(values, entry.kind))
        finally:
            writer.close()
        _read_back(aside, out, entries)


def _read_back(aside: Path, out: Path, entries: list[_Entry]) -> None:
    """Raise StorageError unless the file holds every tensor whole, where it says."""
    import gguf

    expected = {
        entry.name: (tuple(reversed(entry.shape)), _type_of(entry.kind)) for entry in entries
    }
    try:
        reader = gguf.GGUFReader(aside)
        found = {
            tensor.name: (tuple(int(size) for size in tensor.shape), tensor.tensor_type)
            for tensor in reader.tensors
        }
    except (ValueError, IndexError) as error:
        raise StorageError(f"{out}: the file cannot be read back ({error}); it was removed.") from (
            error
        )
    if found != expected:
        raise StorageError(
            f"{out}: read back, the file holds {len(found)} of {len(expected)} tensors as they "
            "were written; it was removed.\n  Write it to another disk."
        )
