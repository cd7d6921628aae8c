import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from myna.errors import ConfigError
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state, inject
from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM

# peft asks transformers for a property under its deprecated name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def put(model, **changed):
    settings = dict(
        rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", use_rslora=False,
        use_dora=False, init="default", seed=3,
    )  # fmt: skip
    return inject(model, **settings | changed)


def logits(model):
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_the_7b_shape_trains_the_tutorials_number_of_parameters():
    """19,988,480 of 7,315,533,824 is what the tutorial's notebook prints."""
    config = BlueLMConfig(
        vocab_size=100008, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, use_stable_embedding=True, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = BlueLMForCausalLM(config)
    injected = put(model, rank=8, alpha=32.0, dropout=0.1, target_modules=SEVEN)
    assert (injected.trainable, injected.total) == (19_988_480, 7_315_533_824)
    assert injected.matches == dict.fromkeys(SEVEN, 32)
    assert injected.trainable_by_target["q_proj"] == 32 * 8 * (4096 + 4096)
    assert injected.trainable_by_target["down_proj"] == 32 * 8 * (4096 + 11008)
    assert injected.covered == 1.0
    assert injected.summary == (
        "19,988,480 of 7,315,533,824 parameters trained (0.273 %), in 100 % of the linear weights"
    )


def test_the_covered_share_leaves_out_the_head_and_counts_missed_experts(make_model):
    injected = put(make_model(), target_modules=["q_proj", "up_proj"])
    per_layer = {"q": 48 * 48, "k": 24 * 48, "v": 24 * 48, "o": 48 * 48, "mlp": 3 * 48 * 80}
    assert injected.covered == pytest.approx((48 * 48 + 48 * 80) / sum(per_layer.values()))
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    injected = put(MixtralForCausalLM(config), dropout=0.1)
    assert injected.covered == pytest.approx(4 * 32 * 32 / (4 * 32 * 32 + 4 * 3 * 32 * 64))
    assert len(injected.warnings) == 1 and "fused tensors" in injected.warnings[0]


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora", "mica"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_untrained_adapter_changes_nothing(make_model, init, use_dora):
    before = logits(make_model())
    injected = put(make_model(), init=init, use_dora=use_dora, use_rslora=True)
    assert injected.warnings == ()
    torch.testing.assert_close(logits(injected.model), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["default", "pissa", "orthogonal"])
def test_adapters_are_float32_and_unrounded_on_a_bfloat16_base(make_model, init):
    injected = put(make_model(torch.bfloat16), init=init)
    trained = [p for p in injected.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    A = adapter_state(injected.model)["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert not torch.equal(A, A.bfloat16().float())
    frozen = [p for p in injected.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("init", ["default", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_the_seed_decides_and_the_global_generator_stays(make_model, init):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = put(make_model(), init=init).model
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(99)
    second = put(make_model(), init=init).model
    for (name, one), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    if init != "olora" and init != "pissa":  # these two draw nothing
        third = adapter_state(put(make_model(), init=init, seed=4).model)
        assert not all(torch.equal(third[n], t) for n, t in adapter_state(first).items())


def test_a_layers_values_do_not_depend_on_the_other_targets(make_model):
    alone = adapter_state(put(make_model(), target_modules="v_proj").model)
    together = adapter_state(put(make_model()).model)
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_is_scaled_as_in_peft(make_model, use_rslora):
    """The same A and B in an adapter made by peft alone give the same logits."""
    ours = put(make_model(), alpha=12.0, use_rslora=use_rslora).model
    theirs = get_peft_model(
        make_model(),
        LoraConfig(
            r=4, lora_alpha=12, target_modules="all-linear", use_rslora=use_rslora,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    state = {name: torch.randn_like(t) * 0.1 for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state)
    load_adapter_state(theirs, state)
    assert (logits(ours) - logits(make_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_transposed_layers_of_gpt2():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    model = GPT2LMHeadModel(config).eval()
    before = logits(copy.deepcopy(model))
    injected = put(model, init="pissa")
    weight = model.get_submodule("transformer.h.0.attn.c_attn.base_layer").weight
    assert torch.linalg.matrix_rank(weight) == 12  # the four largest directions left it
    torch.testing.assert_close(logits(injected.model), before, atol=1e-5, rtol=1e-5)


def test_mica_trains_A_alone(make_model):
    injected = put(make_model(), init="mica", target_modules="q_proj")
    assert injected.trainable == 2 * 4 * 48
    assert {n.split(".")[-3] for n, p in injected.model.named_parameters() if p.requires_grad} == {
        "lora_A"
    }


def test_state_goes_back_into_the_same_parameters(make_model):
    injected = put(make_model(), init="gaussian", use_dora=True)
    parameters = [p for p in injected.model.parameters() if p.requires_grad]
    state = {name: tensor.clone() for name, tensor in adapter_state(injected.model).items()}
    assert any(name.endswith("lora_magnitude_vector") for name in state)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    load_adapter_state(injected.model, state)
    again = [p for p in injected.model.parameters() if p.requires_grad]
    assert all(one is other for one, other in zip(parameters, again, strict=True))
    assert all(torch.equal(t, state[n]) for n, t in adapter_state(injected.model).items())


def test_state_of_another_shape_is_refused_with_every_difference(make_model):
    model = put(make_model(), target_modules=["q_proj", "v_proj"]).model
    other = adapter_state(put(make_model(), rank=2, target_modules=["q_proj", "k_proj"]).model)
    with pytest.raises(ConfigError) as caught:
        load_adapter_state(model, other)
    lines = str(caught.value).splitlines()
    assert lines[0] == ("The stored adapter does not belong to this model and these lora settings:")
    prefix = "  base_model.model.model.layers.0.self_attn."
    assert f"{prefix}v_proj.lora_A.weight is missing" in lines
    assert f"{prefix}k_proj.lora_A.weight is unknown" in lines
    assert f"{prefix}q_proj.lora_A.weight is (2, 48), the model's (4, 48)" in lines
    assert lines[-1] == "  Go on with the settings it was made with."


def test_a_rank_beyond_the_layer(make_model):
    (warning,) = put(make_model(), rank=30, target_modules=["q_proj", "k_proj"]).warnings
    assert warning == (
        "lora.rank 30 is more than 2 of the target layers can use, such as "
        "model.layers.0.self_attn.k_proj, which is 24 by 48: the surplus trains without adding "
        "anything."
    )
    with pytest.raises(ConfigError) as caught:
        put(make_model(), rank=30, target_modules=["q_proj", "k_proj"], init="pissa")
    assert str(caught.value) == (
        "lora.rank is 30, and init pissa takes that many singular vectors of each layer; these "
        "have fewer:\n"
        "  model.layers.0.self_attn.k_proj is 24 by 48\n"
        "  model.layers.1.self_attn.k_proj is 24 by 48\n"
        "  Lower lora.rank to 24 or leave those layers out of lora.target_modules."
    )


def test_a_tied_head(make_model):
    (warning, *_) = put(make_model(tied=True), target_modules=["lm_head"]).warnings
    assert warning.startswith("lm_head shares its weight with the token embedding.")
    with pytest.raises(ConfigError) as caught:
        put(make_model(tied=True), target_modules=["q_proj", "lm_head"], init="olora")
    assert str(caught.value) == (
        "lora.init olora changes the base weight of its layers, and lm_head shares its weight "
        "with the token embedding.\n"
        "  Leave it out of lora.target_modules or use lora.init default."
    )


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"rank": 0}, "lora.rank is 0; expected a whole number of at least 1."),
        ({"alpha": 0.0}, "lora.alpha is 0.0; expected a number above 0, usual is 2 x rank."),
        ({"dropout": 1.0}, "lora.dropout is 1.0; expected a share from 0 up to below 1."),
    ],
)
def test_impossible_numbers(make_model, changed, text):
    with pytest.raises(ConfigError) as caught:
        put(make_model(), **changed)
    assert str(caught.value) == text


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_names_that_peft_takes_for_those_of_fused_experts(dropout):
    """GLM-4.5's dense layers and experts share names; with dropout peft itself gives up."""
    config = Glm4MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(config)
    with pytest.raises(ConfigError) as caught:
        put(model, target_modules=SEVEN, dropout=dropout)
    assert str(caught.value).startswith("lora.target_modules: peft ")
    assert "Glm4MoeForCausalLM" in str(caught.value)
    assert str(caught.value).endswith("target_modules: [q_proj, k_proj, v_proj, o_proj]")
