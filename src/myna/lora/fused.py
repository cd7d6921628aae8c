"""peft's LoRA layers computed by `ops.lora_linear`.

Owns which layers that is, which of them are multiplied together, whether their weights are
prepacked, and what stays peft's: whatever is not one plain adapter on a frozen linear layer (DoRA,
merged or disabled adapters, several at once, quantised or offloaded weights, autocast) goes through
peft's own forward. Parameters, names and files are peft's in any case.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from myna.ops.lora_linear import lora_linears
from myna.ops.prepacked import Prepacked, can_prepack, gain, prepack

WORTH_ITS_MEMORY = 1.15
"""Times as fast as plain products that prepacked ones have to be to take two copies of the weights.
On Zen 4 they are 1.05 to 1.07 times as fast (`benchmarks/README.md`)."""

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers' models call with the same tensor."""


def fuse(model: nn.Module) -> int:
    """Let the plain LoRA layers of `model` (peft's, after injection) compute by `lora_linears`.

    Returns their number. Only the forward changes: the same objects, parameters and state, and
    saved files stay peft's. After injection, by class, rather than through peft's mapping of custom
    modules: that also takes subclasses of nn.Linear (quantised weights), is private, and is not
    there for adapters that are loaded. Calling it twice changes nothing.

    Dropout draws one seed a call from torch's global CPU generator and its mask from that seed. So
    it follows `torch.manual_seed`, differs by layer and call, and is the same when
    `torch.utils.checkpoint` computes a layer again (which restores that generator).
    """
    layers = [
        module
        for module in model.modules()
        if type(module) in (Linear, FusedLoraLinear) and type(module.base_layer) is nn.Linear
    ]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)


def fuse_projections(model: nn.Module) -> int:
    """Let fused layers that read the same input multiply their frozen weights as one.

    Returns the number of such groups. For GPUs, where one wide product keeps more
    multiprocessors busy and is one launch; a CPU gains nothing. The weights of a group become views
    of one tensor, so no memory is taken. Exact: whether the input is the same tensor is seen at
    every call, and layers that are once called with different ones compute alone from then on.
    Calling it twice changes nothing.
    """
    groups = 0
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUTS:
            layers: list[Any] = [children.get(name) for name in names]
            if all(map(_can_be_grouped, layers)) and _are_alike(layers):
                group = _Group(layers)
                for layer in layers:
                    layer.group = group
                groups += 1
    return groups


def _can_be_grouped(layer: Any) -> bool:
    return isinstance(layer, FusedLoraLinear) and layer.group is None and layer.prepacked is None


def _are_alike(layers: Sequence[Any]) -> bool:
    """Whether the frozen weights can be rows of one."""
    bases = [layer.base_layer for layer in layers]
    kinds = {(b.weight.shape[1], b.weight.dtype, b.weight.device, b.bias is None) for b in bases}
    return len(kinds) == 1


class _Group:
    """Layers that are called one after the other with the same x, computed when the first is."""

    def __init__(self, layers: list[Any]) -> None:
        bases = [layer.base_layer for layer in layers]
        self._layers = layers
        self._weight = torch.cat([base.weight.detach() for base in bases])
        self._bias = None
        if bases[0].bias is not None:
            self._bias = torch.cat([base.bias.detach() for base in bases])
        sizes = [base.out_features for base in bases]
        first = 0
        for base, rows in zip(bases, sizes, strict=True):
            base.weight.data = self._weight[first : first + rows]
            first += rows
        self._x: Tensor | None = None
        self._outputs: dict[Any, Tensor] = {}

    def __deepcopy__(self, _: object) -> None:
        """The layers of a copy have weights of their own and compute alone."""

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """The output of one layer for x; None where it has to compute alone."""
        if x is not self._x or layer not in self._outputs:
            if self._outputs:  # somebody did not ask for his: not the layers we took them for
                self._dissolve()
            if layer.group is None or not self._computes(x):
                return None
            ys = _compute(x, self._weight, self._bias, self._layers)
            self._x, self._outputs = x, dict(zip(self._layers, ys, strict=True))
        y = self._outputs.pop(layer)
        if not self._outputs:
            self._x = None  # lets go of it
        return y

    def _dissolve(self) -> None:
        self._x, self._outputs = None, {}
        for layer in self._layers:
            layer.group = None

    def _computes(self, x: Tensor) -> bool:
        """Whether one product gives what the layers would: all plain, and the weights still ours.

        A model that was moved has other ones.
        """
        own: Tensor = self._layers[0].base_layer.weight
        return (
            own.data_ptr() == self._weight.data_ptr()
            and all(layer._is_plain(x) for layer in self._layers)
            and len({layer.dropout_p for layer in self._layers}) == 1
        )


