"""The adapter folder: what an adapter is on disk.

    adapter_config.json         peft's settings: what every engine reads
    adapter_model.safetensors   A and B, float32; no time, path or run in it
    myna.json                   what the adapter was trained with: base, persona, template, stop ids

Owns writing these three and reading them back, from myna or from plain peft. An adapter whose
initialisation changed the base (PiSSA, OLoRA) is written as a plain LoRA on the untouched base.
Tokenizer, chat template and model card lie in the same folder and are written by others. Pickle is
never read.
"""

# mypy: untyped-calls-exclude="peft"
# (peft annotates its arguments but few of its return types.)

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from transformers import PreTrainedModel

from myna import __version__
from myna.errors import ConfigError, StorageError
from myna.lora.adapter_limits import MAX_JSON_BYTES, check_file, check_settings
from myna.lora.initial import changes_base
from myna.lora.inject import (
    ADAPTER,
    Injected,
    account,
    adapter_layers,
    adapter_state,
    list_some,
)
from myna.lora.targets import Targets, layer_shape, linear_layers
from myna.run_dir import write_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METADATA_FILE = "myna.json"

FORMAT = 1
"""Of `METADATA_FILE`; raised by a change that an older version would misread."""

_PREFIX = "base_model.model."
_LOST_BASE = ("corda", "lora_ga", "loftq", "pissa_niter")
"""Changes of the base that cannot be repeated from base and file; `pissa` and `olora` can."""


