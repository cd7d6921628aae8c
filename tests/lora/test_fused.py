"""Against the same model with peft's own layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from myna.lora import fused as fused_module
from myna.lora.fused import (
    FusedLoraLinear,
    fuse,
    fuse_projections,
    prepack_weights,
    prepacking,
)
from myna.lora.inject import adapter_layers

MakeModel = Callable[..., LlamaForCausalLM]
IDS = torch.arange(3, 35).view(2, 16)


def adapted(model: LlamaForCausalLM, **options: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # at B = 0 the gradients of A are zero and prove nothing
        for layer in adapter_layers(peft_model).values():
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.weight.normal_(0, 0.1, generator=generator)
    return peft_model.train()


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys() and wanted
    return max(
        ((found[n].double() - w.double()).norm() / w.double().norm()).item()
        for n, w in wanted.items()
    )


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_a_model_has_the_same_loss_and_gradients(make_model: MakeModel, options: Any) -> None:
    model = adapted(make_model(), **options)
    reference = loss_and_gradients(copy.deepcopy(model).double())
    assert fuse(model) == len(adapter_layers(model))
    loss, gradients = loss_and_gradients(model)
    assert loss.item() == pytest.approx(reference[0].item(), rel=1e-6)
    assert largest_error(gradients, reference[1]) < 1e-5


def test_bfloat16_is_as_near_as_pefts_own(make_model: MakeModel) -> None:
    model = adapted(make_model(torch.bfloat16))
    wanted = loss_and_gradients(copy.deepcopy(model).double())[1]
    theirs = loss_and_gradients(model)[1]
    fuse(model)
    ours = loss_and_gradients(model)[1]
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert largest_error(ours, wanted) < 1.5 * largest_error(theirs, wanted)


def test_dropout_follows_torchs_seed_and_survives_recomputation(make_model: MakeModel) -> None:
    model = adapted(make_model(), lora_dropout=0.3)
    fuse(model)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(loss_and_gradients(model))
    assert largest_error(results[1][1], results[0][1]) == 0
    assert largest_error(results[2][1], results[0][1]) > 0.05
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    assert largest_error(loss_and_gradients(model)[1], results[0][1]) == 0


def test_layers_and_calls_draw_different_masks(make_model: MakeModel) -> None:
    model = adapted(make_model(), lora_dropout=0.5)
    fuse(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    x = torch.randn(6, layer.in_features)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def test_masks_drop_their_share_independently_of_layer_call_and_position() -> None:
    """Read off layers that are nothing but their mask: W = 0 and B A = 1 on an input of ones."""
    share, size = 0.2, 64
    base = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(3)))
    options: Any = {"r": size, "lora_alpha": size, "lora_dropout": share}
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1", "2"], **options)).train()
    assert fuse(model) == 3
    layers = [m for m in model.modules() if isinstance(m, FusedLoraLinear)]
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.weight.zero_()
            layer.lora_A["default"].weight.copy_(torch.eye(size))
            layer.lora_B["default"].weight.copy_(torch.eye(size))
        torch.manual_seed(1)
        ones = torch.ones(300, size)
        masks = [layer(ones) for layer in layers for _ in range(2)]
    few = 4.5 / masks[0].numel() ** 0.5  # 4.5 standard deviations of a correlation of nothing
    for number, mask in enumerate(masks):
        kept = mask[mask != 0]
        assert kept.unique().tolist() == pytest.approx([1 / (1 - share)], rel=1e-4)
        dropped = (mask == 0).float()
        assert dropped.mean().item() == pytest.approx(share, abs=few * share**0.5)
        assert dropped.mean(0).std() < 1.3 * (share * (1 - share) / len(mask)) ** 0.5
        assert dropped.mean(1).std() < 1.3 * (share * (1 - share) / size) ** 0.5
        for other in masks[:number]:
            assert abs(correlation(mask, other)) < few
        for lag in (1, 2, 3, 4, 8):
            assert abs(correlation(mask[lag:], mask[:-lag])) < few
            assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < few


def test_files_are_pefts(make_model: MakeModel, tmp_path: Path) -> None:
    model = adapted(make_model())
    fuse(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert not any(isinstance(m, FusedLoraLinear) for m in plain.modules())
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted)
        # The other way: a plain file under fused layers.
        assert fuse(plain) > 0
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted)


def test_disabling_and_merging_stay_pefts(make_model: MakeModel) -> None:
    model = adapted(make_model())
    fuse(model)
    model.eval()
    with torch.no_grad():
        adapted_logits = model(input_ids=IDS).logits
        base = make_model()(input_ids=IDS).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, base)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, adapted_logits)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, adapted_logits)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, adapted_logits)


def test_dora_stays_pefts(make_model: MakeModel) -> None:
    model = adapted(make_model(), use_dora=True)
    wanted = loss_and_gradients(model)
    fuse(model)
    found = loss_and_gradients(model)
    assert torch.equal(found[0], wanted[0])
    assert largest_error(found[1], wanted[1]) == 0


def test_under_autocast_it_is_pefts(make_model: MakeModel) -> None:
    model = adapted(make_model())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_and_gradients(model)[1]
        fuse(model)
        assert largest_error(loss_and_gradients(model)[1], wanted) == 0


def test_fusing_twice_changes_nothing(make_model: MakeModel) -> None:
    model = adapted(make_model())
    assert fuse(model) == fuse(model) == 14


def test_prepacked_weights_change_neither_loss_nor_gradients(make_model: MakeModel) -> None:
    model = adapted(make_model(torch.bfloat16))
    fuse(model)
    use, why = prepacking(model, 32, free_bytes=10**9)
    if why.endswith("no such layouts for them"):
        pytest.skip("this CPU or torch has no prepacked bfloat16 products")
    assert use or why.endswith("is too little")
    loss, gradients = loss_and_gradients(model)
    prepack_weights(model, 32)
    packed_loss, found = loss_and_gradients(model)
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert largest_error(found, gradients) < 5e-2  # bfloat16, summed in another order


def test_weights_are_not_prepacked_where_that_is_not_possible(make_model: MakeModel) -> None:
    exact = adapted(make_model())
    fuse(exact)
    assert prepacking(exact, 32, 10**9) == (
        False,
        "weights are not prepacked: no such layouts for them",
    )
    model = adapted(make_model(torch.bfloat16))
    fuse(model)
    use, why = prepacking(model, 32, free_bytes=10)
    assert not use and why.endswith(("GB more do not fit", "no such layouts for them"))


def products_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers every call of `lora_linears` computes."""
    counts: list[int] = []
    whole = fused_module.lora_linears

    def counting(x: Tensor, weight: Tensor, bias: Any, adapters: Any, *rest: Any, **kw: Any) -> Any:
        counts.append(len(adapters))
        return whole(x, weight, bias, adapters, *rest, **kw)

    monkeypatch.setattr(fused_module, "lora_linears", counting)
    return counts


