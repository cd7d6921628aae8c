"""Against the outputs of the published code; tolerances from tests/golden/README.md."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from myna.errors import ConfigError
from myna.models.bluelm import (
    BlueLMConfig,
    BlueLMForCausalLM,
    BlueLMModel,
    register,
    rotary_frequencies,
)
from myna.models.load import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = ["mha_stable", "no_stable", "ntkmixed", "gqa_derived"]
WITH_GRADIENTS = ["mha_stable", "no_stable", "ntkmixed"]
CPU = torch.device("cpu")


@cache
def model_of(name: str, attention: str = "sdpa") -> PreTrainedModel:
    return load_model(
        str(GOLDEN / name), dtype=torch.float32, device=CPU, attn_implementation=attention
    ).model


@cache
def expected_of(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "expected.safetensors")


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


def tiny(**changes: object) -> BlueLMConfig:
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "use_stable_embedding": True,
        "pad_token_id": 3,
    }
    return BlueLMConfig(**{**shape, **changes})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_and_hidden_states(name: str, attention: str) -> None:
    expected = expected_of(name)
    model = model_of(name, attention)
    outputs = model(expected["single.input_ids"], output_hidden_states=True)
    close(outputs.logits, expected["single.logits"], 1e-4)
    for index, hidden in enumerate(outputs.hidden_states):
        close(hidden, expected[f"single.hidden_states.{index}"], 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_padded_batches_where_the_mask_is_one(name: str, side: str) -> None:
    expected = expected_of(name)
    mask = expected[f"{side}.attention_mask"]
    logits = model_of(name)(expected[f"{side}.input_ids"], attention_mask=mask).logits
    close(logits[mask.bool()], expected[f"{side}.logits"][mask.bool()], 1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_long_sequence(name: str) -> None:
    """For ntkmixed 200 tokens, beyond its max_position_embeddings of 64."""
    expected = expected_of(name)
    logits = model_of(name)(expected["long.input_ids"]).logits
    close(logits[:, expected["long.positions"]], expected["long.logits"], 1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_loss_and_gradients(name: str) -> None:
    expected = expected_of(name)
    model = model_of(name)
    model.zero_grad()
    loss = model(
        expected["grad.input_ids"],
        attention_mask=expected["grad.attention_mask"],
        labels=expected["grad.labels"],
    ).loss
    loss.backward()
    close(loss.detach().reshape(1), expected["grad.loss"], 1e-5)
    gradients = {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    compared = [key for key in expected if key in gradients]
    assert "grad.model.layers.0.self_attn.q_proj.weight" in compared
    for key in compared:
        close(gradients[key], expected[key], 1e-5)
    assert gradients["grad.model.embed_tokens.weight"][3].count_nonzero() == 0  # the pad row

    norms = json.loads((GOLDEN / "manifest.json").read_text("utf-8"))[name]
    for key, norm in norms["grad_l2_norms"].items():
        assert gradients[f"grad.{key}"].norm().item() == pytest.approx(norm, rel=1e-5)
    model.zero_grad()


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    """Guards the published code's fault: gradient_checkpointing_enable() raised."""
    expected = expected_of(name)
    model = load_model(str(GOLDEN / name), dtype=torch.float32, device=CPU).model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(
        expected["grad.input_ids"],
        attention_mask=expected["grad.attention_mask"],
        labels=expected["grad.labels"],
        use_cache=False,
    ).loss.backward()
    key = "model.layers.0.self_attn.q_proj.weight"
    close(model.get_parameter(key).grad, expected[f"grad.{key}"], 1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_ids(name: str, use_cache: bool) -> None:
    expected = expected_of(name)
    model = model_of(name)
    single = expected["generate.single.input_ids"]
    greedy = {"max_new_tokens": 16, "do_sample": False, "use_cache": use_cache}
    ones = torch.ones_like(single)
    out = model.generate(single, attention_mask=ones, **greedy)
    assert out.equal(expected["generate.single.sequences"])
    out = model.generate(single, attention_mask=ones, repetition_penalty=1.1, **greedy)
    assert out.equal(expected["generate.single.sequences_repetition_penalty_1.1"])

    left = expected["generate.left.input_ids"]
    mask = expected["generate.left.attention_mask"]
    out = model.generate(left, attention_mask=mask, **greedy)
    assert out.equal(expected["generate.left.sequences"])
    stop = int(expected["generate.stop.eos_token_id"])
    out = model.generate(left, attention_mask=mask, eos_token_id=stop, **greedy)
    assert out.equal(expected["generate.stop.sequences"])


@torch.no_grad()
def test_bfloat16_stays_near_the_published_codes_own_bfloat16() -> None:
    """Loose: it differs from its own float32 by up to 0.15 on this model."""
    expected = expected_of("mha_stable")
    model = load_model(str(GOLDEN / "mha_stable"), dtype=torch.bfloat16, device=CPU).model
    logits = model(expected["single.input_ids"]).logits
    assert logits.dtype == torch.bfloat16
    difference = (logits.float() - expected["bf16.single.logits"].float()).abs()
    assert difference.max() <= 0.3
    assert difference.mean() <= 0.04


def test_rotary_frequencies_of_ntkmixed() -> None:
    expected = expected_of("ntkmixed")
    config = model_of("ntkmixed").config
    plain = BlueLMConfig(hidden_size=config.hidden_size, num_attention_heads=2)
    close(rotary_frequencies(plain), expected["rope.inv_freq_unscaled"], 1e-7)
    scaled = rotary_frequencies(config)
    divisors = rotary_frequencies(plain) / scaled
    assert divisors[-1].item() == pytest.approx(16.0, rel=1e-6)
    assert divisors[0].item() == pytest.approx(math.exp(math.log(16) / 16**0.3), rel=1e-6)
    for position in (1, 1023):
        angles = position * scaled
        close(angles.cos(), expected[f"rope.cos_{position}"], 1e-4)
        close(angles.sin(), expected[f"rope.sin_{position}"], 1e-4)


def test_divisors_of_the_published_32k_model() -> None:
    """Head size 128, factor 16, power 0.3: from 2.22 to 16."""
    scaling = {"type": "ntkmixed", "factor": 16.0, "power": 0.3}
    divisors = rotary_frequencies(BlueLMConfig()) / rotary_frequencies(
        BlueLMConfig(rope_scaling=scaling)
    )
    assert divisors[0].item() == pytest.approx(2.22, abs=0.005)
    assert divisors[-1].item() == pytest.approx(16, rel=1e-6)


@torch.no_grad()
def test_save_and_reload_keeps_everything_but_auto_map(tmp_path: Path) -> None:
    expected = expected_of("ntkmixed")
    model_of("ntkmixed").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert "auto_map" not in saved
    assert saved["model_type"] == "BlueLM"
    again = load_model(str(tmp_path), dtype=torch.float32, device=CPU).model
    assert again.config.rotary == model_of("ntkmixed").config.rotary
    assert (
        again(expected["long.input_ids"])
        .logits[:, expected["long.positions"]]
        .equal(
            model_of("ntkmixed")(expected["long.input_ids"]).logits[:, expected["long.positions"]]
        )
    )


@torch.no_grad()
def test_inputs_embeds_enter_after_the_layer_norm() -> None:
    expected = expected_of("mha_stable")
    model = model_of("mha_stable")
    ids = expected["single.input_ids"]
    logits = model(inputs_embeds=model.model.embed_ids(ids)).logits
    close(logits, expected["single.logits"], 1e-4)
    raw = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    assert (raw - expected["single.logits"]).abs().max() > 1
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


@torch.no_grad()
def test_position_ids_and_logits_to_keep() -> None:
    """Rotary positions are relative: a shift of all of them changes nothing but rounding."""
    expected = expected_of("mha_stable")
    ids = expected["single.input_ids"]
    positions = torch.arange(ids.shape[1])[None] + 7
    logits = model_of("mha_stable")(ids, position_ids=positions, logits_to_keep=2).logits
    close(logits, expected["single.logits"][:, -2:], 1e-4)


def test_keyword_arguments_reach_a_registered_attention() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[object] = []

    def attention(*args: object, **kwargs: object) -> object:
        seen.append(kwargs.pop("marker"))
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("test_bluelm", attention)
    model = BlueLMForCausalLM(tiny()).eval()
    model.set_attn_implementation("test_bluelm")
    model(torch.tensor([[1, 5, 6]]), marker="here", use_cache=False)
    assert seen == ["here", "here"]


@torch.no_grad()
def test_tied_head(tmp_path: Path) -> None:
    model = BlueLMForCausalLM(tiny(tie_word_embeddings=True)).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(str(tmp_path), dtype=torch.float32, device=CPU).model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 6, 7]])
    assert again(ids).logits.equal(model(ids).logits)


