"""Initial values of A and B, and what they take out of the base.

Owns the numbers only: for one layer, A (rank, in), B (out, rank) and, for initialisations that
start from the base's own principal part, the residual base weight, so that base and adapter
together still compute the base. peft has the same ones; they are computed here because peft
rounds A and B to the dtype of the base after subtracting their unrounded product, which shifts a
bfloat16 model before its first step, and because each layer draws from a generator of its own
here: the values depend on seed and layer name, not on the other layers or on the global generator.
Which layers are filled is left to `inject.py`.
"""

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from myna.errors import ConfigError

_OFFERED = "default, gaussian, pissa, pissa_niter_16 (or another number), olora, orthogonal, mica"
_NOT_OFFERED = {
    "eva": "looks at activations on the training data",
    "corda": "looks at covariances on sample data",
    "lora_ga": "looks at gradients on the training data",
    "loftq": "belongs to quantising the base",
}
_NITER = re.compile(r"pissa_niter_(\d+)")


@dataclass(frozen=True)
class InitialValues:
    """First values of one layer, float32.

    `residual` (out, in) replaces the base weight, or is None where the base stays as it is.
    `trains_B` is False where the method keeps B fixed.
    """

    A: Tensor
    B: Tensor
    residual: Tensor | None = None
    trains_B: bool = True


def check_init(init: str, rank: int) -> None:
    """Raise ConfigError unless `init` is offered and possible with this rank."""
    if init in _NOT_OFFERED:
        raise ConfigError(
            f'lora.init: "{init}" {_NOT_OFFERED[init]}, which myna does not do before training.\n'
            f"  Offered: {_OFFERED}."
        )
    plain = ("default", "gaussian", "pissa", "olora", "orthogonal", "mica")
    if init not in plain and not _NITER.fullmatch(init):
        raise ConfigError(f'lora.init: "{init}" is unknown.\n  Offered: {_OFFERED}.')
    if init == "orthogonal" and rank % 2:
        raise ConfigError(
            f"lora.init: orthogonal needs an even lora.rank, not {rank}; it gives one half of the "
            f"directions to A and the other to B.\n  Set lora.rank to {rank + 1}."
        )


def changes_base(init: str) -> bool:
    """Whether this initialisation takes its start out of the base weights."""
    return init == "olora" or init.startswith("pissa")


def needs_weight(init: str) -> bool:
    """Whether this initialisation reads the base weight, so that rank <= min(in, out) must hold."""
    return changes_base(init) or init == "mica"


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the layer's full name only."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_values(
    init: str, out_features: int, in_features: int, rank: int, generator: torch.Generator
) -> InitialValues:
    """First values that do not look at the base, on the CPU; together they compute zero.

    default      A uniform in ±1/sqrt(in), B zero (Hu et al. 2021, "LoRA", the authors' code)
    gaussian     A normal with deviation 1/rank, B zero
    orthogonal   A and B random with B A = 0, neither of them zero
    """
    if init == "orthogonal":
        # The rows of Q are orthonormal: A lives in the even ones and B in the odd ones, so B A = 0.
        Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
        A = Q[0::2].T @ torch.randn(rank // 2, in_features, generator=generator) / 10
        B = torch.randn(out_features, rank // 2, generator=generator) @ Q[1::2] / 10
        return InitialValues(A, B)
    A = torch.empty(rank, in_features)
    if init == "gaussian":
        A.normal_(std=1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(in_features)
        A.uniform_(-bound, bound, generator=generator)
    return InitialValues(A, torch.zeros(out_features, rank))


def values_from_weight(
    init: str, weight: Tensor, rank: int, scaling: float, generator: torch.Generator
) -> InitialValues:
    """First values made from the base weight (out, in), on its device; rank <= min(out, in).

    pissa   the `rank` largest singular triples (Meng et al. 2024, "PiSSA", section 3);
            pissa_niter_N finds them by N subspace iterations (Halko et al. 2009, algorithm 4.4)
    olora   the first `rank` columns of Q and rows of R in W = Q R (Büyükakyüz 2024, "OLoRA")
    mica    B the left singular vectors of the smallest singular values, fixed; A zero
            (Minor Component Adaptation, arXiv 2604.01694)
    """
    weight = weight.float()
    if init == "mica":
        U = torch.linalg.svd(weight, full_matrices=False)[0]
        A = torch.zeros(rank, weight.shape[1], device=weight.device)
        return InitialValues(A, U[:, -rank:].contiguous(), trains_B=False)
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        A, B = R[:rank].contiguous(), Q[:, :rank].contiguous()
    else:
        U, S, Vh = _principal_part(weight, rank, init, generator)
        root = (S / scaling).sqrt()
        A, B = root[:, None] * Vh, U * root
    return InitialValues(A, B, residual=weight - scaling * (B @ A))


def _principal_part(
    weight: Tensor, rank: int, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), S (rank,), Vh (rank, in) of the largest singular values."""
    iterations = _NITER.fullmatch(init)
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    sketch = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)
    Q = torch.linalg.qr(weight @ sketch)[0]
    for _ in range(int(iterations[1])):
        Q = torch.linalg.qr(weight.T @ Q)[0]
        Q = torch.linalg.qr(weight @ Q)[0]
    U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, S, Vh
