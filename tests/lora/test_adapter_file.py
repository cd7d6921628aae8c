import json
import os
import stat

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from myna.errors import ConfigError, StorageError
from myna.lora.adapter_file import (
    AdapterMetadata,
    check_origin,
    inject_from,
    load_adapter,
    load_adapter_state,
    read_adapter,
    save_adapter,
)
from myna.lora.inject import adapter_state, inject

# peft asks transformers for a property under its deprecated name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

IDS = torch.arange(24).reshape(2, 12)
METADATA = AdapterMetadata(base_model="some/base", system="你是甄嬛", stop_ids=(2,), pad_id=3)


def put(model, **changed):
    settings = dict(
        rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", use_rslora=False,
        use_dora=False, init="default", seed=3,
    )  # fmt: skip
    return inject(model, **settings | changed)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def train(model, steps=5):
    """A few AdamW steps, large enough to move the logits well away from the start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(make_model, dtype=torch.float32, **settings):
    injected = put(make_model(dtype), **settings)
    train(injected.model)
    return injected


def save(injected, folder, metadata=METADATA):
    save_adapter(injected.model, folder, metadata=metadata, initial=injected.initial)


def plain_sum(base, folder):
    """W0 + alpha / r · B A by hand: no peft, no myna."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["init_lora_weights"] is True
    scaling = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, A in tensors.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = tensors[name.replace("lora_A", "lora_B")]
                weight = base.get_submodule(layer).weight
                weight.copy_(weight.float() + scaling * B @ A)
    return base


