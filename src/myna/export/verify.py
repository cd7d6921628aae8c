"""Verification: whether a merged folder says what base and adapter say, before it gets its name.

Owns the comparison of logits on a few texts, the number format it is made in, and the bounds beyond
which a result is refused. It knows nothing of how the result was made, so that a fault there, or a
tensor that transformers renames or reshapes as it loads, is found here.

T tokens, V vocabulary.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from myna.device import choose_compute, memory_available
from myna.errors import ConfigError, MynaError
from myna.lora.adapter_file import load_adapter
from myna.models.load import load_model, quiet_transformers

MOST_TEXTS = 8
MOST_TOKENS = 512
"""Of each text, from its beginning."""
POSITIONS = 64
"""Of each text, its last: logits of a large vocabulary are large."""


@dataclass(frozen=True)
class Bound:
    """Most that two models may differ which are the same but for rounding."""

    mean_kl: float
    largest_kl: float


BOUNDS: Mapping[torch.dtype, Bound] = {
    torch.float32: Bound(1e-7, 1e-5),
    torch.float16: Bound(2e-4, 1e-2),
    torch.bfloat16: Bound(1e-2, 3e-1),
}
"""By the format that weights are stored in.

Each merged weight is off by up to u = 2^-24, 2^-11 or 2^-8 of its size, by about 0.4 u in the root
mean square, and these errors are independent. Through some 200 matrix products in a row they become
sqrt(200) * 0.4 u of a logit's spread (about 3): 0.008 in float16 and 0.07 in bfloat16. A KL
divergence is half the square of that: 3e-5 and 2e-3 in the mean. The bounds leave room for models
that are less regular, and more for the single worst position; in float32 for sums that are made in
another order. What was measured is in `benchmarks/README.md`; an adapter that was added wrongly, or
not at all, is off by 0.1 and more.
"""


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart on the same texts."""

    texts: int
    positions: int
    mean_kl: float
    largest_kl: float
    """In nats: KL(base with adapter || merged) at one position."""
    largest_difference: float
    """Of one logit."""
    compared_in: torch.dtype

    def __str__(self) -> str:
        """As the command line prints it."""
        return (
            f"{self.positions:,} positions of {self.texts} texts in {_name(self.compared_in)}: KL "
            f"divergence {self.mean_kl:.1e} in the mean, {self.largest_kl:.1e} at most; logits "
            f"differ by {self.largest_difference:.1e} at most"
        )


def place_for(num_parameters: int) -> tuple[str, torch.dtype]:
    """Device and number format to compare in: float32, where there is memory for the model."""
    needed = int(4.4 * num_parameters)  # and a tenth for what is computed
    device = choose_compute("auto", "float32").device
    for place in dict.fromkeys((device, "cpu")):
        if memory_available(place) > needed:
            return place, torch.float32
    return "cpu", torch.bfloat16


def logits_with_adapter(
    base: str, adapter: Path, texts: Sequence[Sequence[int]], device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Logits (T, V) in float32 of base and adapter on each text."""
    model = load_model(base, dtype=dtype, device=torch.device(device)).model
    load_adapter(model, adapter)
    return _logits(model, texts)


def logits_of_folder(
    folder: Path, texts: Sequence[Sequence[int]], device: str, dtype: torch.dtype
) -> list[Tensor]:
    """The same of a plain transformers folder, loaded as everybody would and without its code.

    Raises MynaError where it does not load, ConfigError where a tensor is missing or left over.
    """
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                device_map={"": torch.device(device)} if device != "cpu" else None,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (ValueError, ImportError, OSError, RuntimeError, SafetensorError) as error:
        raise MynaError(
            f"The merged model does not load with transformers ({type(error).__name__}: {error}); "
            "nothing was written. This is a bug in myna: please report it with the base's name."
        ) from error
    model, info = loaded
    faults = [f"{kind}: {sorted(found)[:5]}" for kind, found in info.items() if found]
    if faults:
        raise ConfigError(
            f"The merged model does not load whole ({'; '.join(faults)}); nothing was written.\n"
            "  transformers converts the weights of this architecture as it loads them, which a "
            "merge does not do. Use the adapter as it is."
        )
    return _logits(model.eval(), texts)


def compare(reference: Sequence[Tensor], merged: Sequence[Tensor], dtype: torch.dtype) -> Agreement:
    """Distance of the merged model's logits from those of base and adapter."""
    divergences, difference = [], 0.0
    for theirs, ours in zip(reference, merged, strict=True):
        wanted, found = (torch.log_softmax(value.double(), dim=-1) for value in (theirs, ours))
        divergences.append((wanted.exp() * (wanted - found)).sum(dim=-1))
        difference = max(difference, float((theirs - ours).abs().max()))
    # Rounding may leave it a little below zero; what is no number stays none.
    divergence = torch.cat(divergences).clamp(min=0.0)
    return Agreement(
        texts=len(reference),
        positions=len(divergence),
        mean_kl=float(divergence.mean()),
        largest_kl=float(divergence.max()),
        largest_difference=difference,
        compared_in=dtype,
    )


def refuse_disagreement(agreement: Agreement, stored: torch.dtype) -> None:
    """Raise ConfigError for models that differ by more than the rounding of their formats."""
    coarser = max((stored, agreement.compared_in), key=lambda dtype: torch.finfo(dtype).eps)
    bound = BOUNDS[coarser]
    # A value that is no number is beyond every bound.
    if agreement.mean_kl <= bound.mean_kl and agreement.largest_kl <= bound.largest_kl:
        return
    mend = (
        "  Merge with --dtype float32, which rounds nothing, or use the adapter as it is."
        if stored != torch.float32
        else "  transformers may convert the weights of this architecture as it loads them. Use "
        "the adapter as it is."
    )
    raise ConfigError(
        f"The merged model does not say what base and adapter say: {agreement}.\n"
        f"  Rounding to {_name(coarser)} explains {bound.mean_kl:.0e} in the mean and "
        f"{bound.largest_kl:.0e} at most. Nothing was written.\n{mend}"
    )


def _logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    found = []
    with torch.inference_mode():
        for ids in texts:
            batch = torch.tensor([list(ids)[:MOST_TOKENS]], device=model.device)
            logits = model(input_ids=batch, use_cache=False).logits[0, -POSITIONS:]
            found.append(logits.float().cpu())
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
