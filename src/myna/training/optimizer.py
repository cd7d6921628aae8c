"""The optimizer of the adapter and the learning rate of each step.

Owns AdamW over the adapter's parameters, the schedule as a pure function of the step, and the
optimizer's state as named tensors, so that a checkpoint holds no pickle.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a linear warm-up from zero, then constant, linear or cosine to zero.

    The same numbers as transformers' `get_linear_schedule_with_warmup` and its cosine sibling.
    """

    kind: Literal["linear", "cosine", "constant"]
    peak: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        done = step - 1
        if done < self.warmup_steps:
            return self.peak * done / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that learns, in the model's order."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adamw(model: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999, 1e-8) over the trainable parameters, in torch's fused form.

    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization". The learning rate is set
    before each step.
    """
    return torch.optim.AdamW(
        list(trainable(model).values()), lr=0.0, weight_decay=weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step` of every trainable parameter, on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; KeyError for a missing tensor."""
    for name, parameter in trainable(model).items():
        optimizer.state[parameter] = {
            key: tensors[f"{name}.{key}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
