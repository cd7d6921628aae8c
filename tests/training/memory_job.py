"""A run in a process of its own, whose memory can be limited: `memory_job.py '{"plans": true}'`.

Prints one JSON object. The model is so large that activations are a good part of the memory.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from myna.data.conversation import Place
from myna.data.loader import rows_of_steps
from myna.data.store import Example
from myna.device import failing_allocations, memory_in_use, peak_memory_within
from myna.distributed.group import join_group
from myna.errors import OutOfMemoryError
from myna.lora.fused import fuse
from myna.training.computation import Packed
from myna.training.events import EventLog
from myna.training.fit import FitSettings, fit
from myna.training.memory import plan_memory

CPU = torch.device("cpu")


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    made = get_peft_model(LlamaForCausalLM(config), lora)
    fuse(made)
    return made


def rows(number: int, length: int) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    return [
        Example(
            "",
            "",
            tuple(torch.randint(512, (length // 2,), generator=draw).tolist()),
            tuple(torch.randint(512, (length // 2,), generator=draw).tolist()),
            Place(Path("rows"), row + 1, row + 1),
            0,
        )
        for row in range(number)
    ]


def process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(
    headroom_mb: int | None = None,
    plans: bool = False,
    trains: bool = True,
    batch: int = 14,
    length: int = 50,
) -> dict[str, Any]:
    """Three steps. With `headroom_mb` the process can take so much more than it has."""
    group = join_group()
    trained, examples = model(), rows(3 * batch, length)
    computation = Packed(CPU, fused_head=True)
    settings = FitSettings(1, None, batch, 1e-3, "constant", 0, 0.0, 0.0, 1.0, 3, 100, 2)
    # One forward and backward of little: what is loaded and allocated once is not in the headroom.
    with computation.prepared(trained):
        (piece,) = computation.pieces(rows(1, 50), [0])
        computation.summed_loss(trained, piece).backward()
        trained.zero_grad()
    if headroom_mb is not None:
        limit = process_bytes("VmData") + headroom_mb * 10**6
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    events: list[dict[str, Any]] = []
    found: dict[str, Any] = {"in_use": memory_in_use()}
    with failing_allocations(), EventLog(None, events.append) as log:
        try:
            plan = []
            if plans:
                steps = rows_of_steps(3 * batch, batch, seed=3, first_step=1, last_step=3)
                plan = [
                    plan_memory(
                        trained,
                        computation,
                        examples,
                        (step for _, _, step in steps),
                        checkpointing="auto",
                        device=CPU,
                        group=group,
                    )
                ]
                found |= {"plan": plan[0].to_json(), "said": str(plan[0])}
            if trains:
                with peak_memory_within() as used:
                    result = fit(
                        trained,
                        examples,
                        [],
                        settings,
                        computation=computation,
                        plans=plan,
                        device=CPU,
                        events=log,
                        group=group,
                    )
                found |= {"losses": result.losses, "peak": used.bytes}
        except OutOfMemoryError as error:
            found["error"] = str(error)
    group.close()
    return found | {"events": events}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(main(**json.loads(sys.argv[1]))))
