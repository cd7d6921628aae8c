import pytest
import torch
from peft import LoraConfig, get_peft_model

from myna.errors import ConfigError
from myna.lora.initial import (
    changes_base,
    check_init,
    layer_generator,
    random_values,
    values_from_weight,
)

# peft asks transformers for a property under its deprecated name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

LAYER = "model.layers.1.mlp.up_proj"


def from_peft(model, init, *, rank=4, use_rslora=False):
    """A, B and the base weight of one layer as peft initialises them, and the scaling."""
    config = LoraConfig(
        r=rank, lora_alpha=12, target_modules=["up_proj"], init_lora_weights=init,
        use_rslora=use_rslora,
    )  # fmt: skip
    layer = get_peft_model(model, config).get_base_model().get_submodule(LAYER)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return A.detach(), B.detach(), layer.base_layer.weight.detach(), layer.scaling["default"]


def test_the_generator_depends_on_seed_and_layer_only():
    one = torch.rand(3, generator=layer_generator(1, "a"))
    assert torch.equal(one, torch.rand(3, generator=layer_generator(1, "a")))
    assert not torch.equal(one, torch.rand(3, generator=layer_generator(1, "b")))
    assert not torch.equal(one, torch.rand(3, generator=layer_generator(2, "a")))


def test_default_is_uniform_as_in_the_authors_code():
    values = random_values("default", 64, 400, 16, layer_generator(0, "x"))
    assert values.A.shape == (16, 400) and values.B.shape == (64, 16)
    assert values.A.abs().max() <= 1 / 20
    assert values.A.std() == pytest.approx((1 / 20) / 3**0.5, rel=0.05)
    assert not values.B.any()


def test_gaussian_has_deviation_one_over_rank():
    values = random_values("gaussian", 64, 400, 16, layer_generator(0, "x"))
    assert values.A.std() == pytest.approx(1 / 16, rel=0.05)
    assert not values.B.any()


def test_orthogonal_starts_at_zero_with_both_factors_set():
    values = random_values("orthogonal", 64, 400, 16, layer_generator(0, "x"))
    assert values.A.shape == (16, 400) and values.B.shape == (64, 16)
    assert values.A.std() > 0.01 and values.B.std() > 0.01
    assert (values.B @ values.A).abs().max() < 1e-6


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_and_olora_are_those_of_peft(make_model, init, use_rslora):
    weight = make_model().get_submodule(LAYER).weight.detach()
    A, B, residual, scaling = from_peft(make_model(), init, use_rslora=use_rslora)
    ours = values_from_weight(init, weight, 4, scaling, layer_generator(0, LAYER))
    torch.testing.assert_close(ours.A, A, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.B, B, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.residual, residual, atol=1e-6, rtol=1e-5)


def test_pissa_by_iteration_finds_the_exact_principal_part(make_model):
    weight = make_model().get_submodule(LAYER).weight.detach()
    generator = layer_generator(0, LAYER)
    exact = values_from_weight("pissa", weight, 4, 2.0, generator)
    iterated = values_from_weight("pissa_niter_200", weight, 4, 2.0, generator)
    torch.testing.assert_close(iterated.B @ iterated.A, exact.B @ exact.A, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(iterated.residual, exact.residual, atol=1e-4, rtol=1e-3)


def test_mica_fixes_B_at_the_smallest_singular_vectors(make_model):
    weight = make_model().get_submodule(LAYER).weight.detach()
    ours = values_from_weight("mica", weight, 4, 2.0, layer_generator(0, LAYER))
    assert not ours.trains_B and ours.residual is None and not ours.A.any()
    smallest = torch.linalg.svdvals(weight)[-4:]
    torch.testing.assert_close((ours.B.T @ weight).norm(dim=1), smallest, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_base_and_adapter_together_are_the_base(make_model, init, dtype):
    weight = make_model(dtype).get_submodule(LAYER).weight.detach()
    ours = values_from_weight(init, weight, 4, 3.0, layer_generator(0, LAYER))
    assert ours.A.dtype == ours.B.dtype == ours.residual.dtype == torch.float32
    torch.testing.assert_close(
        ours.residual + 3.0 * ours.B @ ours.A, weight.float(), atol=1e-6, rtol=1e-5
    )


def test_which_initialisations_change_the_base():
    assert [changes_base(i) for i in ("pissa", "pissa_niter_4", "olora")] == [True] * 3
    assert not any(changes_base(i) for i in ("default", "gaussian", "orthogonal", "mica"))


@pytest.mark.parametrize("init", ["default", "pissa_niter_16", "mica", "orthogonal"])
def test_offered_initialisations_pass(init):
    check_init(init, 8)


def test_what_is_not_offered_says_why():
    with pytest.raises(ConfigError) as caught:
        check_init("eva", 8)
    assert str(caught.value) == (
        'lora.init: "eva" looks at activations on the training data, which myna does not do '
        "before training.\n  Offered: default, gaussian, pissa, pissa_niter_16 (or another "
        "number), olora, orthogonal, mica."
    )
    with pytest.raises(ConfigError, match=r'lora.init: "loftq" belongs to quantising the base'):
        check_init("loftq", 8)
    with pytest.raises(ConfigError, match=r'lora.init: "pizza" is unknown.\n  Offered: default'):
        check_init("pizza", 8)
    with pytest.raises(ConfigError, match=r"orthogonal needs an even lora.rank, not 5.*\n.*to 6"):
        check_init("orthogonal", 5)
