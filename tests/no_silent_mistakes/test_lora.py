"""Defects of LoRA: the adapter is where it was meant to be, once, and it is what is trained."""

import hashlib
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from myna.models.load import load_model
from myna.training.events import read_events

from .conftest import SOME, Checkpoint, Terminal, adapted


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def adapter(terminal: Terminal, name: str = "job") -> dict[str, torch.Tensor]:
    return load_file(terminal.folder / "runs" / name / "adapter" / "adapter_model.safetensors")


def test_doc_omits_get_peft_model(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The one documented command trains an adapter, not the model, and says how much that is."""
    model = checkpoint("llama3")
    before = digest(model)
    said = terminal.run("train", terminal.job(model, SOME))
    assert said.code == 0
    tensors = adapter(terminal)
    trainable = sum(tensor.numel() for tensor in tensors.values())
    base = AutoModelForCausalLM.from_pretrained(model)
    total = sum(parameter.numel() for parameter in base.parameters()) + trainable
    assert f"{trainable:,} of {total:,} parameters trained" in said.text
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert digest(model) == before
    (start,) = [
        event for event in read_events(Path("runs/job/events.jsonl")) if event["event"] == "start"
    ]
    assert (start["trainable"], start["parameters"]) == (trainable, total)


@pytest.mark.parametrize(
    ("targets", "wrong", "near"),
    [
        ("q_attn,k_proj,v_proj,o_proj", "q_attn is not in this model", ""),
        ("q_proj,v_porj", "v_porj is not in this model", '"v_porj": did you mean "v_proj"?'),
        ("W_pack,o_proj", "W_pack is not in this model", ""),
    ],
)
def test_target_modules_partly_missing(
    terminal: Terminal, checkpoint: Checkpoint, targets: str, wrong: str, near: str
) -> None:
    job = terminal.job(checkpoint("llama3"), SOME)
    said = terminal.run("train", job, f"lora.target_modules={targets}")
    assert said.code == 2
    assert wrong in said.text and near in said.text
    assert "Linear layers it has: q_proj (2), k_proj (2)" in said.text
    assert not (terminal.folder / "runs" / "job" / "config.yaml").exists()


def test_target_modules_none_match(terminal: Terminal, checkpoint: Checkpoint) -> None:
    job = terminal.job(checkpoint("llama3"), SOME)
    said = terminal.run("train", job, "lora.target_modules=c_attn,c_proj,w1,w2")
    assert said.code == 2
    assert "c_attn, c_proj, w1, w2 are not in this model" in said.text
    said = terminal.run("train", job, r"lora.target_modules=(c_attn|w1)")
    assert said.code == 2 and "matches no layer" in said.text


@pytest.fixture(scope="module")
def seeing(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with a vision tower, tiny, with Gemma's tokenizer and template."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("gemma3"))
    tokenizer.save_pretrained(folder)
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = common | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=text | {"vocab_size": len(tokenizer)},
        vision_config=common | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_lora_on_vision_tower(terminal: Terminal, seeing: Path) -> None:
    """Names that also match the vision tower: said, with the expression that leaves it out.

    Nothing of them would learn from text, so the first step stops the run.
    """
    job = terminal.job(seeing, SOME, lora__target_modules=["q_proj", "v_proj"])
    said = terminal.run("train", job)
    assert said.code == 2, said.text
    assert "target_modules also matches layers outside the text model: q_proj (1)" in said.text
    assert "After the first step 2 adapter weights have no gradient" in said.text
    assert "vision_tower.encoder.layers.0.self_attn.q_proj" in said.text
    offered = said.text.partition("To leave them out: ")[2].split()[0]
    said = terminal.run("train", job, f"lora.target_modules={offered}", "output=runs/text")
    assert said.code == 0, said.text
    assert "outside the text model" not in said.text
    assert not any("vision" in name for name in adapter(terminal, "text"))


def test_lora_never_applied(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """What was saved has moved in every layer, and changes the answers of the base."""
    model = checkpoint("llama3")
    assert terminal.run("train", terminal.job(model, SOME, train__learning_rate=1e-2)).code == 0
    moved = {name: bool(t.any()) for name, t in adapter(terminal).items() if ".lora_B." in name}
    assert len(moved) == 14 and all(moved.values())
    ids = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        before = base(ids).logits
        after = peft.PeftModel.from_pretrained(base, "runs/job/adapter")(ids).logits
    assert (before - after).abs().max() > 1e-4


def test_peft_wrapped_twice(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Going on from an adapter keeps the one there is; a folder that has one inside is no base."""
    model = checkpoint("llama3")
    assert terminal.run("train", terminal.job(model, SOME, lora__rank=4)).code == 0
    once = adapter(terminal)
    job = terminal.job(model, SOME, lora={"start_from": "runs/job"})
    assert terminal.run("train", job, "output=runs/more").code == 0
    more = adapter(terminal, "more")
    assert {name: t.shape for name, t in more.items()} == {n: t.shape for n, t in once.items()}
    # The adapter folder given as the base.
    said = terminal.run("train", terminal.job(Path("runs/job/adapter"), SOME), "output=runs/third")
    assert said.code == 2
    assert f"This is an adapter; its base model is {model}" in said.text
    # An adapter lying in the base's folder: transformers would put it on without a word.
    both = Path(shutil.copytree(model, terminal.folder / "both"))
    for path in (terminal.folder / "runs" / "job" / "adapter").glob("adapter_*"):
        shutil.copy(path, both)
    said = terminal.run("train", terminal.job(both, SOME), "output=runs/both")
    assert said.code == 2
    assert "adapter_config.json" in said.text
    assert "lora.start_from" in said.text


def test_trainer_gets_base_model(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The loop's model is the one with the adapter: its steps move the adapter and nothing else."""
    model = load_model(
        str(checkpoint("llama3")), dtype=torch.float32, device=torch.device("cpu")
    ).model
    trained = {n for n, p in adapted(model).named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert terminal.run("train", terminal.job(checkpoint("llama3"), SOME)).code == 0
    steps = [e for e in read_events(Path("runs/job/events.jsonl")) if e["event"] == "step"]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    # A checkpoint holds what the optimizer moves: the tensors of the adapter.
    checkpoints = sorted(Path("runs/job/checkpoints").iterdir())
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    assert state["step"] == 2
    assert load_file(checkpoints[-1] / "adapter.safetensors").keys() == adapter(terminal).keys()
