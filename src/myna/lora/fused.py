"""peft's LoRA layers computed by `ops.lora_linear`.

Owns which layers that is and what stays peft's: whatever is not one plain adapter on a frozen
linear layer (DoRA, merged or disabled adapters, several at once, quantised or offloaded weights,
autocast) goes through peft's own forward. Parameters, names and files are peft's in any case.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from myna.ops.lora_linear import lora_linear


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


class FusedLoraLinear(Linear):
    """peft's LoRA layer with a forward in one operation for the plain case; made by `fuse`."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., I) to (..., O), as peft's."""
        if args or kwargs or not self._is_plain(x):
            inherited: Tensor = super().forward(x, *args, **kwargs)
            return inherited
        layer: Any = self  # nn.Module's attributes are Tensor or Module to the type checker
        name = self.active_adapters[0]
        dropout = layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return lora_linear(
            x,
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            p,
            int(torch.randint(1 << 62, ())) if p else 0,
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
