"""The memory planner: what it chooses, that its trials leave no trace, and that its limits hold."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from myna.data.conversation import Place
from myna.data.store import Example
from myna.errors import ConfigError
from myna.training.computation import TOKEN_BUDGET, Packed, Padded
from myna.training.memory import Ladder, MemoryPlan, plan_memory

CPU = torch.device("cpu")
JOB = Path(__file__).parent / "memory_job.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's")


def job(*processes: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """What `memory_job.py` found, or the last of several processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank, own in enumerate(processes or ({},)):
        together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(processes)}
        together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in together.items()} if processes else {}
        started.append(
            subprocess.Popen(
                [sys.executable, JOB, json.dumps(arguments | own)],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [process.communicate(timeout=900) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(ended[-1][0].splitlines()[-1])
    return found


def completed_steps(found: dict[str, Any]) -> list[int]:
    return [event["step"] for event in found["events"] if event["event"] == "step"]


@pytest.fixture(scope="module")
def unlimited() -> dict[str, Any]:
    return job(plans=True)


@linux
def test_the_peak_is_the_expected_one(unlimited: dict[str, Any]) -> None:
    plan = unlimited["plan"]
    assert (plan["limit"], plan["layers_recomputed"], plan["pieces"]) == (TOKEN_BUDGET, 0, 1)
    assert unlimited["peak"] == pytest.approx(plan["expected_peak_bytes"], rel=0.15)
    # Of what comes on top of the model too, where the allocator's gaps weigh more.
    taken = plan["expected_peak_bytes"] - unlimited["in_use"]
    assert taken > 100e6
    assert unlimited["peak"] - unlimited["in_use"] == pytest.approx(taken, rel=0.3)
    assert unlimited["said"].startswith(
        "steps in 1 pack of at most 686 tokens, no layer recomputed;"
    )


@linux
def test_where_memory_is_short_the_plan_is_smaller_and_its_peak_too(
    unlimited: dict[str, Any],
) -> None:
    whole = unlimited["plan"]["expected_peak_bytes"] - unlimited["in_use"]
    short = job(plans=True, headroom_mb=int(0.8 * whole / 1e6))
    plan = short["plan"]
    # Four or five of them, or all where the allocator packs less tightly.
    assert plan["layers_recomputed"] > 0 and plan["pieces"] == 1
    assert "6 layers recomputed (otherwise " in short["said"]
    assert short["losses"] == pytest.approx(unlimited["losses"], rel=1e-5)
    assert [event["event"] for event in short["events"]] == ["step"] * 3
    assert short["peak"] == pytest.approx(plan["expected_peak_bytes"], rel=0.15)
    assert short["peak"] - short["in_use"] < 0.8 * whole


@linux
def test_an_allocation_that_fails_in_mid_run_makes_a_smaller_plan_and_the_same_losses(
    unlimited: dict[str, Any],
) -> None:
    """RLIMIT_DATA is real here: torch's own allocator fails inside forward or backward."""
    whole = unlimited["plan"]["expected_peak_bytes"] - unlimited["in_use"]
    short = job(headroom_mb=int(0.7 * whole / 1e6))
    assert short["losses"] == pytest.approx(unlimited["losses"], rel=1e-5)
    assert completed_steps(short) == [1, 2, 3]
    first, said = short["events"][:2]
    assert (first["event"], said["event"]) == ("plan", "warning")
    assert first["step"] == 1 and first["memory"]["layers_recomputed"] == 2
    assert said["message"] == (
        "memory ran out in step 1; it is repeated with the same rows: "
        "steps in packs of at most 8,192 tokens, 2 of 6 layers recomputed"
    )


@linux
def test_one_process_that_lacks_memory_makes_all_repeat_the_step(unlimited: dict[str, Any]) -> None:
    whole = unlimited["plan"]["expected_peak_bytes"] - unlimited["in_use"]
    short = job({}, {"headroom_mb": int(0.35 * whole / 1e6)})
    assert short["losses"] == pytest.approx(unlimited["losses"], rel=1e-5)
    assert completed_steps(short) == [1, 2, 3]
    assert "plan" in [event["event"] for event in short["events"]]


@linux
def test_long_steps_are_cut_before_layers_recompute(unlimited: dict[str, Any]) -> None:
    """8 rows of 300 tokens are 2,392 computed ones; half of that is above 1,024."""
    plan = unlimited["plan"]
    per_token = (plan["expected_peak_bytes"] - unlimited["in_use"]) / plan["largest_piece"]
    found = job(
        plans=True, trains=False, batch=8, length=300, headroom_mb=int(1600 * per_token / 1e6)
    )
    # How tight the allocator packs differs from run to run, so that the next step may be needed.
    assert found["plan"]["limit"] in (1196, 1024) and found["plan"]["layers_recomputed"] == 0
    assert re.match(
        r"steps in up to [23] packs of at most [\d,]+ tokens, no layer recomputed \(otherwise ",
        found["said"],
    )


@linux
def test_where_not_one_row_fits_the_run_does_not_begin_and_says_what_would_help() -> None:
    found = job(plans=True, headroom_mb=20, batch=2, length=1600)
    assert "losses" not in found
    first, second = found["error"].split("\n")
    assert first.startswith("memory: a row with 1,599 tokens, all 6 layers recomputed, needs ")
    assert " more than the " in first and first.endswith(" of model and optimizer.")
    assert second == (
        "  Use a train.max_length below 1,600 (with over_length: truncate_prompt), a smaller "
        "model, dtype: bfloat16, or a machine with more memory."
    )


def examples(lengths: list[int], shared: int = 0) -> list[Example]:
    """Rows of these lengths, half trained, with so many first tokens in common."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for row, length in enumerate(lengths):
        ids = [1] * shared + torch.randint(4, 64, (length - shared,), generator=draw).tolist()
        half = length // 2
        place = Place(Path("rows"), row + 1, row + 1)
        made.append(Example("", "", tuple(ids[:half]), tuple(ids[half:]), place, 0))
    return made


def tiny_model(*, layers: int = 2) -> peft.PeftModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


@pytest.mark.parametrize("computation", [Packed(CPU, fused_head=True), Padded(4, 3, CPU)])
def test_the_trials_leave_no_trace(computation: Packed | Padded) -> None:
    model = tiny_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    plan = plan_memory(
        model,
        computation,
        examples([9, 12, 20, 5]),
        iter([[0, 1], [2, 3]]),
        checkpointing="auto",
        device=CPU,
    )
    assert (plan.limit, plan.layers_recomputed, plan.reason) == (computation.limit, 0, "")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("computation", "expected"),
    [
        # Of the steps (0, 1), (2, 3) and (4, 5) the last shares most and computes least.
        (Packed(CPU), "steps in 1 pack of at most 34 tokens, no layer recomputed; peak"),
        (Packed(CPU, 1), "steps in up to 2 packs of at most 24 tokens, no layer recomputed; peak"),
        (Padded(2, 3, CPU), "steps in 1 micro-batch of at most 50 tokens, no layer recomputed;"),
        (Padded(1, 3, CPU), "steps in up to 2 micro-batches of at most 25 tokens, no layer"),
    ],
)
def test_the_largest_piece_of_the_run_is_tried(computation: Packed | Padded, expected: str) -> None:
    rows = examples([9, 12], 0) + examples([16, 20]) + examples([25, 25], shared=18)
    plan = plan_memory(
        tiny_model(),
        computation,
        rows,
        iter([[0, 1], [2, 3], [4, 5]]),
        checkpointing="auto",
        device=CPU,
    )
    assert str(plan).startswith(expected)
    assert plan.budget_bytes is not None and plan.expected_peak_bytes is not None
    assert plan.expected_peak_bytes < plan.budget_bytes
    # MB in a process of its own, GB after a thousand other tests.
    assert re.search(r"; peak [\d.,]+ [MG]B expected of [\d.,]+ GB$", str(plan))


@pytest.mark.parametrize(("checkpointing", "layers"), [("none", 0), (1, 1), (2, 2), ("all", 2)])
def test_what_is_set_is_kept(checkpointing: Any, layers: int) -> None:
    plan = plan_memory(
        tiny_model(),
        Packed(CPU, 1),
        examples([9, 12]),
        iter([[0, 1]]),
        checkpointing=checkpointing,
        device=CPU,
    )
    assert (plan.layers_recomputed, plan.reason) == (layers, "")


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(
            tiny_model(),
            Packed(CPU),
            examples([9]),
            iter([[0]]),
            checkpointing=3,
            device=CPU,
        )
    assert str(caught.value) == (
        "train.checkpointing is 3, but the model has 2 layers that can recompute their "
        "activations.\n  Use a number up to that, all, or auto."
    )


def way_down(ladder: Ladder, limit: int, layers: int, size: int) -> list[tuple[int, int]]:
    """What is tried one after the other, where pieces are as large as they may be."""
    found = [(limit, layers)]
    for _ in itertools.count():
        lower = ladder.below(*found[-1], min(size, found[-1][0]))
        if lower == found[-1]:
            return found
        found.append(lower)


def test_the_way_down_cuts_then_recomputes_then_cuts_to_single_rows() -> None:
    free = Ladder(1024, 300, 28, limit_is_set=False, layers_are_set=False)
    assert way_down(free, 8192, 0, 6000) == [
        (8192, 0),
        (3000, 0),
        (1500, 0),
        (1024, 0),
        (1024, 7),
        (1024, 14),
        (1024, 21),
        (1024, 28),
        (512, 28),
        (300, 28),
    ]
    # Packs below 1,024 tokens, as in the reference job: recomputation first.
    assert way_down(free, 8192, 0, 700)[:2] == [(8192, 0), (8192, 7)]
    assert way_down(free, 8192, 0, 700)[-2:] == [(350, 28), (300, 28)]
    set_cut = Ladder(1024, 300, 4, limit_is_set=True, layers_are_set=False)
    assert way_down(set_cut, 8192, 0, 6000)[-1] == (8192, 4)
    set_layers = Ladder(1024, 300, 4, limit_is_set=False, layers_are_set=True)
    assert way_down(set_layers, 8192, 2, 1600) == [(8192, 2), (800, 2), (400, 2), (300, 2)]
    assert free.below(1024, 7, 1024, nearly=True) == (1024, 8)
    assert free.below(8192, 0, 8192, "eval") == (4096, 0)
    assert free.below(512, 0, 8192, "eval") == (300, 0)


def test_a_plan_says_its_reason() -> None:
    plan = MemoryPlan(
        "tokens",
        1024,
        5,
        28,
        reason="otherwise 31.0 GB would be needed",
        pieces=6,
        largest_piece=1020,
        expected_peak_bytes=18_240_000_000,
        budget_bytes=21_300_000_000,
    )
    assert str(plan) == (
        "steps in up to 6 packs of at most 1,020 tokens, 5 of 28 layers recomputed "
        "(otherwise 31.0 GB would be needed); peak 18.2 GB expected of 21.3 GB"
    )
    assert MemoryPlan(**json.loads(json.dumps(plan.to_json()))) == plan
