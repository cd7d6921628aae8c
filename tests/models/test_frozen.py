"""Fused norms and MLPs against the same models untouched, on several families."""

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM
from myna.models.frozen import fuse_frozen

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
IDS = torch.arange(3, 27).view(2, 12)


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    torch.manual_seed(2)
    if family == "BlueLM":
        shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
        shape["num_key_value_heads"] = 4
        model: Any = BlueLMForCausalLM(BlueLMConfig(**shape, use_stable_embedding=True))
    else:
        name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, name)(**{**SHAPE, **more})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones, or zeros, would hide a weight that is not used
                parameter.normal_(0.5, 0.5)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model.to(dtype), lora)


def loss_and_gradients(model: PeftModel) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("Llama", 5 + 2),
        ("Qwen3", 5 + 4 + 2),  # norms of queries and keys as well
        ("BlueLM", 5 + 2),
        ("Gemma2", 9),  # its MLP is gated by GELU
        ("Gemma3", 9 + 4),
        ("Phi3", 5),  # gate and up are one matrix
    ],
)
def test_a_model_has_the_same_loss_and_gradients(family: str, modules: int) -> None:
    model = tiny(family)
    names = [name for name, _ in model.named_parameters()]
    wanted, gradients = loss_and_gradients(copy.deepcopy(model).double())
    assert fuse_frozen(model) == modules
    assert [name for name, _ in model.named_parameters()] == names
    loss, found = loss_and_gradients(model)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-5, name
    assert fuse_frozen(model) == 0


def test_bfloat16_is_as_near_to_float64_as_before() -> None:
    model = tiny("Llama", torch.bfloat16)
    _, exact = loss_and_gradients(copy.deepcopy(model).double())

    def distance() -> float:
        _, found = loss_and_gradients(model)
        return max(((found[n] - g).norm() / g.norm()).item() for n, g in exact.items())

    before = distance()
    fuse_frozen(model)
    assert distance() < 1.2 * before


def test_a_norm_that_is_trained_stays_as_it_is() -> None:
    model = tiny("Llama")
    for name, parameter in model.named_parameters():
        if "input_layernorm" in name:
            parameter.requires_grad_(True)
    assert fuse_frozen(model) == 3 + 2
    loss_and_gradients(model)


def test_what_only_looks_like_a_norm_or_a_gated_mlp_stays_as_it_is() -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    class OtherMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 6), nn.Linear(8, 6)
            self.down_proj, self.act_fn = nn.Linear(6, 8), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    assert fuse_frozen(nn.Sequential(OtherRMSNorm(), OtherMLP())) == 0
