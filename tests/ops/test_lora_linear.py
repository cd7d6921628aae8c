"""Against the formula in float64 by autograd, and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from myna.ops.lora_linear import lora_linear

SCALING = 1.7


def tensors(
    shape: tuple[int, ...] = (50,), dtype: torch.dtype = torch.float32, inner: int = 40
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    given = {
        "x": draw(*shape, inner).to(dtype).requires_grad_(),
        "weight": (draw(24, inner) / inner**0.5).to(dtype),
        "bias": draw(24).to(dtype),
        "A": (draw(4, inner) / inner**0.5).float(),
        "B": draw(24, 4).float(),
        "g": draw(*shape, 24).to(dtype),
    }
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("A", "B"):
        given[name] = given[name].to(masters).requires_grad_()
    return given


def exact(given: dict[str, Tensor], *, bias: bool) -> dict[str, Tensor]:
    t = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    y = t["x"] @ t["weight"].T + (t["x"] @ t["A"].T @ t["B"].T) * SCALING
    y = y + t["bias"] if bias else y
    dx, dA, dB = torch.autograd.grad(y, (t["x"], t["A"], t["B"]), t["g"])
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def ours(
    given: dict[str, Tensor], *, bias: bool, p: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    t = given
    y = lora_linear(
        t["x"], t["weight"], t["bias"] if bias else None, t["A"], t["B"], SCALING, p, seed
    )
    dx, dA, dB = torch.autograd.grad(y, (t["x"], t["A"], t["B"]), t["g"])
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((found[name].double() - value).norm() / value.norm()).item()
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("shape", [(50,), (3, 7), (1,), (2, 1, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    given = tensors(shape)
    found = ours(given, bias=bias)
    assert max(errors(found, exact(given, bias=bias)).values()) < 1e-6
    assert found["y"].shape == (*shape, 24)
    assert found["dx"].shape == given["x"].shape


def test_an_input_that_is_not_contiguous() -> None:
    given = tensors((6, 5))
    given["x"] = given["x"].detach().transpose(0, 1).requires_grad_()
    given["g"] = given["g"].transpose(0, 1)
    assert max(errors(ours(given, bias=True), exact(given, bias=True)).values()) < 1e-6


def test_bfloat16_is_no_worse_than_products_of_float32_copies() -> None:
    given = tensors((400,), torch.bfloat16, inner=128)
    wanted = exact(given, bias=True)
    mine = errors(ours(given, bias=True), wanted)
    t = given
    low = torch.nn.functional.linear(t["x"].float(), t["A"]) @ t["B"].T * SCALING
    y = (torch.nn.functional.linear(t["x"], t["weight"], t["bias"]) + low).to(torch.bfloat16)
    dx, dA, dB = torch.autograd.grad(y, (t["x"], t["A"], t["B"]), t["g"])
    theirs = errors({"y": y, "dx": dx, "dA": dA, "dB": dB}, wanted)
    # Outputs have bfloat16's rounding either way (2^-9 a step, a few steps); A and B are rounded
    # once for the products and this shows in the gradients.
    for name, error in mine.items():
        assert error < max(2 * theirs[name], 2.0**-8), (name, mine, theirs)
    assert ours(given, bias=True)["dA"].dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_backward_is_the_derivative_of_the_forward(p: float) -> None:
    given = tensors((5,), torch.float64, inner=6)
    g = given
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, g["weight"], g["bias"], A, B, SCALING, p, 11),
        (g["x"], g["A"], g["B"]),
    )


def test_only_what_is_asked_for_is_computed() -> None:
    given = tensors()
    x, B = given["x"].detach(), given["B"].detach()
    y = lora_linear(x, given["weight"], None, given["A"], B, SCALING, 0.0, 0)
    y.backward(given["g"])
    assert given["A"].grad is not None
    assert x.grad is None and B.grad is None
    frozen = lora_linear(x, given["weight"], None, given["A"].detach(), B, SCALING, 0.0, 0)
    assert not frozen.requires_grad


def test_three_layers_on_one_input_keep_it_once() -> None:
    given = tensors((64,), torch.bfloat16, inner=128)
    x = given["x"].detach() * 1
    x.requires_grad_()
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [  # held, or the memory of one layer would be taken again by the next
            lora_linear(x, given["weight"], None, given["A"], given["B"], SCALING, 0.1, seed)
            for seed in range(3)
        ]
    assert len(outputs) == 3
    weights = sum(given[n].untyped_storage().nbytes() for n in ("weight", "A", "B"))
    # x in bfloat16 once, and (T, R) numbers of each layer; no mask.
    assert sum(storages.values()) - weights == 64 * 128 * 2 + 3 * 64 * 4 * 2


def mask_of(seed: int, p: float, shape: tuple[int, int] = (200, 300)) -> Tensor:
    """The mask over what it keeps, read off the output of an identity."""
    x, eye = torch.ones(shape), torch.eye(shape[1])
    return lora_linear(x, torch.zeros(shape[1], shape[1]), None, eye, eye, 1.0, p, seed)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    for p in (0.05, 0.5):
        mask = mask_of(1, p)
        assert (mask == 0).float().mean().item() == pytest.approx(p, abs=4 * (p / 60_000) ** 0.5)
        assert mask[mask != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
    # Neither rows nor columns share a mask.
    share = (mask_of(1, 0.5) == 0).float()
    assert share.mean(0).std() < 0.05 and share.mean(1).std() < 0.05


def test_dropout_averages_to_none() -> None:
    given = tensors()
    args = given["weight"], given["bias"], given["A"], given["B"], SCALING
    with torch.no_grad():
        mean = sum(lora_linear(given["x"], *args, 0.2, seed) for seed in range(2000)) / 2000
        plain = lora_linear(given["x"], *args)
        update = plain - lora_linear(given["x"], *args[:-1], 0.0)
    # Standard deviation of one: about sqrt(p / (1 - p)) = 0.5 of the update.
    assert (mean - plain).norm() / update.norm() < 0.05


def test_dropout_is_a_function_of_the_seed() -> None:
    assert torch.equal(mask_of(5, 0.1), mask_of(5, 0.1))
    different = (mask_of(5, 0.5) != mask_of(6, 0.5)).float().mean().item()
    assert different == pytest.approx(0.5, abs=0.02)
    given = tensors()
    none, zero = ours(given, bias=True), ours(given, bias=True, p=0.0, seed=9)
    assert all(torch.equal(none[name], zero[name]) for name in none)


def test_recomputed_in_the_backward_it_is_the_same() -> None:
    given = tensors()
    args = given["weight"], None, given["A"], given["B"], SCALING, 0.2, 4
    plain = torch.autograd.grad(
        lora_linear(given["x"], *args), (given["x"], given["A"], given["B"]), given["g"]
    )
    again = torch.autograd.grad(
        checkpoint(lora_linear, given["x"], *args, use_reentrant=False),
        (given["x"], given["A"], given["B"]),
        given["g"],
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
