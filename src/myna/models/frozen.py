"""The frozen parts between the linear layers, computed by `ops` with less kept for the backward.

Owns which norms and gated MLPs of a model that is, found by trying: a class is taken over only if
our operation gives what its own forward gives on random rows. LoRA layers are `lora/fused.py`'s.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from myna.ops.gated_product import gated_product
from myna.ops.rms_norm import rms_norm


def fuse_frozen(model: nn.Module) -> int:
    """Let RMS norms and SiLU-gated MLPs of `model` compute by one operation each.

    Returns the number of modules. Only forwards change: the same objects, parameters and state.
    Norms whose weight is trained and classes that compute something else stay as they are. Calling
    it twice changes nothing.
    """
    fused = 0
    classes: dict[tuple[type, bool], type | None] = {}
    for module in model.modules():
        key = (type(module), any(p.requires_grad for p in module.parameters(recurse=False)))
        if key not in classes:
            classes[key] = _fused_norm(module) or _fused_mlp(module)
        found = classes[key]
        if found is not None:
            module.__class__ = found
            fused += 1
    return fused


def _subclass(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> type:
    """The class of `module` with another forward; its name stays, errors and prints show it."""
    return type(type(module).__name__, (type(module),), {"forward": forward, "_is_fused": True})


def _fused_norm(module: nn.Module) -> type | None:
    weight = module._parameters.get("weight")
    eps = next((n for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or hasattr(module, "_is_fused")
        or weight is None
        or weight.ndim != 1
        or weight.requires_grad
        or len(module._parameters) != 1
        or eps is None
    ):
        return None
    for weight_offset in (False, True):

        def forward(self: Any, x: Tensor, weight_offset: bool = weight_offset) -> Tensor:
            return rms_norm(x, self.weight, getattr(self, eps), weight_offset=weight_offset)

        if _computes_the_same(module, forward, weight):
            return _subclass(module, forward)
    return None


def _fused_mlp(module: nn.Module) -> type | None:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(hasattr(module, name) for name in names) or hasattr(module, "_is_fused"):
        return None
    if len(dict(module.named_children())) != len(names) or module._parameters:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x)))
        return product

    like = next(iter(module.parameters()))
    probe = torch.linspace(-9, 9, 64, device=like.device)
    activation: Any = module.act_fn
    if not torch.equal(activation(probe), silu(probe)):
        return None
    return _subclass(module, forward) if _computes_the_same(module, forward, like) else None


@torch.no_grad()
def _computes_the_same(
    module: nn.Module, forward: Callable[[Any, Tensor], Tensor], like: Tensor
) -> bool:
    """Whether `forward` gives the module's own output on random rows, but for rounding."""
    if like.device.type == "meta":
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, like.shape[-1], generator=draw).to(like.device, like.dtype) * 2
    was_training = module.training
    module.eval()  # dropout of adapters
    try:
        own, ours = module(x), forward(module, x)
    finally:
        module.train(was_training)
    unit = torch.finfo(like.dtype).eps
    return bool((own - ours).abs().max() <= 4 * unit * own.abs().max())