VARIANTS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"init": "gaussian"},
    {"init": "orthogonal", "use_rslora": True},
    {"init": "mica"},
    {"init": "pissa"},
    {"init": "pissa_niter_4", "use_rslora": True},
    {"init": "olora"},
    {"init": "olora", "use_rslora": True, "alpha": 5.0},
    {"init": "pissa", "use_dora": True},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.0\..*_proj"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_peft_loads_what_was_saved(make_model, tmp_path, settings):
    injected = trained(make_model, **settings)
    expected = logits(injected.model)
    assert (expected - logits(make_model())).abs().max() > 0.1
    save(injected, tmp_path)
    theirs = PeftModel.from_pretrained(make_model(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_load_adapter_gives_the_trained_logits(make_model, tmp_path, settings):
    injected = trained(make_model, **settings)
    save(injected, tmp_path)
    torch.manual_seed(0)
    random_before = torch.get_rng_state()
    loaded = load_adapter(make_model(), tmp_path)
    assert torch.equal(torch.get_rng_state(), random_before)
    torch.testing.assert_close(logits(loaded), logits(injected.model), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["default", "pissa", "pissa_niter_4", "olora"])
def test_the_untouched_base_plus_BA_is_the_trained_model(make_model, tmp_path, init, use_rslora):
    injected = trained(make_model, init=init, use_rslora=use_rslora, alpha=6.0)
    save(injected, tmp_path)
    by_hand = plain_sum(make_model(), tmp_path)
    torch.testing.assert_close(logits(by_hand), logits(injected.model), atol=1e-4, rtol=1e-4)


def test_conversion_doubles_the_rank_and_keeps_the_scaling(make_model, tmp_path):
    save(trained(make_model, init="pissa", rank=4, alpha=6.0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 12, False)
    save(trained(make_model, init="olora", rank=4, alpha=6.0, use_rslora=True), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    # 6 / sqrt(4) = 3 = 24 / 8.
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 24, False)


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_a_bfloat16_base(make_model, tmp_path, init):
    """The residual of PiSSA and OLoRA is rounded once; the bound is bfloat16's own noise."""
    injected = trained(make_model, torch.bfloat16, init=init)
    save(injected, tmp_path)
    exact = logits(make_model())
    noise = (logits(make_model(torch.bfloat16)) - exact).abs().max()
    loaded = load_adapter(make_model(torch.bfloat16), tmp_path)
    difference = (logits(loaded) - logits(injected.model)).abs().max()
    assert difference <= (0 if init == "default" else 3 * noise)


def test_saving_a_changed_base_without_its_initial_values_is_our_bug(make_model, tmp_path):
    injected = put(make_model(), init="pissa")
    with pytest.raises(AssertionError, match=r"pass Injected.initial to save_adapter"):
        save_adapter(injected.model, tmp_path, metadata=METADATA)


@pytest.mark.parametrize("init", ["default", "pissa", "pissa_niter_4", "olora"])
def test_a_resumed_run_ends_in_the_same_bytes(make_model, tmp_path, init):
    """A checkpoint holds the adapter state only; the same seed makes the rest again."""
    straight = put(make_model(), init=init)
    train(straight.model, steps=2)
    kept = {name: tensor.clone() for name, tensor in adapter_state(straight.model).items()}
    train(straight.model, steps=2)
    save(straight, tmp_path / "straight")

    resumed = put(make_model(), init=init)
    load_adapter_state(resumed.model, kept)
    train(resumed.model, steps=2)
    save(resumed, tmp_path / "resumed")
    for file in ("adapter_model.safetensors", "adapter_config.json", "myna.json"):
        one, other = ((tmp_path / run / file).read_bytes() for run in ("straight", "resumed"))
        assert one == other, file


def test_the_files(make_model, tmp_path):
    save(put(make_model()), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "myna.json",
    ]  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text("utf-8")


def test_files_have_the_mode_that_the_umask_gives(make_model, tmp_path):
    before = os.umask(0o022)
    try:
        save(put(make_model()), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "adapter").iterdir()}
    assert modes == {0o644}


def test_metadata_comes_back(make_model, tmp_path):
    metadata = METADATA.model_copy(
        update={"template_origin": "built-in bluelm", "template_options": {"thinking": False}}
    )
    save(put(make_model()), tmp_path, metadata)
    assert read_adapter(tmp_path).metadata == metadata
    assert "你是甄嬛" in (tmp_path / "myna.json").read_text("utf-8")
    info = read_adapter(tmp_path)
    assert (info.rank, info.alpha, info.use_dora, info.base_model) == (4, 8, False, "some/base")


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_made_by_peft_loads(make_model, tmp_path, init, use_dora):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        use_dora=use_dora,
    )  # fmt: skip
    theirs = get_peft_model(make_model(), config)
    train(theirs)
    theirs.save_pretrained(str(tmp_path))
    assert read_adapter(tmp_path).metadata is None
    loaded = load_adapter(make_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(theirs), atol=1e-4, rtol=1e-4)


def test_a_finished_adapter_is_trained_on(make_model, tmp_path):
    first = trained(make_model, use_rslora=True, target_modules=["q_proj", "up_proj"])
    save(first, tmp_path / "first")
    second = inject_from(make_model(), tmp_path / "first", dropout=0.25)
    assert second.matches == {"q_proj": 2, "up_proj": 2} == dict(first.matches)
    assert (second.trainable, second.total) == (first.trainable, first.total)
    assert second.covered == first.covered
    assert second.model.peft_config["default"].lora_dropout == 0.25
    torch.testing.assert_close(logits(second.model), logits(first.model))
    train(second.model)
    save(second, tmp_path / "second")
    assert (logits(second.model) - logits(first.model)).abs().max() > 0.01
    again = load_adapter(make_model(), tmp_path / "second")
    torch.testing.assert_close(logits(again), logits(second.model), atol=1e-5, rtol=1e-4)
    assert read_adapter(tmp_path / "second").use_rslora


def test_a_converted_adapter_is_trained_on(make_model, tmp_path):
    first = trained(make_model, init="pissa")
    save(first, tmp_path / "first")
    second = inject_from(make_model(), tmp_path / "first", dropout=0.0)
    assert second.trainable == 2 * first.trainable
    save(second, tmp_path / "second")
    again = PeftModel.from_pretrained(make_model(), str(tmp_path / "second"))
    torch.testing.assert_close(logits(again), logits(first.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"bias": "lora_only"}, "has trained biases (bias 'lora_only'); myna goes on"),
        ({"modules_to_save": ["norm"]}, "has whole modules (norm); myna goes on with plain LoRA"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', so it belongs to a cha"),
    ],
)
def test_training_on_refuses_what_is_more_than_lora(make_model, tmp_path, changed, text):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changed})
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        inject_from(make_model(), tmp_path, dropout=0.0)
    assert str(caught.value).startswith(f"lora.start_from: {tmp_path} {text}")


