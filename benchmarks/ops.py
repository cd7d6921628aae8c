"""The time of each operation beside what it replaces, at the shapes of two models.

    python benchmarks/ops.py [--small]

Linear layers: a forward and backward of `lora_linear` against peft's layer on the same weights
(bfloat16 base, float32 adapter of rank 8), at dropout 0 and 0.1. Head: `frozen_head_cross_entropy`
against all rows' logits, cast to float32 for torch's cross-entropy, forward and backward. Both take
turns; medians of the rounds, in milliseconds. `gemm` is the frozen weight's arithmetic as two plain
products. Where other programs use a core, measure with OMP_NUM_THREADS=1: two threads then wait for
each other in every small operation. `results/ops.json` keeps the figures with versions, hardware
and command; `--small` takes small shapes and writes nothing.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from myna.device import processor
from myna.lora.fused import fuse
from myna.ops.cross_entropy import frozen_head_cross_entropy

RESULTS = Path(__file__).parent / "results" / "ops.json"
Run = Callable[[], object]

# Tokens and trained tokens of a step of 16 rows: 16 * 54 less shared prefixes, 16 * 18.
TOKENS, TRAINED = 640, 288
SHAPES = {
    "workload A": {"qo": (1024, 1024), "gate": (1024, 2752), "down": (2752, 1024)},
    "Qwen3-0.6B": {"q": (1024, 2048), "gate": (1024, 3072), "down": (3072, 1024)},
}
HEADS = {"workload A": (1024, 100_008), "Qwen3-0.6B": (1024, 151_936)}


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of each, interleaved; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(times[1:]), 3) for name, times in seconds.items()}


def linear(tokens: int, inner: int, outer: int, dropout: float, rounds: int) -> dict[str, float]:
    holder = nn.Module()
    holder.layer = nn.Linear(inner, outer, bias=False).bfloat16()
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["layer"])
    theirs = get_peft_model(holder, config).train()
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 1
    x = torch.randn(tokens, inner).bfloat16().requires_grad_()
    grad = torch.randn(tokens, outer).bfloat16()
    weight = theirs.base_model.model.layer.base_layer.weight

    def run(model: nn.Module) -> None:
        model.base_model.model.layer(x).backward(grad)

    def gemm() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return x @ weight.T, grad @ weight

    return medians({"gemm": gemm, "peft": lambda: run(theirs), "myna": lambda: run(ours)}, rounds)


def head(rows: int, inner: int, vocabulary: int, rounds: int) -> dict[str, float]:
    weight = (torch.randn(vocabulary, inner) * 0.02).bfloat16()
    hidden = torch.randn(rows, inner).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def gemm() -> Tensor:
        with torch.no_grad():
            return (hidden @ weight.T) @ weight

    def whole() -> None:
        logits = (hidden @ weight.T).float()
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()

    def ours() -> None:
        frozen_head_cross_entropy(hidden, weight, targets).backward()

    return medians({"gemm": gemm, "whole logits": whole, "myna": ours}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small shapes, no result written")
    small = parser.parse_args().small
    rounds, divisor = (2, 16) if small else (7, 1)
    tokens, trained = TOKENS // divisor, TRAINED // divisor
    torch.manual_seed(0)
    results: dict[str, object] = {
        "command": " ".join(["python benchmarks/ops.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor().name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "peft")},
        },
        "tokens": tokens,
        "trained_tokens": trained,
        "unit": "milliseconds, forward and backward, median",
    }
    for model, layers in SHAPES.items():
        results[model] = {
            f"{layer} {inner}x{outer} dropout {dropout}": linear(
                tokens, inner // divisor, outer // divisor, dropout, rounds
            )
            for layer, (inner, outer) in layers.items()
            for dropout in (0.0, 0.1)
        } | {
            "head {}x{}".format(*HEADS[model]): head(
                trained, HEADS[model][0] // divisor, HEADS[model][1] // divisor, rounds
            )
        }
    text = json.dumps(results, indent=1)
    if not small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
