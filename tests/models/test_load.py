import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from myna.errors import ConfigError
from myna.models.bluelm import BlueLMConfig
from myna.models.load import (
    LoadedModel,
    context_length,
    load_config,
    load_model,
    meta_model,
)
from myna.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), dtype=torch.float32, device=CPU, **options)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **changes}), "utf-8")


@pytest.fixture
def bluelm(golden: Path, tmp_path: Path) -> Path:
    """A copy of the smallest golden checkpoint, as `.bin` shards."""
    return shutil.copytree(golden / "no_stable", tmp_path / "bluelm")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama saved by transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_hub_layout_end_to_end(golden: Path) -> None:
    """Prompt text to ids to greedy ids to text, as the published code and tokenizer have it."""
    expected = json.loads((golden / "hub_like/expected.json").read_text("utf-8"))
    vectors = load_file(golden / "hub_like/expected.safetensors")
    loaded = load(golden / "hub_like")
    tokenizer = load_tokenizer(str(golden / "hub_like"))
    model = loaded.model
    assert len(tokenizer.tokenizer) == expected["tokenizer_len"]
    assert model.get_input_embeddings().num_embeddings == expected["embedding_rows"]
    assert loaded.notes == ()
    compared = 0
    for case in expected["cases"]:
        prompt = tokenizer.tokenizer(case["prompt"], return_tensors="pt")
        assert prompt.input_ids[0].tolist() == case["prompt_ids"]
        new = len(case["new_ids"])
        out = model.generate(**prompt, max_new_tokens=new, do_sample=False)[0, -new:]
        assert out.tolist() == case["new_ids"]
        text = tokenizer.tokenizer.decode(out, skip_special_tokens=True)
        assert text == case["decoded_new_skip_special"]
        key = next((key for key in vectors if case["name"] in key), None)
        if key is not None:
            with torch.no_grad():
                logits = model(**prompt).logits[0, -1]
            assert (logits - vectors[key].flatten()).abs().max() <= 1e-4
            compared += 1
    assert compared == len(expected["cases"])


def test_llama_from_safetensors_equals_transformers(llama: Path) -> None:
    loaded = load(llama)
    reference = LlamaForCausalLM.from_pretrained(llama)
    for (name, ours), theirs in zip(
        loaded.model.named_parameters(), reference.parameters(), strict=True
    ):
        assert ours.equal(theirs), name
    assert not loaded.model.training
    assert loaded.model.name_or_path == loaded.model.config.name_or_path == str(llama)


