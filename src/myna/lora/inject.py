"""Injection: an adapter of a given shape into a model, through peft.

Owns the change of the model and the account of it: which layers matched, how much of the model
they are, how many parameters train. Which layers are meant is decided in `targets.py`, the first
values in `initial.py`; files are `adapter_file.py`. Gradient checkpointing is the training loop's
(non-reentrant, so no input has to require a gradient).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from myna.errors import ConfigError
from myna.lora.initial import (
    changes_base,
    check_init,
    layer_generator,
    needs_weight,
    random_values,
    values_from_weight,
)
from myna.lora.targets import (
    Targets,
    find_targets,
    fused_experts,
    layer_shape,
    linear_layers,
    output_head,
)

ADAPTER = "default"
"""peft's name of the one adapter that a model of ours carries."""


@dataclass(frozen=True)
class Injected:
    """A model with a trainable adapter, and the account of it."""

    model: PeftModel
    matches: Mapping[str, int]
    """Layers per target name."""
    trainable_by_target: Mapping[str, int]
    """Trained parameters per target name."""
    covered: float
    """Adapted share (0 to 1) of the parameters in linear layers and fused experts, head apart."""
    trainable: int
    total: int
    """All parameters, the adapter's included, tied ones once."""
    warnings: tuple[str, ...]
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """First A and B of an initialisation that changed the base (PiSSA, OLoRA), float32 on the CPU,
    else empty. Saving needs them."""

    @property
    def summary(self) -> str:
        """`19,988,480 of 7,315,533,824 parameters trained (0.273 %), …` in one line."""
        return (
            f"{self.trainable:,} of {self.total:,} parameters trained "
            f"({100 * self.trainable / self.total:.3f} %), "
            f"in {100 * self.covered:.0f} % of the linear weights"
        )

    def table(self) -> Table:
        """Layers and trained parameters per target."""
        table = Table()
        table.add_column("target")
        table.add_column("layers", justify="right")
        table.add_column("trained parameters", justify="right")
        for target, layers in self.matches.items():
            table.add_row(target, f"{layers:,}", f"{self.trainable_by_target[target]:,}")
        return table


def inject(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    use_rslora: bool,
    use_dora: bool,
    init: str,
    seed: int,
) -> Injected:
    """Freeze `model`, put A (rank, in) and B (out, rank) beside each target layer, and count.

    The layer then computes `W x + s B A dropout(x)` with `s = alpha / rank`, or
    `alpha / sqrt(rank)` with rsLoRA (Hu et al. 2021; Kalajdzievski 2023). A and B are float32
    whatever the dtype of the base. PiSSA and OLoRA replace the base weights of the target layers
    by residuals, in place. Values depend on `seed` and layer name; the global random state stays.
    On the meta device only shapes are made.

    Raises ConfigError for targets that the model has not and for impossible shapes.
    """
    if rank < 1:
        raise ConfigError(f"lora.rank is {rank}; expected a whole number of at least 1.")
    if not alpha > 0:
        raise ConfigError(f"lora.alpha is {alpha}; expected a number above 0, usual is 2 x rank.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora.dropout is {dropout}; expected a share from 0 up to below 1.")
    check_init(init, rank)
    targets = find_targets(model, target_modules)
    notes = [*targets.warnings, *_check_layers(model, targets, rank, init)]
    # peft's field is an int and other engines read it as one; a whole number stays whole.
    lora_alpha: Any = int(alpha) if float(alpha).is_integer() else alpha
    config: Any = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        target_modules=targets.for_peft,
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # peft draws first values of its own, which _fill replaces.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:  # it takes names of layers for those of fused experts
            raise ConfigError(
                f"lora.target_modules: peft cannot place the adapter on {type(model).__name__}: "
                f"{error}\n  Leave the names of its experts out, for example target_modules: "
                "[q_proj, k_proj, v_proj, o_proj]"
            ) from error
    notes += [
        str(warning.message)
        for warning in caught
        if not issubclass(warning.category, FutureWarning | DeprecationWarning)
    ]
    _check_placement(peft_model, targets)
    _fill(peft_model, init, seed)
    if changes_base(init):
        # Set after peft is done with it: tells `save_adapter` that the base is not the user's.
        config.init_lora_weights = init
    return account(peft_model, targets, notes, keep_initial=changes_base(init))


def account(
    model: PeftModel, targets: Targets, notes: list[str], *, keep_initial: bool = False
) -> Injected:
    """Counts of a model that carries an adapter on `targets`."""
    layers = adapter_layers(model)
    base = model.get_base_model()
    head = output_head(base)
    sizes = {
        name: math.prod(layer_shape(layer))
        for name, layer in linear_layers(base).items()
        # Inside an adapted layer stand base_layer, lora_A.default and lora_B.default.
        if name != head and not any(part.startswith("lora_") for part in name.split("."))
    }
    adapted = sum(
        size for name, size in sizes.items() if name.removesuffix(".base_layer") in layers
    )
    linear = sum(sizes.values()) + sum(weight.numel() for weight in fused_experts(base).values())
    trainable, total = model.get_nb_trainable_parameters()
    return Injected(
        model=model,
        matches={target: len(names) for target, names in targets.layers.items()},
        trainable_by_target={
            target: sum(
                parameter.numel()
                for name in names
                for parameter in layers[name].parameters()
                if parameter.requires_grad
            )
            for target, names in targets.layers.items()
        },
        covered=adapted / linear if linear else 1.0,
        trainable=trainable,
        total=total,
        warnings=tuple(notes),
        initial={name: value.clone() for name, value in adapter_state(model).items()}
        if keep_initial
        else {},
    )