def prepacking(model: nn.Module, tokens: int, free_bytes: int) -> tuple[bool, str]:
    """Whether to `prepack_weights`, and why: measured for packs of `tokens` on the largest weight.

    No where torch has no such layouts for these weights, where their two copies do not fit into
    `free_bytes`, or where the gain is less than `WORTH_ITS_MEMORY`.
    """
    weights = [layer.base_layer.weight for layer in _fused_layers(model)]
    if not weights or not all(map(can_prepack, weights)):
        return False, "weights are not prepacked: no such layouts for them"
    copies = 2 * sum(weight.nbytes for weight in weights)
    if copies > free_bytes:
        return False, f"weights are not prepacked: {copies / 1e9:.1f} GB more do not fit"
    times = gain(max(weights, key=torch.numel), tokens)
    if times < WORTH_ITS_MEMORY:
        return False, f"weights are not prepacked: {times:.2f} times as fast is too little"
    return True, f"weights are prepacked: {times:.2f} times as fast, {copies / 1e9:.1f} GB more"


def prepack_weights(model: nn.Module, tokens: int) -> None:
    """Let fused layers multiply by prepacked copies of their frozen weights."""
    for layer in _fused_layers(model):
        layer.prepacked = prepack(layer.base_layer.weight, tokens)


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layers: Sequence[Any],
    prepacked: Prepacked | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linears` of plain layers whose frozen weights are `weight`, in this order."""
    names = [layer.active_adapters[0] for layer in layers]
    adapters = [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for layer, name in zip(layers, names, strict=True)
    ]
    p = layers[0].dropout_p
    if not p:
        return lora_linears(x, weight, bias, adapters, prepacked=prepacked)
    ys: tuple[Tensor, ...] = _with_dropout(x, weight, bias, adapters, p, prepacked)
    return ys


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code draws other numbers
def _with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    p: float,
    prepacked: Prepacked | None,
) -> tuple[Tensor, ...]:
    """`lora_linears`, every layer's mask under a seed from torch's global CPU generator."""
    seeds = torch.randint(1 << 62, (len(adapters),)).tolist()
    return lora_linears(x, weight, bias, adapters, p, seeds, prepacked)


def _fused_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLoraLinear)]


class FusedLoraLinear(Linear):
    """peft's LoRA layer with a forward in one operation for the plain case; made by `fuse`."""

    prepacked: Prepacked | None = None
    """Copies of the base layer's weight, by `prepack_weights`."""
    group: _Group | None = None
    """The layers that share its input, by `fuse_projections`."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., I) to (..., O), as peft's."""
        if args or kwargs or not self._is_plain(x):
            inherited: Tensor = super().forward(x, *args, **kwargs)
            return inherited
        if self.group is not None and (y := self.group.output(self, x)) is not None:
            return y
        base: Any = self.base_layer  # nn.Module's attributes are Tensor or Module to the checker
        (y,) = _compute(x, base.weight, base.bias, [self], self.prepacked)
        return y

    @property
    def dropout_p(self) -> float:
        """Share of the adapter's input that is zeroed now."""
        dropout = self.lora_dropout[self.active_adapters[0]]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _is_plain(self, x: Tensor) -> bool:
        """Whether `lora_linears` computes what peft would."""
        base = self.base_layer
        return (
            not self.disable_adapters
            and not self.merged
            and len(self.active_adapters) == 1
            and self.active_adapters[0] in self.lora_A
            and self.active_adapters[0] not in self.lora_variant
            and self.lora_B[self.active_adapters[0]].bias is None
            and type(base) is nn.Linear
            and not hasattr(base, "_hf_hook")  # accelerate moves such weights in and out
            and x.dtype == base.weight.dtype
            and not any(parameter.requires_grad for parameter in base.parameters())
            and not torch.is_autocast_enabled(x.device.type)
        )
