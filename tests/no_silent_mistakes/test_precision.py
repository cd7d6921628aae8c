"""Defects of precision and memory: the number format is chosen aloud, the loss is the step's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from myna.config import leaves
from myna.training.events import read_events

from .conftest import SOME, Checkpoint, Terminal


def losses(name: str) -> list[float]:
    events = read_events(Path("runs") / name / "events.jsonl")
    return [event["loss"] for event in events if event["event"] == "step"]


def test_fp16_weights_without_amp(terminal: Terminal, checkpoint: Checkpoint) -> None:
    job = terminal.job(checkpoint("llama3"), SOME)
    for written in ("dtype=float16", "torch_dtype=float16"):
        said = terminal.run("train", job, written)
        assert said.code == 2
        assert "float16 on a CPU is refused" in said.text and "dtype: auto" in said.text
    # Whatever the base is in, the adapter and the optimizer are float32.
    assert terminal.run("train", job, "dtype=bfloat16").code == 0
    adapter = load_file("runs/job/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_weights_fp32(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Nobody asked for a format: one is chosen by measurement, and the run says which and why."""
    said = terminal.run("train", terminal.job(checkpoint("llama3"), SOME, dtype="auto"))
    assert said.code == 0
    plan = json.loads(Path("runs/job/plan.json").read_text())
    assert plan["dtype"] in ("bfloat16", "float32", "float16")
    assert plan["reason"].startswith(plan["dtype"])
    assert " ".join(f"computing on {plan['device']}, {plan['reason']}".split()) in said.text


def test_kbit_without_prepare(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """There is no half-prepared 4-bit base: the setting is unknown, and not ignored."""
    job = terminal.job(checkpoint("llama3"), SOME)
    for name in ("load_in_4bit", "load_in_8bit", "quantization_bit"):
        assert name not in {key.rpartition(".")[2] for key in leaves()}
        said = terminal.run("train", job, f"{name}=true")
        assert said.code == 2 and f'unknown key "{name}"' in said.text


def test_gc_without_input_grads(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Recomputing activations changes no loss, and the lowest layer learns."""
    job = terminal.job(checkpoint("llama3"), SOME, train__max_steps=3)
    for value in ("true", "false"):
        said = terminal.run("train", job, f"gradient_checkpointing={value}", f"output=runs/{value}")
        assert said.code == 0, said.text
        adapter = load_file(f"runs/{value}/adapter/adapter_model.safetensors")
        lowest = {
            name: t for name, t in adapter.items() if ".layers.0." in name and "lora_B" in name
        }
        assert len(lowest) == 7 and all(tensor.any() for tensor in lowest.values())
    assert losses("true") == pytest.approx(losses("false"), rel=1e-6)


def test_loss_scaled_by_accumulation(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The same rows in pieces of any size: the loss is the mean over the step's trained tokens."""
    job = terminal.job(checkpoint("llama3"), SOME, train={"max_steps": 2})
    for rows, times in ((4, 1), (2, 2), (1, 4)):
        said = terminal.run(
            "train",
            job,
            f"per_device_train_batch_size={rows}",
            f"gradient_accumulation_steps={times}",
            f"output=runs/{times}",
        )
        assert said.code == 0, said.text
    assert losses("2") == pytest.approx(losses("1"), rel=1e-5)
    assert losses("4") == pytest.approx(losses("1"), rel=1e-5)
