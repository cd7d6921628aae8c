"""Steps that are not finite move nothing, and can be computed again from what is kept."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from myna.data.conversation import Place
from myna.data.store import Example
from myna.errors import NonFiniteError
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state
from myna.training.checkpoint import State, latest_checkpoint
from myna.training.computation import Padded
from myna.training.events import read_events
from myna.training.nonfinite import too_many

from .test_fit import CPU, PAD, random_rows, run, settings, tiny_model, weights

NAN, INF = float("nan"), float("inf")


def poison(model: Any, steps: set[int], value: float) -> None:
    """Have the last norm give `value` in these steps (one micro-batch each, from 1)."""
    calls = 0

    def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        if not model.training:
            return None
        calls += 1
        return output * value if calls in steps else None

    model.get_submodule("base_model.model.model.norm").register_forward_hook(hook)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("step", [1, 3])
def test_the_run_stops_with_its_rows_and_the_step_can_be_repeated(
    tmp_path: Path, value: float, step: int
) -> None:
    rows, folder = random_rows(8), tmp_path / "checkpoints"
    model = tiny_model()
    poison(model, {step}, value)
    with pytest.raises(NonFiniteError) as caught:
        run(model, rows, settings(epochs=2, save_steps=1), folder=folder)
    assert caught.value.exit_code == 6
    dump = tmp_path / "nonfinite" / f"step-{step:08d}"
    assert f"step {step}: loss is nan" in str(caught.value) and str(dump) in str(caught.value)
    stopped = weights(model)
    assert all(bool(tensor.isfinite().all()) for tensor in stopped.values())
    found = latest_checkpoint(folder, pytest.fail)
    assert found is None if step == 1 else found is not None and found.state.step == step - 1
    # From the dump alone: the same rows on the same adapter, with what was wrong, are nan again,
    # and without it they are what the step would have been.
    described = json.loads((dump / "step.json").read_text())
    again = [
        Example(
            "", "", tuple(row["prompt_ids"]), tuple(row["completion_ids"]), Place(Path(), 1, 1), 1
        )
        for row in described["rows"]
    ]
    assert [row["row"] for row in described["rows"]] == [
        rows.index(example) for example in [rows[row["row"]] for row in described["rows"]]
    ]
    other = tiny_model()
    load_adapter_state(other, load_file(dump / "adapter.safetensors"))
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in weights(other).items())
    padded = Padded(len(again), PAD, CPU)
    (piece,) = padded.pieces(again, range(len(again)))
    assert math.isfinite(padded.summed_loss(other, piece).item())
    poison(other.train(), {1}, value)
    assert not math.isfinite(padded.summed_loss(other, piece).item())


def test_a_step_that_is_left_out_moves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    rows, folder = random_rows(8), tmp_path / "checkpoints"
    model = tiny_model()
    poison(model, {2}, NAN)
    chosen = settings(epochs=2, save_steps=1, on_nonfinite="skip", keep_checkpoints=4)
    result = run(model, rows, chosen, folder=folder)
    assert result.step == 4 and len(result.losses) == 3
    states = {
        step: load_file(folder / f"step-{step:08d}" / "adapter.safetensors") for step in range(1, 5)
    }
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert any(not torch.equal(states[2][name], states[3][name]) for name in states[1])
    found = latest_checkpoint(folder, pytest.fail)
    assert found is not None and found.state.skipped_steps == (2,)
    events = list(read_events(folder / "events.jsonl"))
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 3, 4]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert "step 2 is left out (on_nonfinite: skip): loss nan" in warning["message"]


def test_more_than_three_of_a_hundred_are_too_many(tmp_path: Path) -> None:
    assert not too_many([], 1) and not too_many([1, 2], 3) and too_many([1, 2, 3], 4)
    assert not too_many([1, 2, 3], 101 + 1)  # 1 and 2 are long ago
    model = tiny_model()
    poison(model, {1, 2, 3, 4}, NAN)
    with pytest.raises(NonFiniteError, match=r"step 4: loss is nan.* 3 were left out before it"):
        run(
            model,
            random_rows(4),
            settings(epochs=9, on_nonfinite="skip"),
            folder=tmp_path / "checkpoints",
        )


def test_every_adapter_weight_has_a_gradient_after_the_first_step() -> None:
    from myna.errors import ConfigError

    model = tiny_model()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.forward = layer.base_layer.forward  # the adapter is there and nothing passes through it
    with pytest.raises(ConfigError) as caught:
        run(model, random_rows(4), settings(epochs=1))
    assert str(caught.value).startswith(
        "After the first step 1 adapter weights have no gradient, so they would never learn: "
        "model.layers.1.mlp.up_proj.lora_B."
    )


def test_a_loss_that_jumps_is_told_once(tmp_path: Path) -> None:
    model = tiny_model()
    poison(model, {15, 16}, 40.0)
    folder = tmp_path / "checkpoints"
    run(model, random_rows(4), settings(epochs=20, learning_rate=1e-9), folder=folder)
    told = [e for e in read_events(folder / "events.jsonl") if e["event"] == "warning"]
    assert [event["step"] for event in told] == [15]
    assert "more than 10 times the" in told[0]["message"]


def test_state_reads_back_as_it_was(tmp_path: Path) -> None:
    from myna.training.checkpoint import save_checkpoint

    state = State(7, run="abc", skipped_steps=(2, 5), environment={"threads": 2})
    model = tiny_model()
    save_checkpoint(tmp_path, state, adapter_state(model), {}, keep=2)
    found = latest_checkpoint(tmp_path, pytest.fail, "abc")
    assert found is not None and found.state == state
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append, "another") is None
    assert said == ["checkpoint step-00000007 belongs to another run and is not used"]
