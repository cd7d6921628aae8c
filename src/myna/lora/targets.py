"""Targets: which linear layers of a model `lora.target_modules` names.

Owns the meaning of that setting (a list of names, one name, a regular expression, `all-linear`),
the errors for names that the model has not, and the warnings about linear weights that a setting
cannot reach or should perhaps not reach. The adapter itself is left to `inject.py`. The rules are
those of peft, which is stricter here in one point: every single name has to exist.
"""

# mypy: untyped-calls-exclude="transformers"
# (transformers annotates its arguments but few of its return types.)

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from myna.errors import ConfigError

ALL_LINEAR = "all-linear"
_LINEAR = (nn.Linear, Conv1D)
_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Targets:
    """The layers that a setting names.

    `layers` maps each target name (as the user wrote it; the last part of the layer's name for an
    expression or `all-linear`) to the full names of its layers, in the model's order.
    """

    layers: Mapping[str, tuple[str, ...]]
    for_peft: str | list[str]
    """The same setting as peft has to be given it, where a string is always an expression."""
    warnings: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of all layers, each once."""
        return tuple(dict.fromkeys(name for names in self.layers.values() for name in names))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the model by its full name, the output head included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, also where its weight is packed or transposed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, Conv1D), f"{type(layer).__name__} is no linear layer"
    in_features, out_features = layer.weight.shape
    return out_features, in_features


def output_head(model: nn.Module) -> str | None:
    """Full name of the layer that makes the logits, or None for a model without one."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Expert weights kept as one parameter of shape (experts, …), out of reach of linear layers."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "expert" in module_name.lower()
    }


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> Targets:
    """The layers that `target_modules` names in `model`.

    A list holds names: a layer is meant if its full name is the entry or ends in `.` + entry. A
    string of letters, digits, `_`, `-` and `.` is a list of one; `all-linear` is every linear layer
    but the output head; any other string is a regular expression that has to match a full name.

    Raises ConfigError if a name is missing, names something that is no linear layer, if an
    expression is invalid, or if nothing is named.
    """
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for_peft: str | list[str] = names
    if [name.lower() for name in names] == [ALL_LINEAR]:
        head = output_head(model)
        grouped = _by_last_part([name for name in linear_layers(model) if name != head])
        # Spelled out: told "all-linear", peft adapts the fused experts of Mixtral as well.
        for_peft = _shortest_names(model, grouped)
    elif isinstance(target_modules, str) and not _PLAIN_NAME.fullmatch(target_modules):
        grouped = _by_expression(model, target_modules)
        for_peft = target_modules
    else:
        grouped = _by_name(model, names)
    if not any(grouped.values()):
        raise ConfigError(
            "lora.target_modules names no layer at all; expected names of linear layers.\n"
            f"{_what_there_is(model)}"
        )
    warnings = [_missed_experts(model)]
    if isinstance(for_peft, list):
        warnings.append(_outside_text_model(model, grouped))
    return Targets(grouped, for_peft, tuple(text for text in warnings if text))


def _by_last_part(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    grouped = defaultdict(list)
    for name in names:
        grouped[name.rpartition(".")[2]].append(name)
    return {part: tuple(names) for part, names in grouped.items()}


def _shortest_names(model: nn.Module, grouped: Mapping[str, Sequence[str]]) -> list[str]:
    """Last parts of the names where they mean just these layers, else full names."""
    chosen = {name for names in grouped.values() for name in names}
    parts = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in grouped}
    return sorted(grouped) if parts == chosen else sorted(chosen)


def _by_name(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    modules = [name for name, _ in model.named_modules() if name]
    grouped = {
        target: tuple(name for name in modules if name == target or name.endswith(f".{target}"))
        for target in targets
    }
    missing = [target for target, names in grouped.items() if not names]
    if missing:
        raise ConfigError(_missing_names(model, missing))
    for target, names in grouped.items():
        _refuse_other_modules(model, f'"{target}"', names)
    return grouped


def _by_expression(model: nn.Module, expression: str) -> dict[str, tuple[str, ...]]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules: {expression!r} is no valid regular expression: {error}.\n"
            r"  Example: .*\.(q_proj|v_proj)  Plain names go into a list: [q_proj, v_proj]"
        ) from None
    names = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
    if not names:
        raise ConfigError(
            f"lora.target_modules: the expression {expression!r} matches no layer of "
            f"{type(model).__name__}; it has to match the whole name, such as "
            f'"{next(iter(linear_layers(model)), "")}".\n{_what_there_is(model)}'
        )
    _refuse_other_modules(model, f"the expression {expression!r}", names)
    return _by_last_part(names)


def _refuse_other_modules(model: nn.Module, what: str, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    others = [name for name in names if not isinstance(modules[name], _LINEAR)]
    if others:
        first = others[0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"lora.target_modules: {what} names {first} ({type(modules[first]).__name__}){more}; "
            f"an adapter goes on linear layers only.\n{_what_there_is(model)}"
        )


def _missing_names(model: nn.Module, missing: Sequence[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    listed = ", ".join(missing)
    verb = "is" if len(missing) == 1 else "are"
    lines = [f"lora.target_modules: {listed} {verb} not in this model ({type(model).__name__})."]
    for name in missing:
        if near := _nearest(name, known):
            lines.append(f'  "{name}": did you mean "{near}"?')
    lines.append(_what_there_is(model))
    return "\n".join(lines)


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The one most similar name; None if none is or several are equally so (c_proj: o_, q_ …)."""
    likeness = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    best = max(likeness.values(), default=0.0)
    nearest = [other for other, ratio in likeness.items() if ratio == best]
    return nearest[0] if best > 0.75 and len(nearest) == 1 else None


def _what_there_is(model: nn.Module) -> str:
    head = output_head(model)
    counts = Counter(name.rpartition(".")[2] for name in linear_layers(model) if name != head)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    lines = [f"  Linear layers it has: {listed or 'none'}."]
    if head is not None:
        lines[0] = lines[0][:-1] + f"; output head: {head}."
    if experts := fused_experts(model):
        parts = sorted({name.rpartition(".")[2] for name in experts})
        lines.append(
            f"  Its experts are fused tensors ({', '.join(parts)}), which are no linear layers "
            "and take no adapter."
        )
    lines.append("  target_modules: all-linear takes all of them but the output head.")
    return "\n".join(lines)


def _missed_experts(model: nn.Module) -> str:
    experts = fused_experts(model)
    if not experts:
        return ""
    counts = Counter(name.rpartition(".")[2] for name in experts)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    size = sum(parameter.numel() for parameter in experts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"The experts of this model are fused tensors and get no adapter: {listed}, "
        f"{size:,} parameters, {100 * size / total:.1f} % of the model."
    )


def _outside_text_model(model: nn.Module, grouped: Mapping[str, Sequence[str]]) -> str:
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = output_head(model)
    outside = {
        target: [n for n in names if not n.startswith(f"{prefix}.") and n != head]
        for target, names in grouped.items()
    }
    outside = {target: names for target, names in outside.items() if names}
    if not prefix or not outside:
        return ""
    listed = ", ".join(f"{target} ({len(names)})" for target, names in outside.items())
    example = next(iter(outside.values()))[0]
    names = "|".join(grouped)
    return (
        f"target_modules also matches layers outside the text model: {listed}, such as {example}. "
        f"They are trained too. To leave them out: {re.escape(prefix)}.*\\.({names})"
    )
