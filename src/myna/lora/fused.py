"""peft's LoRA layers computed by `ops.lora_linear`.

Owns which layers that is, whether their weights are prepacked, and what stays peft's: whatever is
not one plain adapter on a frozen linear layer (DoRA, merged or disabled adapters, several at once,
quantised or offloaded weights, autocast) goes through peft's own forward. Parameters, names and
files are peft's in any case.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from myna.ops.lora_linear import lora_linear
from myna.ops.prepacked import Prepacked, can_prepack, gain, prepack

WORTH_ITS_MEMORY = 1.15
"""Times as fast as plain products that prepacked ones have to be to take two copies of the weights.
On Zen 4 they are 1.05 to 1.07 times as fast (`benchmarks/README.md`)."""


def fuse(model: nn.Module) -> int:
    """Let the plain LoRA layers of `model` (peft's, after injection) compute by `lora_linear`.

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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code draws other numbers
def _with_dropout(*args: Any, **options: Any) -> Tensor:
    """`lora_linear` under a seed from torch's global CPU generator."""
    options["seed"] = int(torch.randint(1 << 62, ()))
    return lora_linear(*args, **options)


def _fused_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLoraLinear)]


class FusedLoraLinear(Linear):
    """peft's LoRA layer with a forward in one operation for the plain case; made by `fuse`."""

    prepacked: Prepacked | None = None
    """Copies of the base layer's weight, by `prepack_weights`."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., I) to (..., O), as peft's."""
        if args or kwargs or not self._is_plain(x):
            inherited: Tensor = super().forward(x, *args, **kwargs)
            return inherited
        layer: Any = self  # nn.Module's attributes are Tensor or Module to the type checker
        name = self.active_adapters[0]
        dropout = layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        compute = _with_dropout if p else lora_linear
        return compute(
            x,
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            dropout_p=p,
            prepacked=self.prepacked,
        )

    def _is_plain(self, x: Tensor) -> bool:
        """Whether `lora_linear` computes what peft would."""
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