@pytest.mark.parametrize("attention_bias", [False, True])
def test_projections_of_one_input_are_multiplied_as_one(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, attention_bias: bool
) -> None:
    made = make_model(attention_bias=attention_bias)
    with torch.no_grad():  # they are zero at first and would prove nothing
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    model = adapted(made)
    reference = loss_and_gradients(copy.deepcopy(model).double())
    fuse(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert fuse_projections(model) == 4  # q, k, v and gate, up in each of two layers
    assert fuse_projections(model) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    counts = products_counted(monkeypatch)
    loss, gradients = loss_and_gradients(model)
    assert counts == [3, 1, 2, 1] * 2
    assert loss.item() == pytest.approx(reference[0].item(), rel=1e-6)
    assert largest_error(gradients, reference[1]) < 1e-5


def test_grouped_weights_take_no_memory_of_their_own(make_model: MakeModel) -> None:
    model = adapted(make_model())
    fuse(model)
    fuse_projections(model)
    layers = [m for m in model.modules() if isinstance(m, FusedLoraLinear) and m.group]
    storages = {m.base_layer.weight.untyped_storage().data_ptr(): m for m in layers}
    assert len(layers) == 10 and len(storages) == 4
    assert sum(m.base_layer.weight.untyped_storage().nbytes() for m in storages.values()) == sum(
        m.base_layer.weight.nbytes for m in layers
    )


def test_grouped_projections_with_dropout_recompute_to_the_same(make_model: MakeModel) -> None:
    model = adapted(make_model(), lora_dropout=0.3)
    fuse(model)
    fuse_projections(model)
    torch.manual_seed(1)
    wanted = loss_and_gradients(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    found = loss_and_gradients(model)
    assert torch.equal(found[0], wanted[0])
    assert largest_error(found[1], wanted[1]) == 0
    # Each of the three has a mask of its own.
    attention: Any = model.get_base_model().model.layers[0].self_attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj):
            layer.base_layer.weight.zero_()
            layer.lora_A["default"].weight.copy_(attention.q_proj.lora_A["default"].weight)
            layer.lora_B["default"].weight.fill_(1.0)
        x = torch.randn(9, attention.q_proj.in_features)
        assert not torch.equal(attention.q_proj(x)[:, :4], attention.k_proj(x)[:, :4])


def test_a_grouped_layer_that_is_called_otherwise_computes_alone(make_model: MakeModel) -> None:
    model = adapted(make_model())
    alone = copy.deepcopy(model)
    for one in (model, alone):
        fuse(one)
    fuse_projections(model)
    ours: Any = model.get_base_model().model.layers[0].self_attn
    theirs: Any = alone.get_base_model().model.layers[0].self_attn
    draw = torch.Generator().manual_seed(1)
    x, other = (torch.randn(5, ours.q_proj.in_features, generator=draw) for _ in range(2))
    for name, given in (("q_proj", x), ("k_proj", other), ("v_proj", x), ("q_proj", x)):
        torch.testing.assert_close(getattr(ours, name)(given), getattr(theirs, name)(given))
    moved = copy.deepcopy(model).double()
    assert moved(input_ids=IDS).logits.dtype == torch.float64
    with model.disable_adapter(), alone.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)


def test_only_some_of_the_projections_have_an_adapter(make_model: MakeModel) -> None:
    model = adapted(make_model(), target_modules=["q_proj", "v_proj", "up_proj"])
    fuse(model)
    assert fuse_projections(model) == 0