def test_a_base_that_cannot_be_made_again_is_refused(make_model, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_2")
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pissa_niter_2': the adapter be"):
        load_adapter(make_model(), tmp_path)


def test_pickle_is_not_read(make_model, tmp_path):
    theirs = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(ConfigError) as caught:
        load_adapter(make_model(), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds adapter_model.bin only, a pickle, which can run code when it is read; "
        "expected adapter_model.safetensors.\n"
        "  If you trust its source, load it with peft and write it again with "
        "save_pretrained(folder), which writes safetensors."
    )


def test_folders_that_are_no_adapters(make_model, tmp_path):
    (tmp_path / "runs" / "emperor").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path / "runs" / "empress")
    assert str(caught.value) == (
        f"{tmp_path / 'runs' / 'empress'}: there is no such adapter folder. {tmp_path / 'runs'} "
        "holds: emperor/."
    )
    run = tmp_path / "runs" / "emperor"
    save(put(make_model()), run / "adapter")
    with pytest.raises(ConfigError) as caught:
        read_adapter(run)
    assert str(caught.value) == (
        f"{run} is no adapter: it has no adapter_config.json. It holds: adapter/.\n"
        f"  Did you mean {run / 'adapter'}?"
    )
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"has no adapter_model.safetensors. It holds: adapter_co"
    ):
        read_adapter(run / "adapter")


def test_broken_files(make_model, tmp_path):
    save(put(make_model()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"adapter_model.safetensors is broken: .*\n  Copy the"):
        read_adapter(tmp_path)
    save(put(make_model()), tmp_path)
    (tmp_path / "myna.json").write_text('{"system": 5}')
    with pytest.raises(StorageError, match=r"myna.json: base_model: Field required.\n  Copy the"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(StorageError, match=r"adapter_config.json is no valid JSON: Expecting prop"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match=r"peft_type is 'IA3'; myna reads LORA adapters only."):
        read_adapter(tmp_path)


def test_an_adapter_of_a_newer_version_is_refused(make_model, tmp_path):
    save(put(make_model()), tmp_path)
    file = tmp_path / "myna.json"
    said = json.loads(file.read_text())
    assert said["format"] == 1
    file.write_text(json.dumps({"format": 2, "myna_version": "3.0.0", "something_new": {}}))
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path)
    assert str(caught.value) == (
        f"{file} was written by a newer version of myna (3.0.0): its format is 2, and this version "
        "reads up to 1.\n"
        "  Use that version, or read it as a plain peft adapter by leaving the file out."
    )
    del said["format"]  # as before there was one
    file.write_text(json.dumps(said))
    assert read_adapter(tmp_path).metadata.format == 1


def test_every_tensor_that_does_not_fit_is_listed(make_model, tmp_path):
    save(put(make_model(), target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    layers = "base_model.model.model.layers"
    tensors[f"{layers}.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors[f"{layers}.2.self_attn.q_proj.lora_B.weight"] = torch.zeros(48, 4)
    del tensors[f"{layers}.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError) as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not fit LlamaForCausalLM; it was made for some/base:\n"
        f"  {layers}.0.self_attn.q_proj.lora_A.weight is (4, 64), the model needs (4, 48)\n"
        f"  {layers}.2.self_attn.q_proj.lora_B.weight: the model has no linear layer "
        "model.layers.2.self_attn.q_proj\n"
        f"  {layers}.1.self_attn.q_proj.lora_B.weight is missing in the file\n"
        "  Use the base that it was trained on."
    )
    assert [name for name, _ in model.named_parameters()] == names  # nothing was put into it


def test_another_base_tokenizer_or_template_of_the_same_shape(make_model, tmp_path):
    known = {"base_fingerprint": "aaaa", "tokenizer_fingerprint": "tttt", "template_sha256": "jjjj"}
    save(put(make_model()), tmp_path, METADATA.model_copy(update=known))
    info = read_adapter(tmp_path)
    right = {"base": "aaaa", "tokenizer": "tttt", "template": "jjjj"}
    assert check_origin(info, **right) == ()
    for name, shown in (
        ("base", "base"),
        ("tokenizer", "tokenizer"),
        ("template", "chat template"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_origin(info, **(right | {name: "bbbb"}))
        assert str(caught.value) == (
            f"{tmp_path} does not belong here (its base was some/base):\n"
            f"  trained with the {shown} {right[name]}; here is bbbb\n"
            "  Use what it was trained with, or say --force-base to use it all the same."
        )
        (note,) = check_origin(info, **(right | {name: "bbbb"}), force=True)
        assert (
            note == f"forced by --force-base: trained with the {shown} {right[name]}; here is bbbb"
        )


def test_an_adapter_that_says_nothing_of_its_origin_belongs_anywhere(make_model, tmp_path):
    save(put(make_model()), tmp_path)
    (tmp_path / "myna.json").unlink()
    assert check_origin(read_adapter(tmp_path), base="aaaa", tokenizer="b", template="c") == ()


def test_a_folder_that_cannot_be_written(make_model, tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(StorageError) as caught:
        save(put(make_model()), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'adapter_config.json'}: could not be written")
