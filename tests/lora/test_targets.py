import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2MoeConfig,
)

from myna.errors import ConfigError
from myna.lora.targets import find_targets, layer_shape, linear_layers


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def counts(targets) -> dict[str, int]:
    return {target: len(names) for target, names in targets.layers.items()}


def test_a_list_of_names(make_model):
    found = find_targets(make_model(), ["q_proj", "self_attn.v_proj"])
    assert counts(found) == {"q_proj": 2, "self_attn.v_proj": 2}
    assert found.names[0] == "model.layers.0.self_attn.q_proj"
    assert found.warnings == ()


def test_a_plain_string_is_a_name_and_not_an_expression(make_model):
    assert counts(find_targets(make_model(), "q_proj")) == {"q_proj": 2}
    assert counts(find_targets(make_model(), "model.layers.1.mlp.up_proj")) == {
        "model.layers.1.mlp.up_proj": 1
    }


def test_an_expression_has_to_match_the_whole_name(make_model):
    found = find_targets(make_model(), r".*\.1\..*\.(q|v)_proj")
    assert counts(found) == {"q_proj": 1, "v_proj": 1}
    assert all(".1." in name for name in found.names)
    with pytest.raises(ConfigError) as caught:
        find_targets(make_model(), "(q|v)_proj")
    assert str(caught.value).startswith(
        "lora.target_modules: the expression '(q|v)_proj' matches no layer of LlamaForCausalLM; "
        'it has to match the whole name, such as "model.layers.0.self_attn.q_proj".'
    )


@pytest.mark.parametrize("written", ["all-linear", "ALL-LINEAR", ["all-linear"]])
def test_all_linear_leaves_the_output_head_out(make_model, written):
    found = find_targets(make_model(), written)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert counts(found) == dict.fromkeys(names, 2)


def test_all_linear_counts_the_transposed_layers_of_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    found = find_targets(model, "all-linear")
    assert counts(found) == {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    assert layer_shape(linear_layers(model)["transformer.h.0.attn.c_attn"]) == (48, 16)


def test_the_tutorials_names_are_answered_with_what_the_model_has(make_model):
    with pytest.raises(ConfigError) as caught:
        find_targets(make_model(), ["c_attn", "c_proj", "w1", "w2"])
    assert str(caught.value) == (
        "lora.target_modules: c_attn, c_proj, w1, w2 are not in this model (LlamaForCausalLM).\n"
        "  Linear layers it has: q_proj (2), k_proj (2), v_proj (2), o_proj (2), gate_proj (2), "
        "up_proj (2), down_proj (2); output head: lm_head.\n"
        "  target_modules: all-linear takes all of them but the output head."
    )


def test_one_missing_name_among_good_ones_is_an_error_too(make_model):
    with pytest.raises(ConfigError, match=r"lora.target_modules: q_porj is not in this model") as e:
        find_targets(make_model(), ["v_proj", "q_porj"])
    assert '"q_porj": did you mean "q_proj"?' in str(e.value)


def test_a_name_of_something_that_is_no_linear_layer(make_model):
    with pytest.raises(ConfigError) as caught:
        find_targets(make_model(), ["q_proj", "self_attn"])
    assert str(caught.value).startswith(
        'lora.target_modules: "self_attn" names model.layers.0.self_attn (LlamaAttention) and 1 '
        "more; an adapter goes on linear layers only."
    )
    with pytest.raises(ConfigError, match=r"names model.embed_tokens .Embedding.; an adapter goes"):
        find_targets(make_model(), "embed_tokens")
    with pytest.raises(ConfigError, match=r"the expression '.*mlp.*' names model.layers.0.mlp "):
        find_targets(make_model(), ".*mlp.*")


def test_no_name_and_a_broken_expression(make_model):
    with pytest.raises(ConfigError, match=r"lora.target_modules names no layer at all"):
        find_targets(make_model(), [])
    with pytest.raises(ConfigError, match=r"is no valid regular expression: missing \), unterm"):
        find_targets(make_model(), ".*(q_proj")


def test_fused_experts_are_reported_as_missed():
    model = mixtral()
    found = find_targets(model, "all-linear")
    assert counts(found) == {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
    # Two layers of four experts, each 2 x 64 x 32 and 32 x 64.
    assert found.warnings[0].startswith(
        "The experts of this model are fused tensors and get no adapter: gate_up_proj (2), "
        "down_proj (2), 49,152 parameters, "
    )
    with pytest.raises(ConfigError) as caught:
        find_targets(model, ["w1", "q_proj"])
    assert (
        "Its experts are fused tensors (down_proj, gate_up_proj), which are no linear layers"
        in str(caught.value)
    )


def test_a_shared_expert_is_an_ordinary_layer():
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, pad_token_id=0,
    )  # fmt: skip
    found = find_targets(AutoModelForCausalLM.from_config(config), ["gate_proj"])
    assert found.names[0] == "model.layers.0.mlp.shared_expert.gate_proj"


def test_layers_outside_the_text_model_are_reported():
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3],
                             "rope_theta": 10000.0},
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2,
                           out_hidden_size=32),
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    found = find_targets(model, ["gate_proj", "q_proj"])
    assert counts(found) == {"gate_proj": 3, "q_proj": 2}
    (warning,) = found.warnings
    assert warning.startswith(
        "target_modules also matches layers outside the text model: gate_proj (1), such as "
        "model.visual.blocks.0.mlp.gate_proj. They are trained too. To leave them out: "
    )
    # The expression it offers means what it says, and silences the warning.
    narrowed = find_targets(model, warning.rpartition(": ")[2])
    assert counts(narrowed) == {"gate_proj": 2, "q_proj": 2}
    assert narrowed.warnings == ()


def test_a_plain_module_without_a_head():
    model = nn.Sequential(nn.Linear(2, 3))
    assert counts(find_targets(model, "all-linear")) == {"0": 1}
