"""Several adapters side by side: each computes as if it were alone, and none leaves a trace."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from myna.errors import ConfigError
from myna.lora.switch import AdapterSwitch

IDS = torch.arange(24).reshape(2, 12)
KINDS = {
    "all.linear": {"r": 4, "target_modules": "all-linear"},
    "two": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"r": 3, "target_modules": ["up_proj", "o_proj"], "use_dora": True},
}


def save_by_peft(model, folder, seed, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    peft_model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def folders(make_model, tmp_path):
    return {
        name: save_by_peft(make_model(), tmp_path / name, seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
    }


def test_each_computes_as_peft_computes_it_alone_in_any_order(make_model, folders):
    model = make_model()
    switch = AdapterSwitch(model, folders)
    expected = {None: logits(make_model())} | {
        name: logits(PeftModel.from_pretrained(make_model(), folder))
        for name, folder in folders.items()
    }
    for name in [None, "two", "dora", None, "all.linear", "two", "two", "all.linear", None, "dora"]:
        switch.use(name)
        assert switch.active == name
        torch.testing.assert_close(logits(model), expected[name])
    assert len({round(float(found.sum()), 3) for found in expected.values()}) == 4


def test_without_adapters_there_is_the_base(make_model):
    model = make_model()
    switch = AdapterSwitch(model, {})
    switch.use(None)
    torch.testing.assert_close(logits(model), logits(make_model()))


def test_what_does_not_fit_is_refused_before_anything_is_loaded(make_model, folders):
    model = make_model()
    file = folders["two"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all"}))
    with pytest.raises(ConfigError, match=r"trained biases \(bias 'all'\), which change the base"):
        AdapterSwitch(model, folders)
    assert not any("lora" in name for name, _ in model.named_parameters())
