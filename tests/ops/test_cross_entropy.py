"""Against torch's cross-entropy of all logits in float64."""

import pytest
import torch
from torch import Tensor, nn

from myna.ops import cross_entropy
from myna.ops.cross_entropy import frozen_head_cross_entropy

Options = dict[str, object]


def tensors(
    rows: int = 23, vocabulary: int = 1000, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    head = (size * torch.randn(vocabulary, 32, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, head, targets, torch.rand(rows, generator=generator)


def exact(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = hidden.detach().double().requires_grad_()
    z = h @ head.double().T
    z = z if bias is None else z + bias.double()
    z = z if logit_scale is None else z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = nn.functional.cross_entropy(z, targets, reduction="none")
    loss = losses.sum() if weights is None else losses @ weights.double()
    return loss.detach(), torch.autograd.grad(loss, h)[0]


def check(tolerance: float, hidden: Tensor, *args: Tensor | None, **options: object) -> None:
    loss = frozen_head_cross_entropy(hidden, *args, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted, wanted_grad = exact(hidden, *args, **options)  # type: ignore[arg-type]
    assert loss.shape == () and grad.dtype == hidden.dtype
    assert abs(loss.item() / wanted.item() - 1) < tolerance
    assert (grad.double() - wanted_grad).norm() / wanted_grad.norm() < tolerance


BIAS = torch.linspace(-2, 2, 1000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"logit_scale": 0.25},
        {"logit_scale": -2.0},
        {"bias": BIAS},
        {"softcap": 3.0, "logit_scale": 0.5, "bias": BIAS},
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tile", [1 << 21, 23 * 256])
def test_float32(
    options: Options, weighted: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy._TILE_ELEMENTS, "cpu", tile)
    hidden, head, targets, weights = tensors()
    check(3e-6, hidden, head, targets, weights if weighted else None, **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 511, 512, 513])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
def test_every_edge_of_rows_and_tiles(
    vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy._TILE_ELEMENTS, "cpu", 1)
    monkeypatch.setitem(cross_entropy._MAX_ROWS, "cpu", 4)
    hidden, head, targets, weights = tensors(rows, vocabulary)
    loss = frozen_head_cross_entropy(hidden, head, targets, weights)
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted, wanted_grad = exact(hidden, head, targets, weights)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_flat_and_extreme_logits(size: float) -> None:
    hidden, head, targets, weights = tensors(size=size)
    check(1e-5, hidden, head, targets, weights)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_backward_is_the_derivative_of_the_forward(softcap: float | None) -> None:
    hidden, head, targets, weights = tensors(5, 40, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h: frozen_head_cross_entropy(h, head, targets, weights, softcap=softcap), hidden
    )


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_bfloat16_is_no_worse_than_the_loss_of_whole_logits(size: float) -> None:
    hidden, head, targets, weights = tensors(200, 3000, torch.bfloat16, size)
    wanted, wanted_grad = exact(hidden, head, targets, weights)
    errors = []
    for whole in (False, True):
        if whole:
            losses = nn.functional.cross_entropy(
                (hidden @ head.T).float(), targets, reduction="none"
            )
            loss = losses @ weights
        else:
            loss = frozen_head_cross_entropy(hidden, head, targets, weights)
        (grad,) = torch.autograd.grad(loss, hidden)
        difference = (grad.double() - wanted_grad).norm() / wanted_grad.norm()
        errors.append((abs(loss.item() / wanted.item() - 1), difference.item()))
    (loss_error, grad_error), (whole_loss_error, whole_grad_error) = errors
    assert loss_error < max(1.2 * whole_loss_error, 1e-4)
    assert grad_error < 1.2 * whole_grad_error


def test_a_token_that_is_known_has_an_exact_small_gradient() -> None:
    # The target's probability is about 1 - 4e-4, where bfloat16 has steps of 2^-8.
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[8.0, 4.0], [4.0, 2.0], [1.0, -3.0]], dtype=torch.bfloat16)
    loss = frozen_head_cross_entropy(hidden, head, torch.tensor([0]))
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted, wanted_grad = exact(hidden, head, torch.tensor([0]))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    assert (grad.double() - wanted_grad).norm() / wanted_grad.norm() < 1e-2


def test_no_logits_are_kept_and_no_rows_are_fine() -> None:
    hidden, head, targets, weights = tensors(64, 5000)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen_head_cross_entropy(hidden, head, targets, weights)
    assert kept == [hidden.numel()]
    nothing = frozen_head_cross_entropy(hidden[:0], head, targets[:0])
    assert nothing.item() == 0
    nothing.backward()
    with torch.no_grad():
        loss = frozen_head_cross_entropy(hidden.detach(), head, targets, weights)
    assert loss.item() == pytest.approx(exact(hidden, head, targets, weights)[0].item(), rel=1e-5)


def test_the_callers_factor_reaches_the_gradient() -> None:
    hidden, head, targets, _ = tensors()
    (plain,) = torch.autograd.grad(frozen_head_cross_entropy(hidden, head, targets), hidden)
    (third,) = torch.autograd.grad(frozen_head_cross_entropy(hidden, head, targets) / 3, hidden)
    torch.testing.assert_close(third, plain / 3)