def adapter_layers(model: PeftModel) -> dict[str, Any]:
    """The layers that carry an adapter (peft's LoraLayer), by their full name in the base model."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names they have in adapter files, on the CPU.

    Where the model is on the CPU they share memory with it: write or clone them before the next
    step.
    """
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


@contextlib.contextmanager
def adapter_switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes as its base alone; afterwards all is as it was.

    `model` may be peft's wrapper or the model inside it.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # peft makes them trainable again, loaded ones too
            parameter.requires_grad_(flag)


def list_some(lines: list[str], limit: int = 12) -> str:
    """Indented lines, at most `limit` of them, and the number of the others."""
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  and {len(lines) - limit} more")
    return "\n".join(shown)


def _check_layers(model: PreTrainedModel, targets: Targets, rank: int, init: str) -> list[str]:
    """Refuse shapes and ties that the initialisation cannot work with; warn of idle rank."""
    layers = linear_layers(model)
    shapes = {name: layer_shape(layers[name]) for name in targets.names}
    small = {name: shape for name, shape in shapes.items() if rank > min(shape)}
    if small and needs_weight(init):
        listed = [f"{name} is {a} by {b}" for name, (a, b) in small.items()]
        raise ConfigError(
            f"lora.rank is {rank}, and init {init} takes that many singular vectors of each "
            f"layer; these have fewer:\n{list_some(listed)}\n"
            f"  Lower lora.rank to {min(min(shape) for shape in small.values())} or leave those "
            "layers out of lora.target_modules."
        )
    if changes_base(init):
        _check_changeable(model, targets, init)
    notes = []
    if small:
        name, (rows, columns) = min(small.items(), key=lambda item: min(item[1]))
        notes.append(
            f"lora.rank {rank} is more than {len(small)} of the target layers can use, such as "
            f"{name}, which is {rows} by {columns}: the surplus trains without adding anything."
        )
    if use_tied := _tied_targets(model, targets):
        notes.append(
            f"{', '.join(use_tied)} shares its weight with the token embedding. The adapter acts "
            "on the layer only, so merging it into the shared weight is not possible."
        )
    return notes


def _check_changeable(model: PreTrainedModel, targets: Targets, init: str) -> None:
    layers = linear_layers(model)
    whole = (torch.float32, torch.bfloat16, torch.float16)
    for name in targets.names:
        if layers[name].weight.dtype not in whole:
            raise ConfigError(
                f"lora.init {init} starts from the base weights, and those of {name} are "
                f"{layers[name].weight.dtype}, a quantised format.\n"
                "  Use lora.init default with a quantised base."
            )
    if tied := _tied_targets(model, targets):
        raise ConfigError(
            f"lora.init {init} changes the base weight of its layers, and {', '.join(tied)} shares "
            "its weight with the token embedding.\n"
            "  Leave it out of lora.target_modules or use lora.init default."
        )


def _tied_targets(model: PreTrainedModel, targets: Targets) -> list[str]:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    shared = getattr(embedding, "weight", None)
    layers = linear_layers(model)
    return [n for n in targets.names if shared is not None and layers[n].weight is shared]


def _check_placement(model: PeftModel, targets: Targets) -> None:
    """peft renames targets of some models with fused experts; nothing is trained unannounced."""
    placed, meant = adapter_layers(model).keys(), set(targets.names)
    if placed != meant:
        differing = sorted({name.rpartition(".")[2] for name in placed ^ meant})
        raise ConfigError(
            f"lora.target_modules: peft places {', '.join(differing)} of "
            f"{type(model.get_base_model()).__name__} on its fused experts, which myna does not "
            "train.\n  Leave those names out, for example target_modules: "
            "[q_proj, k_proj, v_proj, o_proj]"
        )


@torch.no_grad()
def _fill(model: PeftModel, init: str, seed: int) -> None:
    for name, layer in adapter_layers(model).items():
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        # Guards "float32 masters whatever the base": peft creates them in the base's dtype first.
        assert A.dtype == B.dtype == torch.float32, f"{name}: adapter is {A.dtype}, not float32"
        if A.device.type == "meta":
            B.requires_grad_(init != "mica")
            continue
        base = layer.get_base_layer()
        transposed = not isinstance(base, nn.Linear)  # transformers' Conv1D keeps (in, out)
        weight = base.weight.T if transposed else base.weight
        generator = layer_generator(seed, name)
        rank, in_features = A.shape
        if needs_weight(init):
            scaling = layer.scaling[ADAPTER]
            values = values_from_weight(init, weight, rank, scaling, generator)
        else:
            values = random_values(init, B.shape[0], in_features, rank, generator)
        A.copy_(values.A)
        B.copy_(values.B)
        B.requires_grad_(values.trains_B)
        if values.residual is not None:
            weight.copy_(values.residual)