def test_pickled_llama_loads_like_its_safetensors(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    edit(folder / "generation_config.json", eos_token_id=[2, 7], top_k=11)
    loaded = load(folder).model
    for ours, theirs in zip(loaded.parameters(), load(llama).model.parameters(), strict=True):
        assert ours.equal(theirs)
    assert loaded.generation_config.eos_token_id == [2, 7]
    assert loaded.generation_config.top_k == 11
    assert loaded.name_or_path == str(folder)


def test_dtype_and_attention(llama: Path) -> None:
    model = load_model(
        str(llama), dtype=torch.bfloat16, device=CPU, attn_implementation="eager"
    ).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_nothing_is_printed(bluelm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(bluelm)
    load(bluelm)
    assert capfd.readouterr() == ("", "")


def test_missing_tensor_is_an_error(llama: Path) -> None:
    """Guards against a random head after a truncated download."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]

    change_weights(llama, change)
    with pytest.raises(ConfigError) as caught:
        load(llama)
    assert str(caught.value) == (
        f"{llama}: the weights do not fit LlamaForCausalLM. Tensors\n"
        "  2 missing from the files: lm_head.weight, model.layers.1.mlp.up_proj.weight\n"
        "  Nothing was filled with random numbers. Fetch the files again, or correct model_type in "
        "config.json."
    )


def test_missing_head_of_bluelm_is_an_error(bluelm: Path) -> None:
    """The published code declares its head "may be missing"."""
    shard = bluelm / "pytorch_model-00004-of-00004.bin"
    tensors = torch.load(shard, weights_only=True)
    assert tensors.pop("lm_head.weight") is not None
    torch.save(tensors, shard)
    with pytest.raises(ConfigError, match=r"1 missing from the files: lm_head\.weight"):
        load(bluelm)


def test_missing_head_of_a_tied_model_is_none(llama: Path) -> None:
    change_weights(llama, lambda tensors: tensors.pop("lm_head.weight"))
    edit(llama / "config.json", tie_word_embeddings=True)
    model = load(llama).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_surplus_and_misshapen_tensors_are_errors(llama: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_layer_norm.weight"] = torch.ones(16)
        tensors["model.norm.weight"] = torch.ones(17)

    change_weights(llama, change)
    with pytest.raises(ConfigError) as caught:
        load(llama)
    assert (
        "  1 of another shape: model.norm.weight is (17,) in the file, (16,) in the model\n"
        "  1 in the files that the architecture has no place for: model.embed_layer_norm.weight\n"
    ) in str(caught.value)


def test_bluelm_is_not_read_as_a_llama(golden: Path, tmp_path: Path) -> None:
    """The trap: a stock Llama loads a BlueLM checkpoint and computes nonsense."""
    folder = shutil.copytree(golden / "gqa_derived", tmp_path / "m")
    edit(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match=r"no place for: model\.embed_layer_norm\.bias, model"):
        load(folder)


def test_leftover_buffers_are_ignored_and_recomputed(bluelm: Path, golden: Path) -> None:
    shard = bluelm / "pytorch_model-00004-of-00004.bin"
    tensors = torch.load(shard, weights_only=True)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.full((4,), 7.0)
    tensors["decoder.version"] = torch.ones(1)
    torch.save(tensors, shard)
    expected = load_file(golden / "no_stable/expected.safetensors")
    with torch.no_grad():
        logits = load(bluelm).model(expected["single.input_ids"]).logits
    assert (logits - expected["single.logits"]).abs().max() <= 1e-4


def test_rows_are_taken_from_the_table(bluelm: Path) -> None:
    edit(bluelm / "config.json", vocab_size=400)
    loaded = load(bluelm)
    assert loaded.notes == (
        "config.json says vocab_size 400, the embedding table has 328 rows; using 328.",
    )
    assert loaded.model.config.vocab_size == 328
    assert loaded.model.lm_head.out_features == 328


def test_folder_without_weights(golden: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        shutil.copy(golden / "no_stable" / name, tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no weights. Looked for model.safetensors, pytorch_model.bin and their "
        "shards; the folder holds config.json, generation_config.json."
    )


def test_missing_shard_and_missing_index(bluelm: Path) -> None:
    (bluelm / "pytorch_model-00002-of-00004.bin").unlink()
    with pytest.raises(ConfigError) as caught:
        load(bluelm)
    assert str(caught.value) == (
        f"{bluelm}: 1 of 4 weight files of pytorch_model.bin.index.json are missing: "
        "pytorch_model-00002-of-00004.bin.\n  Fetch them; a download may have been cut."
    )
    (bluelm / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ConfigError) as caught:
        load(bluelm)
    assert str(caught.value) == (
        f"{bluelm}: weight shards without pytorch_model.bin.index.json, which says what they "
        "hold; fetch that file too."
    )


def test_damaged_safetensors(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError) as caught:
        load(llama)
    assert str(caught.value).startswith(
        f"{llama}: transformers cannot load this model (model_type 'llama').\n  SafetensorError: "
    )


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: no config.json, so this is no model folder; it holds model.safetensors."
    )
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}', "utf-8")
    with pytest.raises(ConfigError, match=r"\n  This is an adapter; its base model is a/b\.$"):
        load_config(str(tmp_path))


def test_unknown_architecture_and_remote_code(tmp_path: Path) -> None:
    """No question is asked, no code is run."""
    (tmp_path / "configuration_odd.py").write_text("raise SystemExit('it ran')", "utf-8")
    content = {"model_type": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path))
    assert str(caught.value).startswith(
        f"{tmp_path}/config.json: transformers cannot use it (model_type 'odd').\n"
    )
    assert str(caught.value).endswith(
        "\n  It points at code in the model folder, which is not run unless you ask for it with "
        "--trust-remote-code. Read that code first."
    )


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config: OddConfig
"""


def test_remote_code_when_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `.bin` weights too, whose converted copy lies in another folder than the code."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (llama / "odd.py").write_text(REMOTE, "utf-8")
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    edit(llama / "config.json", model_type="odd", auto_map=auto_map)
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    assert type(load(llama, trust_remote_code=True).model).__name__ == "OddForCausalLM"
    (llama / "model.safetensors").unlink()
    assert type(load(llama, trust_remote_code=True).model).__name__ == "OddForCausalLM"


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', "utf-8")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"transformers cannot load this model .*'vit'"):
        load(tmp_path)


def count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_meta_model_counts_the_published_7b() -> None:
    config = BlueLMConfig(vocab_size=100008, use_stable_embedding=True)
    model = meta_model(config)
    assert count(model) == 7_295_545_344
    assert len(model.state_dict()) == 293
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_meta_model_of_a_folder(golden: Path) -> None:
    parameters = json.loads((golden / "manifest.json").read_text("utf-8"))
    for name in ("mha_stable", "no_stable", "ntkmixed", "gqa_derived"):
        assert count(meta_model(str(golden / name))) == parameters[name]["parameters"]


def test_meta_model_of_another_architecture() -> None:
    config = Qwen2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert count(meta_model(config)) > 0


def test_context_is_what_the_config_says_and_ntkmixed_counts_before_the_scaling(
    golden: Path,
) -> None:
    assert context_length(load_config(str(golden / "mha_stable"))) == 2048
    assert context_length(load_config(str(golden / "ntkmixed"))) == 64 * 16
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(MambaConfig()) is None


def test_an_architecture_without_sdpa_loads_with_its_eager_attention(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu")).model
    assert model.config._attn_implementation == "eager"