class AdapterMetadata(BaseModel):
    """What an adapter was trained with, as far as using it needs to know (`myna.json`)."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format: int = FORMAT
    """Of the file; newer ones are not read."""
    base_model: str
    """The base as the user named it: a folder or a hub id."""
    base_fingerprint: str | None = None
    """Identifies the base's weights."""
    forced_from: str | None = None
    """The fingerprint of another base: the adapter was trained there first, and `--force-base` put
    it on this one."""
    tokenizer_fingerprint: str | None = None
    """Identifies the tokenizer."""
    template_sha256: str | None = None
    """Identifies the chat template."""
    system: str | None = None
    """Persona put in front of conversations that have no system message."""
    template_origin: str | None = None
    """Where the chat template came from."""
    template_options: dict[str, Any] = {}
    """Switches of the template, such as thinking off."""
    folds_system: bool = False
    """The template has no system role: the system text stands before the first user's text, with a
    blank line between."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end an answer."""
    stop_tokens: tuple[str, ...] = ()
    """The same as texts."""
    pad_id: int | None = None
    """Token id that fills rows."""
    init: str = "default"
    """Initialisation that training started from; the files hold a plain LoRA in any case."""
    myna_version: str = __version__
    """Version that wrote the folder."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder holds, read without loading the weights."""

    folder: Path
    rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    init: str
    base_model: str | None
    metadata: AdapterMetadata | None
    """None for an adapter that was made elsewhere."""
    shapes: Mapping[str, tuple[int, ...]]
    """Tensors by their name in the file."""
    config: Mapping[str, Any]
    """adapter_config.json as it is."""


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    metadata: AdapterMetadata,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of `model` to `folder`, made if absent; the same adapter, the same bytes.

    `initial` is `Injected.initial`. With it the file holds `[A; A0]` and `[B, -B0]` at twice the
    rank and the scaling s in alpha, so that `W0 + s (B A - B0 A0)` is what was trained, on the
    base as the user has it. In a float32 model that is exact up to rounding; in bfloat16 the
    residual base was rounded once, at a size like the rounding of W0 itself.

    Raises StorageError if a file cannot be written.
    """
    config = model.peft_config[ADAPTER]
    settings = config.to_dict()
    state = {name: tensor.float() for name, tensor in adapter_state(model).items()}
    if changes_base(str(settings["init_lora_weights"])):
        assert initial, "the base was changed at injection; pass Injected.initial to save_adapter"
        state = _on_untouched_base(state, initial)
        scaling = next(iter(adapter_layers(model).values())).scaling[ADAPTER]
        rank = 2 * settings["r"]
        # s = alpha / rank for every reader, so that none has to know of rsLoRA.
        settings |= {"r": rank, "lora_alpha": _plain_alpha(scaling, rank), "use_rslora": False}
    settings |= {
        "base_model_name_or_path": metadata.base_model,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    settings = {
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG_FILE, _json(settings))
    # Through bytes: safetensors' own writer would leave mode 0600.
    write_file(folder / WEIGHTS_FILE, safetensors_bytes(state, metadata={"format": "pt"}))
    write_file(folder / METADATA_FILE, _json(metadata.model_dump(mode="json")))


def read_adapter(folder: Path) -> AdapterInfo:
    """Settings and tensor shapes of an adapter folder, by myna or by peft.

    Raises ConfigError if it is no LoRA adapter in safetensors; StorageError if a file is broken.
    """
    _check_files(folder)
    check_file(folder, CONFIG_FILE, MAX_JSON_BYTES)
    check_file(folder, WEIGHTS_FILE)
    config = _read_json(folder / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"{folder / CONFIG_FILE}: peft_type is {kind!r}; myna reads LORA adapters only."
        )
    shapes = _read_shapes(folder / WEIGHTS_FILE)
    check_settings(folder / CONFIG_FILE, config, shapes)
    targets = config.get("target_modules") or ()
    return AdapterInfo(
        folder=folder,
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        init=_init_name(config.get("init_lora_weights", True)),
        base_model=config.get("base_model_name_or_path"),
        metadata=_read_metadata(folder / METADATA_FILE),
        shapes=shapes,
        config=config,
    )


def check_origin(
    info: AdapterInfo,
    *,
    base: str,
    tokenizer: str | None = None,
    template: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Whether the adapter was trained with what it is to be used with.

    Fingerprints of the base, of the tokenizer and of the chat template; None is not compared, nor
    is what the adapter does not say (those of other tools say nothing). Returns notes: with `force`
    the differences, which otherwise are a ConfigError with both fingerprints.
    """
    if info.metadata is None:
        return ()
    found = {
        "base": (info.metadata.base_fingerprint, base),
        "tokenizer": (info.metadata.tokenizer_fingerprint, tokenizer),
        "chat template": (info.metadata.template_sha256, template),
    }
    differing = [
        f"trained with the {name} {then}; here is {now}"
        for name, (then, now) in found.items()
        if then is not None and now is not None and then != now
    ]
    if differing and not force:
        lines = "\n".join(f"  {line}" for line in differing)
        raise ConfigError(
            f"{info.folder} does not belong here (its base was {info.base_model}):\n{lines}\n"
            "  Use what it was trained with, or say --force-base to use it all the same."
        )
    return tuple(f"forced by --force-base: {line}" for line in differing)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in `folder` on `model` for inference: frozen, evaluation mode, float32.

    Raises ConfigError for a folder that is none, and for shapes that do not fit, before anything is
    allocated. Whether it is the right model is `check_origin`'s.
    """
    info = read_adapter(folder)
    _check_base(info, model)
    return _load(model, info, trainable=False, dropout=info.dropout)


def with_places(model: PreTrainedModel, info: AdapterInfo) -> PeftModel:
    """`model`, made on the meta device, with peft's layers of the adapter and no weights in them.

    They know what the settings mean for each layer, such as its scaling. Raises ConfigError as
    `load_adapter` does.
    """
    _check_base(info, model)
    config = _peft_config(info)
    config.init_lora_weights = True  # first values need weights, and there are none
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        placed: Any = get_peft_model(model, config, adapter_name=ADAPTER)
    assert isinstance(placed, PeftModel), f"peft made a {type(placed).__name__}"
    return placed


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    """Put several adapters on `model` for inference, under the names that peft gets for them.

    Raises ConfigError as `load_adapter` does, for all of them before the first is loaded, and for
    one with trained biases: those stand in the base, which the others share.
    """
    infos = {name: read_adapter(folder) for name, folder in folders.items()}
    for info in infos.values():
        _check_base(info, model)
        if info.config.get("bias", "none") != "none":
            raise ConfigError(
                f"{info.folder} has trained biases (bias {info.config['bias']!r}), which change "
                "the base itself; the models of one server share it.\n"
                "  Merge it into the base with peft and serve the merged model."
            )
    (first, info), *others = infos.items()
    loaded = _load(model, info, trainable=False, dropout=info.dropout, name=first)
    for name, info in others:
        with _own_warnings(info):
            loaded.load_adapter(str(info.folder), adapter_name=name, torch_device="cpu")
    return loaded


def inject_from(
    model: PreTrainedModel,
    folder: Path,
    *,
    dropout: float,
) -> Injected:
    """Put the adapter in `folder` on `model` and train it on.

    Rank, alpha, targets and variants are the adapter's own; `dropout` is a matter of training and
    is the caller's. Raises ConfigError as `load_adapter` does, and for adapters that hold more than
    LoRA on linear layers or belong to a changed base.
    """
    info = read_adapter(folder)
    _check_base(info, model)
    _check_continuable(info)
    peft_model = _load(model, info, trainable=True, dropout=dropout)
    grouped: dict[str, list[str]] = {}
    for name in adapter_layers(peft_model):
        grouped.setdefault(name.rpartition(".")[2], []).append(name)
    targets = Targets({part: tuple(names) for part, names in grouped.items()}, [], ())
    return account(peft_model, targets, [])


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state` gave back into the model, in place.

    The parameters stay the same objects, so an optimizer that holds them goes on. Raises
    ConfigError, listing every difference, unless names and shapes are the model's own.
    """
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    faults = [f"{name} is missing" for name in sorted(own.keys() - state.keys())]
    faults += [f"{name} is unknown" for name in sorted(state.keys() - own.keys())]
    faults += [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if faults:
        raise ConfigError(
            "The stored adapter does not belong to this model and these lora settings:\n"
            f"{list_some(faults)}\n  Go on with the settings it was made with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _on_untouched_base(
    state: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in state.items():
        if ".lora_A." in name:
            joined[name] = torch.cat([tensor, initial[name]], dim=0)
        elif ".lora_B." in name:
            joined[name] = torch.cat([tensor, -initial[name]], dim=1)
        else:  # DoRA's magnitudes belong to the sum of base and update, which is the same.
            joined[name] = tensor
    return joined


def _plain_alpha(scaling: float, rank: int) -> float:
    """The alpha that gives `scaling` as alpha / rank; a whole number stays whole."""
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _json(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    return f"{text}\n".encode()


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        raise ConfigError(
            f"{folder}: there is no such adapter folder. {nearest} holds: {_listing(nearest)}."
        )
    if not (folder / CONFIG_FILE).is_file():
        inner = folder / "adapter"
        hint = f"\n  Did you mean {inner}?" if (inner / CONFIG_FILE).is_file() else ""
        raise ConfigError(
            f"{folder} is no adapter: it has no {CONFIG_FILE}. It holds: {_listing(folder)}.{hint}"
        )
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise ConfigError(
            f"{folder} holds adapter_model.bin only, a pickle, which can run code when it is read; "
            f"expected {WEIGHTS_FILE}.\n"
            "  If you trust its source, load it with peft and write it again with "
            "save_pretrained(folder), which writes safetensors."
        )
    raise ConfigError(
        f"{folder} has no {WEIGHTS_FILE}. It holds: {_listing(folder)}.\n"
        "  Copy the file there; a download may have been interrupted."
    )


def _listing(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) + more) or "nothing"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{file} is no valid JSON: {error}.\n  Copy the adapter again from its source."
        ) from error
    if not isinstance(value, dict) or (value.get("peft_type") == "LORA" and "r" not in value):
        raise StorageError(f"{file} does not hold peft's settings of an adapter.")
    return value


def _read_metadata(file: Path) -> AdapterMetadata | None:
    if not file.is_file():
        return None
    check_file(file.parent, file.name, MAX_JSON_BYTES)
    content = file.read_bytes()
    _refuse_newer(file, content)
    try:
        return AdapterMetadata.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the file"
        raise StorageError(
            f"{file}: {where}: {fault['msg']}.\n  Copy the adapter again from its source; without "
            f"{file.name} it is read as a plain peft adapter."
        ) from error


def _refuse_newer(file: Path, content: bytes) -> None:
    """Raise ConfigError for metadata in a format that is not known here."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return  # which the validation says better
    found = said.get("format") if isinstance(said, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise ConfigError(
            f"{file} was written by a newer version of myna ({said.get('myna_version')}): its "
            f"format is {found}, and this version reads up to {FORMAT}.\n"
            "  Use that version, or read it as a plain peft adapter by leaving the file out."
        )


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise StorageError(
            f"{file} is broken: {error}.\n  Copy the adapter again from its source."
        ) from error


def _init_name(value: object) -> str:
    return value.lower() if isinstance(value, str) else "default"


def _check_base(info: AdapterInfo, model: PreTrainedModel) -> None:
    if info.init.startswith(_LOST_BASE):
        raise ConfigError(
            f"{info.folder}: init_lora_weights is {info.init!r}: the adapter belongs to base "
            "weights that were changed before training and cannot be made again from the files.\n"
            "  Save it with peft's path_initial_model_for_weight_conversion, which writes a plain "
            "LoRA."
        )
    faults = _mismatches(info, model)
    if faults:
        raise ConfigError(
            f"{info.folder} does not fit {type(model).__name__}; it was made for "
            f"{info.base_model or 'another model'}:\n{list_some(faults)}\n"
            "  Use the base that it was trained on."
        )


def _mismatches(info: AdapterInfo, model: PreTrainedModel) -> list[str]:
    """Every tensor of the file that has no place in the model, and every one that is missing."""
    if getattr(model, "_checkpoint_conversion_mapping", None):
        return []  # peft renames the tensors of such models; a shape that fails is its error
    layers = linear_layers(model)
    faults = []
    for name, shape in info.shapes.items():
        layer_name, part = _split(name)
        if part is None or ".experts." in name:
            continue  # embeddings, whole modules, experts of older files: peft's own business
        if layer_name not in layers:
            faults.append(f"{name}: the model has no linear layer {layer_name}")
            continue
        out_features, in_features = layer_shape(layers[layer_name])
        rank = shape[0] if part == "lora_A" else shape[-1]
        expected = {
            "lora_A": (rank, in_features),
            "lora_B": (out_features, rank),
            "lora_magnitude_vector": (out_features,),
        }[part]
        if shape != expected:
            faults.append(f"{name} is {shape}, the model needs {expected}")
    return faults + _missing(info, model, layers)


def _split(name: str) -> tuple[str, str | None]:
    """`base_model.model.x.q_proj.lora_A.weight` into `x.q_proj` and `lora_A`."""
    found = re.fullmatch(
        r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name
    )
    return (found[1], found[2]) if found else (name, None)


def _missing(
    info: AdapterInfo, model: PreTrainedModel, layers: Mapping[str, nn.Module]
) -> list[str]:
    if not info.target_modules or info.target_modules == "all-linear":
        return []
    config = _peft_config(info)
    present = {_split(name) for name in info.shapes}
    return [
        f"{_PREFIX}{layer}.{part}.weight is missing in the file"
        for layer in layers
        if check_target_module_exists(config, layer)
        for part in ("lora_A", "lora_B")
        if (layer, part) not in present
    ]


def _check_continuable(info: AdapterInfo) -> None:
    config = info.config
    reason = None
    if changes_base(info.init):
        reason = f"init_lora_weights {info.init!r}, so it belongs to a changed base"
    elif config.get("modules_to_save"):
        reason = f"whole modules ({', '.join(config['modules_to_save'])})"
    elif config.get("bias", "none") != "none":
        reason = f"trained biases (bias {config['bias']!r})"
    elif config.get("trainable_token_indices"):
        reason = "trained token embeddings"
    elif others := sorted(name for name in info.shapes if _split(name)[1] is None):
        reason = f"tensors that are not LoRA on linear layers, such as {others[0]}"
    if reason:
        raise ConfigError(
            f"lora.start_from: {info.folder} has {reason}; myna goes on with plain LoRA only.\n"
            "  Merge it into the base with peft and start from the merged model."
        )


def _peft_config(info: AdapterInfo) -> LoraConfig:
    values = {key: value for key, value in info.config.items() if key != "runtime_config"}
    config: LoraConfig = PeftConfig.from_peft_type(**values)
    return config


def _load(
    model: PreTrainedModel,
    info: AdapterInfo,
    *,
    trainable: bool,
    dropout: float,
    name: str = ADAPTER,
) -> PeftModel:
    config = _peft_config(info)
    config.lora_dropout = dropout
    with _own_warnings(info):
        loaded: PeftModel = PeftModel.from_pretrained(
            model,
            str(info.folder),
            adapter_name=name,
            config=config,
            is_trainable=trainable,
            torch_device="cpu",
        )
    return loaded


@contextlib.contextmanager
def _own_warnings(info: AdapterInfo) -> Iterator[None]:
    """What peft warns of while it loads: missing tensors are an error, news of its own nothing."""
    # peft draws first values that the file replaces at once.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = str(warning.message)
        if "missing adapter keys" in text:
            raise ConfigError(f"{info.folder}: {text}\n  Copy the adapter again from its source.")
        if not issubclass(warning.category, FutureWarning | DeprecationWarning):
            warnings.warn(text, stacklevel=4)
