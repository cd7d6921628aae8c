"""The merged folder against peft's own merge in float64, and against BlueLM's published outputs."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from myna.errors import ConfigError, MynaError, NonFiniteError, StorageError
from myna.export import merge as merging
from myna.export.merge import merge
from myna.export.origin import built_in_prompts, open_origin
from myna.export.verify import logits_of_folder
from myna.models.load import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = ["mha_stable", "no_stable", "ntkmixed", "gqa_derived"]
CPU = torch.device("cpu")

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.self_attn.v_proj": 5},
    },
    "dora": {"use_dora": True, "use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
}


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """State of base and adapter merged by peft in float64."""
    model = load_model(str(base), dtype=torch.float64, device=CPU).model
    with_adapter = PeftModel.from_pretrained(model, str(adapter)).double()
    return with_adapter.merge_and_unload().state_dict()


def merged(adapter: Path, out: Path, texts: list[list[int]], **options: object) -> LlamaForCausalLM:
    """Our merge, loaded as anybody would."""
    merge(open_origin(str(adapter), needs_adapter=True), out, texts, **options)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning", "ignore:Setting .save_embedding")
@pytest.mark.parametrize(
    ("variant", "tied"),
    [
        *((variant, False) for variant in VARIANTS),
        *((variant, True) for variant in ("plain", "head", "embedding", "whole modules")),
    ],
)
def test_every_tensor_is_what_peft_makes_in_float64(
    make_base, make_adapter, tmp_path, texts, variant, tied
) -> None:
    base = make_base(tie_word_embeddings=tied)
    adapter = make_adapter(base, **VARIANTS[variant])
    model = merged(adapter, tmp_path / "out", texts)
    with torch.no_grad():
        ours = model(torch.tensor(texts[1:])).logits
    reference = load_model(str(base), dtype=torch.float64, device=CPU).model
    theirs = PeftModel.from_pretrained(reference, str(adapter)).double()
    with torch.no_grad():
        expected = theirs(torch.tensor(texts[1:])).logits
    plain = load_model(str(base), dtype=torch.float64, device=CPU).model
    with torch.no_grad():
        assert (plain(torch.tensor(texts[1:])).logits - expected).abs().max() > 0.3
    torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=1e-4)
    changed = variant in ("head", "embedding", "whole modules", "whole head")
    assert model.config.tie_word_embeddings == (tied and not changed)
    if tied and changed:
        return  # peft merges into the tied weight; the logits above say which of the two is right
    wanted = peft_merged(base, adapter)
    assert wanted.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen3", "mistral"])
def test_other_families_and_layers_stored_the_other_way_round(
    make_base, make_adapter, tmp_path, texts, family
) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    base = make_base(family)
    adapter = make_adapter(base, **(targets if family == "gpt2" else {}))
    model = merged(adapter, tmp_path / "out", texts)
    wanted = peft_merged(base, adapter)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)


def test_a_bfloat16_base_is_rounded_once(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    origin = open_origin(str(adapter), needs_adapter=True)
    agreement = merge(origin, tmp_path / "out", texts)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    wanted = peft_merged(base, adapter)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        once = wanted[name].to(torch.bfloat16)
        assert (tensor == once).float().mean() > 0.999, name
        torch.testing.assert_close(tensor, once, atol=1e-6, rtol=2**-7, msg=name)
    assert 0 < agreement.mean_kl <= agreement.largest_kl < 0.2
    whole = merge(origin, tmp_path / "whole", texts, dtype=torch.float32)
    assert whole.largest_kl < 1e-5
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", GOLDENS)
def test_bluelm_becomes_a_llama_with_the_published_outputs(
    golden_base, make_adapter, tmp_path, texts, name
) -> None:
    """An adapter that adds nothing: what is left is the folding, against vivo's own code."""
    adapter = make_adapter(golden_base(name), size=0.0)
    model = merged(adapter, tmp_path / "out", texts, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        single = model(expected["single.input_ids"]).logits
        long = model(expected["long.input_ids"]).logits[:, expected["long.positions"]]
    torch.testing.assert_close(single, expected["single.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(long, expected["long.logits"], atol=1e-4, rtol=0)
    ids = expected["generate.single.input_ids"]
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert greedy.tolist() == expected["generate.single.sequences"].tolist()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"] and settings["model_type"] == "llama"
    assert "auto_map" not in settings and "use_stable_embedding" not in settings
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if "embed_layer_norm" in name]
    assert "BlueLM was written as Llama" in (tmp_path / "out" / "README.md").read_text()


def test_bluelm_with_an_adapter(golden_base, make_adapter, tmp_path, texts) -> None:
    base = golden_base("hub_like")
    adapter = make_adapter(base)
    model = merged(adapter, tmp_path / "out", texts, dtype=torch.float32)
    wanted = peft_merged(base, adapter)
    weight, bias = (wanted.pop(f"model.embed_layer_norm.{part}") for part in ("weight", "bias"))
    table = wanted["model.embed_tokens.weight"]
    wanted["model.embed_tokens.weight"] = torch.nn.functional.layer_norm(
        table, table.shape[1:], weight, bias, 1e-6
    )
    assert wanted.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=5e-6, rtol=5e-6, msg=name)
    # The tokenizer goes along and needs no code either.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    case = json.loads((base / "expected.json").read_text())["cases"][0]
    assert tokenizer(case["prompt"])["input_ids"] == case["prompt_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False,
        add_generation_prompt=True) == "<s>[|Human|]:你好[|AI|]:"  # fmt: skip


def test_what_goes_along(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    (base / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "eos_token_id": [2, 1], "temperature": 0.7})
    )
    adapter = make_adapter(base)
    out = tmp_path / "deep" / "er" / "out"
    merge(open_origin(str(adapter), needs_adapter=True), out, texts)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 1], "pad_token_id": 0, "temperature": 0.7}
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert not list(out.parent.glob(".*"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_large_models_come_in_shards(
    make_base, make_adapter, tmp_path, texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    monkeypatch.setattr(merging, "SHARD_BYTES", 100_000)
    model = merged(adapter, tmp_path / "out", texts)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    wanted = peft_merged(base, adapter)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)


def refused(adapter: Path, out: Path, texts: list[list[int]], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        merge(open_origin(str(adapter), needs_adapter=True), out, texts)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(caught.value)


UNMERGEABLE = {
    "target_parameters": (["mlp.experts"], "it adapts parameters that are no layers"),
    "alora_invocation_tokens": ([5], "it acts only after its invocation tokens (aLoRA)"),
    "use_qalora": (True, "its A acts on averages of the input (QA-LoRA)"),
    "lora_bias": (True, "its B has a bias"),
    "trainable_token_indices": ([1], "it trained single rows of the embedding"),
    "init_lora_weights": ("pissa", "it was saved with init_lora_weights 'pissa'"),
}


@pytest.mark.parametrize("key", UNMERGEABLE)
def test_adapters_that_are_more_than_a_sum(make_base, make_adapter, tmp_path, texts, key) -> None:
    adapter = make_adapter(make_base())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    value, reason = UNMERGEABLE[key]
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
    text = refused(adapter, tmp_path / "out", texts, ConfigError)
    assert text.startswith(f"{adapter}: this adapter cannot be merged: {reason}")
    assert text.endswith("\n  Use it as it is, with peft or `myna chat`.")


def test_tensors_without_a_place(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    adapter = make_adapter(base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)

    def told(name: str, tensor: torch.Tensor) -> str:
        save_file(tensors | {name: tensor}, file)
        return refused(adapter, tmp_path / "out", texts, ConfigError)

    start = f"{adapter}: this adapter cannot be merged: it holds base_model.model."
    assert told("base_model.model.lm_head.weight", torch.ones(5, 64)).startswith(
        f"{start}lm_head.weight, of shape (5, 64); the base has (264, 64)."
    )
    assert told("base_model.model.lm_head.weight", torch.ones(264, 64)).startswith(
        f"{start}lm_head.weight, which is another one than the base's."
    )
    assert told("base_model.model.new.weight", torch.ones(2)).startswith(
        f"{start}new.weight, which has no place in the base."
    )


def test_names_that_transformers_converts(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    adapter = make_adapter(base, target_modules=["q_proj"])
    weights = load_file(base / "model.safetensors")
    old = "model.layers.0.self_attn.q_proj.weight"
    weights["model.layers.0.attention.wq.weight"] = weights.pop(old)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert refused(adapter, tmp_path / "out", texts, ConfigError) == (
        "This adapter cannot be merged: the base's files do not hold these weights under the "
        f"names that the model has for them (transformers converts them as it loads):\n  {old}\n"
        "  Use it as it is, with peft or `myna chat`."
    )


def test_a_quantised_base(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    adapter = make_adapter(base)
    settings = json.loads((base / "config.json").read_text())
    quantised = settings | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(quantised))
    assert refused(adapter, tmp_path / "out", texts, ConfigError) == (
        f"{base}: its weights are quantised (gptq), and merging needs them as they were: rounding "
        "them again after adding the adapter would undo part of the training.\n"
        "  Use the adapter as it is (`myna chat`), or train on the model that it was made from."
    )
    (base / "config.json").write_text(json.dumps(settings))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert refused(adapter, tmp_path / "out", texts, ConfigError) == (
        f"{base / 'model.safetensors'}: lm_head.weight is stored as I8; expected F64, F32, F16, "
        "BF16.\n  Weights in fewer bits are not merged: take the model that it was made from."
    )


def test_places_that_are_taken(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    adapter = make_adapter(base)
    (tmp_path / "there").mkdir()
    origin = open_origin(str(adapter), needs_adapter=True)
    with pytest.raises(ConfigError) as caught:
        merge(origin, tmp_path / "there", texts)
    assert str(caught.value) == (
        f"{tmp_path / 'there'} exists; nothing was written.\n  Give a name that is free."
    )
    for folder in (adapter, base):
        with pytest.raises(ConfigError) as caught:
            merge(origin, folder / "x", texts)
        assert str(caught.value) == (
            f"{folder / 'x'} lies in {folder}, which it is made from; nothing was written.\n"
            "  Give a place outside of it."
        )


def test_no_room(make_base, make_adapter, tmp_path, texts, monkeypatch) -> None:
    adapter = make_adapter(make_base())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 7_000_000)
    )  # type: ignore[attr-defined]
    assert refused(adapter, tmp_path / "a" / "out", texts, StorageError) == (
        f"{tmp_path / 'a' / 'out'}: the disk has 7 MB left, and this needs 32 MB; nothing was "
        "written.\n  Make room, or give another place."
    )


def test_broken_numbers(make_base, make_adapter, tmp_path, texts) -> None:
    base = make_base()
    adapter = make_adapter(base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    assert refused(adapter, tmp_path / "out", texts, NonFiniteError).startswith(
        "model.layers.1.mlp.up_proj.weight has values that are not finite after the adapter was "
        "added; nothing was written."
    )


def test_a_wrong_result_gets_no_name(
    make_base, make_adapter, tmp_path, texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net under everything: here a merge that forgets one layer."""
    adapter = make_adapter(make_base())
    origin = open_origin(str(adapter), needs_adapter=True)
    whole = merging.merged_weights(origin)
    name = "model.layers.1.self_attn.v_proj.weight"
    forgotten = type(whole.tensors[name])(**vars(whole.tensors[name]) | {"changes": ()})
    monkeypatch.setattr(
        merging,
        "merged_weights",
        lambda _: type(whole)(
            whole.tensors | {name: forgotten},
            whole.settings,
            whole.config,
            whole.notes,  # type: ignore[operator]
        ),
    )
    text = refused(adapter, tmp_path / "out", texts, ConfigError)
    assert text.startswith("The merged model does not say what base and adapter say: ")
    assert "Rounding to float32 explains 1e-07 in the mean and 1e-05 at most." in text
    assert text.endswith("as it loads them. Use the adapter as it is.")


def test_what_a_killed_merge_left_is_removed(make_base, make_adapter, tmp_path, texts) -> None:
    adapter = make_adapter(make_base())
    gone, own = tmp_path / ".out.tmp-4194999", tmp_path / f".out.tmp-{os.getppid()}"
    for left in (gone, own):
        left.mkdir()
        (left / "half").write_text("x")
    merge(open_origin(str(adapter), needs_adapter=True), tmp_path / "out", texts)
    assert not gone.exists()
    assert (own / "half").exists(), "its process lives"


def test_what_is_no_adapter(make_base, tmp_path) -> None:
    base = make_base()
    with pytest.raises(ConfigError) as caught:
        open_origin(str(base), needs_adapter=True)
    assert str(caught.value) == (
        f"{base}: neither a run (no adapter/) nor an adapter (no adapter_config.json).\n"
        "  Give a run directory such as runs/NAME, or an adapter folder."
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        open_origin(str(tmp_path / "run"), needs_adapter=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: this run is not finished and has no adapter yet.\n"
        f"  Finish it with `myna train {tmp_path / 'run'}`."
    )


def test_questions_for_runs_without_held_out_rows(make_base) -> None:
    encoder = open_origin(str(make_base()), needs_adapter=False).encoder
    prompts = built_in_prompts(encoder)
    assert len(prompts) == 8 and len(set(prompts)) == 8
    assert encoder.tokenizer.decode(prompts[1]).startswith("<|im_start|>user\n你是谁？")


def test_adapters_of_what_is_no_linear_layer(make_base, make_adapter, tmp_path, texts) -> None:
    adapter = make_adapter(make_base())
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    more = {name.format("A"): torch.ones(4, 64), name.format("B"): torch.ones(96, 4)}
    save_file(tensors | more, file)
    assert refused(adapter, tmp_path / "out", texts, ConfigError) == (
        f"{adapter}: this adapter cannot be merged; it has tensors for what is no linear layer of "
        "LlamaForCausalLM:\n  model.layers.0.mlp.experts\n  Use it as it is, with peft or "
        "`myna chat`."
    )


def test_an_adapter_that_names_no_base(make_base, make_adapter) -> None:
    adapter = make_adapter(make_base())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        open_origin(str(adapter), needs_adapter=True)
    assert str(caught.value) == (
        f"{adapter / 'adapter_config.json'} names no base model.\n"
        "  Write the folder or hub id of the base into base_model_name_or_path."
    )


def test_experts_stay_as_they_are_in_the_files(make_base, make_adapter, tmp_path, texts) -> None:
    """transformers fuses the experts of Mixtral as it loads them; the files keep them apart."""
    base = make_base("mixtral")
    keys = load_file(base / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in keys
    adapter = make_adapter(base, target_modules=["q_proj", "o_proj"])
    model = merged(adapter, tmp_path / "out", texts)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == keys
    wanted = peft_merged(base, adapter)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)


def test_folders_that_do_not_load(make_base, tmp_path) -> None:
    base = make_base()
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        logits_of_folder(base, [[1]], "cpu", torch.float32)
    assert str(caught.value) == (
        "The merged model does not load whole (missing_keys: ['model.norm.weight']); nothing was "
        "written.\n  transformers converts the weights of this architecture as it loads them, "
        "which a merge does not do. Use the adapter as it is."
    )
    (base / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MynaError, match=r"does not load with transformers .*a bug in myna"):
        logits_of_folder(base, [[1]], "cpu", torch.float32)