def test_equals_llama_with_the_layer_norm_folded_into_the_table() -> None:
    """An independent reading of the architecture: transformers' own Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = model_of("mha_stable")
    fields = {k: v for k, v in ours.config.to_dict().items() if k != "use_stable_embedding"}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    state = ours.state_dict()
    norm = {k: state.pop(f"model.embed_layer_norm.{k}") for k in ("weight", "bias")}
    key = "model.embed_tokens.weight"
    state[key] = torch.nn.functional.layer_norm(state[key], (64,), **norm, eps=1e-6)
    llama.load_state_dict(state)
    ids = expected_of("mha_stable")["single.input_ids"]
    with torch.no_grad():
        close(ours(ids).logits, llama(ids).logits, 1e-5)


def test_defaults_of_the_configuration() -> None:
    config = BlueLMConfig()
    assert config.num_key_value_heads == config.num_attention_heads == 32
    assert config.pad_token_id is None
    assert config.rotary == {"rope_theta": 10000.0, "rope_type": "default"}
    assert BlueLMConfig(num_key_value_heads=8).num_key_value_heads == 8
    assert BlueLMModel(tiny(num_key_value_heads=1)).layers[0].self_attn.k_proj.out_features == 8


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_other_rotary_scaling_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BlueLMConfig(rope_scaling={"type": kind, "factor": 2.0})
    assert str(caught.value) == (
        f'config.json: rope_scaling is of type "{kind}"; BlueLM has null or "ntkmixed".\n'
        "  Set it to null if the checkpoint was trained without scaling."
    )


def test_ntkmixed_needs_numbers() -> None:
    with pytest.raises(Exception, match=r"rope_scaling\.power is None; ntkmixed needs a number"):
        BlueLMConfig(rope_scaling={"type": "ntkmixed", "factor": 16.0})
    with pytest.raises(Exception, match=r"rope_scaling\.factor is 0\.5; .* at least 1"):
        BlueLMConfig(rope_scaling={"type": "ntkmixed", "factor": 0.5, "power": 0.3})


def test_registered_classes_ask_for_no_remote_code() -> None:
    register()
    register()
    config = AutoConfig.from_pretrained(GOLDEN / "mha_stable", trust_remote_code=False)
    assert type(config) is BlueLMConfig
    assert type(AutoModelForCausalLM.from_config(config)) is BlueLMForCausalLM
